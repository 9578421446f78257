"""The OpenAPI document says what the gateway has."""

from typing import Any

import msgspec

from graphgen.gateway import schema
from graphgen.gateway.app import make_app
from graphgen.gateway.openapi import document
from graphgen.gateway.output_parsers.formats import PLAIN
from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from tests.gateway.asgi import GatewayCore, call, says


def test_every_endpoint_is_in_the_document_and_no_other() -> None:
    app = make_app(Service(GatewayCore(says("x")), ["fake"], ModelFacts(PLAIN, {})))  # type: ignore[arg-type]  # a stand-in for RemoteCore
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in app.routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(method.upper(), path) for path, methods in document()["paths"].items() for method in methods}
    assert described == routes


def test_the_document_is_served_and_all_that_it_refers_to_is_there() -> None:
    reply = call(GatewayCore(says("x")), "/openapi.json", method="GET")
    assert reply.json == msgspec.to_builtins(document())
    schemas = reply.json["components"]["schemas"]

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(reply.json) <= {f"#/components/schemas/{name}" for name in schemas}
    assert set(schemas["ChatRequest"]["properties"]) == set(schema.ChatRequest.__struct_fields__)
