"""Requests that a frontend elsewhere routes to this server: who may, what comes of them, and what it is told."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq.auth
from typer.testing import CliRunner

from graphgen import ConfigError, ConnectionLostError
from graphgen.commands.keys import keys_app
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Blamed, Cancel, ReportRequest, Submit
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Error, Generate, Hello, Sampling, Welcome
from graphgen.ipc.ggp.routing import Load, Routed
from graphgen.router.links import Links
from graphgen.router.remote_engines import Model, RemoteEngines
from graphgen.server.frontend.authentication import KeyRing
from graphgen.server.frontend.keys import Keys
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import NUM_PAGES, Frontend, RawClient
from tests.router.engines import report

ROUTED = Generate(id=1, prompt_u32=pack_int32([5, 6, 7]), routed=Routed(seed=2**63 - 1), tenant="ann")


def connect(frontend: Frontend, **options: Any) -> tuple[RawClient, Welcome]:  # options of the socket
    client = frontend.connect(**options)
    client.send(Hello(client="another frontend", routes=True))
    return client, client.expect(Welcome)


def expect(client: RawClient, kind: type) -> object:
    """The next message that is no load."""
    while isinstance(message := client.receive(), Load):
        pass
    assert isinstance(message, kind), message
    return message


def submitted(frontend: Frontend) -> Submit:
    while isinstance(message := frontend.scheduler.receive(5.0), ReportRequest):
        pass
    assert isinstance(message, Submit), message
    return message


def test_a_server_without_keys_lets_frontends_route_and_says_what_it_holds(frontend: Frontend) -> None:
    _, welcome = connect(frontend)
    assert {"routed", "tenants", "statistics"} <= {*welcome.features}
    assert welcome.capacity is not None
    assert (welcome.capacity.engines, welcome.capacity.slots, welcome.capacity.page_size) == (1, 4, 16)
    plain = frontend.connect()
    plain.send(Hello())
    found = plain.expect(Welcome)
    assert "routed" not in found.features
    assert found.capacity is None


def test_a_routed_request_goes_on_behind_its_tokens_and_has_no_text(frontend: Frontend) -> None:
    client, _ = connect(frontend)
    routed = Routed(seed=9, age_ms=5000.0, output_u32=pack_int32([8, 9]), first_token_ms=2000.0, moves=2, deaths=1)
    client.send(msgspec.structs.replace(ROUTED, routed=routed, sampling=Sampling(max_tokens=20)))
    submit = submitted(frontend)
    assert (submit.sampler.seed, submit.num_moves, submit.num_deaths, submit.tenant) == (9, 2, 1, "tenant ann")
    assert submit.output_token_ids == pack_int32([8, 9])
    assert submit.first_token_s == pytest.approx(submit.arrived_s + 2.0)
    expect(client, Accepted)
    frontend.scheduler.send_tokens(submit.request_id, [300], None, submit.arrived_s + 1.0)
    delta = expect(client, Delta)
    assert isinstance(delta, Delta)
    assert (delta.seq, delta.ids, delta.text) == (0, [300], "")
    frontend.scheduler.send_tokens(submit.request_id, [301], "length")
    expect(client, Delta)
    ended = expect(client, Done)
    assert isinstance(ended, Done)
    assert ended.usage.output_tokens == 2, "those that came from here"


def test_its_first_token_says_how_long_it_waited_since_it_arrived_elsewhere(frontend: Frontend) -> None:
    client, _ = connect(frontend)
    client.send(msgspec.structs.replace(ROUTED, routed=Routed(seed=1, age_ms=5000.0)))
    submit = submitted(frontend)
    expect(client, Accepted)
    frontend.scheduler.send_tokens(submit.request_id, [300], None, submit.arrived_s + 5.5)
    delta = expect(client, Delta)
    assert isinstance(delta, Delta)
    assert delta.queued_ms == pytest.approx(5500.0)


def test_a_death_is_told_at_once_and_forgotten_with_the_next_token(frontend: Frontend) -> None:
    client, _ = connect(frontend)
    client.send(ROUTED)
    submit = submitted(frontend)
    expect(client, Accepted)
    frontend.scheduler.send(Blamed((submit.request_id,), (2,)))
    delta = expect(client, Delta)
    assert isinstance(delta, Delta)
    assert (delta.ids, delta.deaths) == ([], 2)
    frontend.scheduler.send_tokens(submit.request_id, [300])
    delta = expect(client, Delta)
    assert isinstance(delta, Delta)
    assert (delta.ids, delta.deaths, delta.seq) == ([300], 0, 0)


def test_loads_come_unasked_while_somebody_routes_here(frontend: Frontend) -> None:
    client, _ = connect(frontend)
    while not isinstance(frontend.scheduler.receive(5.0), ReportRequest):
        pass
    frontend.scheduler.send(report(3, 700, 60, epoch=5, num_steps=9))
    load = client.expect(Load)
    assert (load.open, load.prompt_tokens, load.output_tokens, load.steps, load.engines) == (3, 700, 60, 9, 1)
    first = load.epoch
    frontend.scheduler.send(report(epoch=6))
    while (load := client.expect(Load)).open:
        pass
    assert load.epoch != first, "the cache is empty"


def test_a_frontend_that_goes_away_takes_its_requests_along(frontend: Frontend) -> None:
    client, _ = connect(frontend)
    client.send(ROUTED)
    submit = submitted(frontend)
    client.close()
    while isinstance(message := frontend.scheduler.receive(5.0), ReportRequest):
        pass
    assert message == Cancel(submit.request_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": Sampling(n=2)},
        {"sampling": Sampling(stop=["x"])},
        {"stream": False},
        {"prompt_u32": None, "text": "ROMEO:"},
    ],
)
def test_what_makes_no_sense_of_a_routed_request_is_refused(frontend: Frontend, changes: dict[str, object]) -> None:
    client, _ = connect(frontend)
    client.send(msgspec.structs.replace(ROUTED, **changes))
    error = expect(client, Error)
    assert isinstance(error, Error)
    assert error.code == "bad_request"
    assert "routed is of one sample" in error.message


def test_a_client_that_is_no_frontend_may_route_nothing(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send(msgspec.structs.replace(ROUTED, tenant=""))
    assert client.expect(Error).code == "forbidden"


def test_a_frontend_whose_engines_are_elsewhere_is_none_itself(make_frontend: MakeFrontend) -> None:
    """It could be its own engine, or that of another which is its: requests would go round for ever."""
    frontend = make_frontend(elsewhere=((0, "tcp://a:1"),))
    client, welcome = connect(frontend)
    assert ("elsewhere" in welcome.features, "routed" in welcome.features, welcome.capacity) == (True, False, None)
    client.send(msgspec.structs.replace(ROUTED, tenant=""))
    assert client.expect(Error).code == "forbidden"
    links = Links([], lambda _: None, routes=True)
    try:
        model = Model("fake", 1024, frozenset({0}), 1024)
        links.add(0, RemoteEngines(model, None, None, takes_any_context=True).maker(frontend.sockets.data.address))
        with pytest.raises(ConfigError, match="is a frontend whose engines are elsewhere, as this one is: give the"):
            links.wait_ready(10.0)
    finally:
        links.close()


def test_with_keys_only_those_that_say_so_route(make_frontend: MakeFrontend, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    keys.make(None)
    frontend = make_frontend(keys=str(keys.folder))
    server, _ = zmq.auth.load_certificate(keys.folder / "server.key")
    for name, routes in (("plain", False), ("frontend", True)):
        secret_file, _ = keys.make(name, routes=routes)
        public, secret = zmq.auth.load_certificate(secret_file)
        options = {"CURVE_SERVERKEY": server, "CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": secret}
        client, welcome = connect(frontend, **options)
        assert ("routed" in welcome.features) is routes
        client.send(msgspec.structs.replace(ROUTED, tenant=""))
        assert isinstance(expect(client, Accepted if routes else Error), Accepted if routes else Error)


def test_a_link_proves_who_it_is_and_one_with_another_key_is_told_by_name(
    make_frontend: MakeFrontend, tmp_path: Path
) -> None:
    keys, others = Keys(tmp_path / "keys"), Keys(tmp_path / "others")
    keys.make(None)
    keys.make("frontend", routes=True)
    others.make("frontend")
    (others.folder / "server.key").write_bytes((keys.folder / "server.key").read_bytes())
    frontend = make_frontend(keys=str(keys.folder))
    model = Model("fake", 1024, frozenset({0}), 1024)
    address = frontend.sockets.data.address
    for folder, is_let_in in ((keys.folder, True), (others.folder, False)):
        links = Links([], lambda _: None, routes=True)
        try:
            links.add(0, RemoteEngines(model, folder, None, takes_any_context=True).maker(address))
            if is_let_in:
                assert links.wait_ready(10.0).worker.num_pages == NUM_PAGES
            else:
                with pytest.raises(ConnectionLostError, match=f"the engine {address} cannot be reached: the handshake"):
                    links.wait_ready(3.0)
        finally:
            links.close()
    with pytest.raises(ConfigError, match=r"there is no frontend\.key_secret in"):
        RemoteEngines(model, tmp_path, None, takes_any_context=True).maker(address)


def test_the_commands_let_a_frontend_route(tmp_path: Path) -> None:
    folder = str(tmp_path / "keys")
    runner = CliRunner()
    assert runner.invoke(keys_app, ["new", "frontend", "--routes", "--keys", folder]).exit_code == 0
    ring = KeyRing(Path(folder) / "clients")
    public = zmq.auth.load_certificate(Path(folder) / "clients" / "frontend.key_secret")[0].decode()
    assert ring.may_route(public)
    assert runner.invoke(keys_app, ["allow", "frontend", public, "--keys", folder]).exit_code == 0
    ring.refresh()
    assert not ring.may_route(public)
    with pytest.raises(ConfigError, match="the server's own key routes no requests"):
        Keys(Path(folder)).make(None, routes=True)
