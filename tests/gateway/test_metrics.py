"""What `/metrics` shows, as Prometheus' own parsers read it, and that dashboards ask for what there is."""

import json
import re
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from graphgen.gateway.metric_table import COUNTERS, GAUGES, HISTOGRAMS, Names, named
from graphgen.gateway.metrics import render
from graphgen.server.frontend.tallies import ITL_BOUNDS_S
from tests import ROOT
from tests.gateway.asgi import METRICS, STATS, GatewayCore, call, says

DASHBOARD = ROOT / "deploy" / "grafana" / "graphgen.json"
DOCUMENT = ROOT / "docs" / "monitoring.md"


def shown(names: Names = "graphgen") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, by name and labels."""
    body, content_type = render(replace(STATS, metrics=METRICS), names, "play", "text/plain;version=0.0.4")
    assert content_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


def value(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_every_number_has_its_place() -> None:
    found = shown()
    assert value(found, "graphgen_kv_usage_ratio") == 0.25
    pages = {state: value(found, "graphgen_kv_pages", state=state) for state in ("used", "cached", "free")}
    assert pages == {"used": 25, "cached": 20, "free": 55}
    assert value(found, "graphgen_step_rows_total", kind="padding") == 42
    assert value(found, "graphgen_bucket_steps_total", bucket="112+16") == 6
    assert value(found, "graphgen_bucket_step_seconds_total", bucket="112+16") == pytest.approx(0.03)
    assert value(found, "graphgen_requests_waiting", place="scheduler", priority="3") == 5
    assert value(found, "graphgen_requests_waiting", place="frontend", priority="2") == 2
    assert value(found, "graphgen_target_misses_total", target="itl") == 2
    assert value(found, "graphgen_requests_total", finish="overloaded") == 2
    assert value(found, "graphgen_worker_restarts_total") == 1
    assert value(found, "graphgen_info", model="play") == 1


def test_histograms_are_cumulative_and_see_below_ten_milliseconds() -> None:
    found = shown()
    name = "graphgen_inter_token_latency_seconds"
    assert [value(found, f"{name}_bucket", le=le) for le in ("0.001", "0.5", "+Inf")] == [2, 5, 6]
    assert (value(found, f"{name}_count"), value(found, f"{name}_sum")) == (6, 4.5)
    assert sum(bound < 0.01 for bound in ITL_BOUNDS_S) >= 8


def test_with_vllms_names_each_metric_has_one_name() -> None:
    ours, theirs = shown(), shown("vllm")
    model = {"model_name": "play"}
    assert value(theirs, "vllm:num_requests_waiting", **model) == 12
    assert value(theirs, "vllm:num_requests_running", **model) == 2
    assert value(theirs, "vllm:kv_cache_usage_perc", **model) == 0.25
    assert value(theirs, "vllm:request_success_total", finished_reason="abort", **model) == 1
    assert value(theirs, "vllm:time_to_first_token_seconds_bucket", le="0.5", **model) == 5
    assert value(theirs, "vllm:generation_tokens_total", **model) == 70
    names = {name for name, _ in theirs}
    assert "graphgen_steps_total" in names, "vLLM has no such count"
    assert not names & {"graphgen_requests_running", "graphgen_time_to_first_token_seconds_bucket"}
    assert not any(name.startswith("vllm") for name, _ in ours)


def test_a_scraper_gets_the_form_that_it_asks_for() -> None:
    reply = call(GatewayCore(says("x")), "/metrics", method="GET")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    reply = call(GatewayCore(says("x")), "/metrics", method="GET", headers=accept)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    families = parse_openmetrics(reply.body.decode())  # type: ignore[no-untyped-call]  # it has no types
    assert {family.name for family in families} >= {"graphgen_steps", "graphgen_info"}


def test_http_answers_are_counted_by_path_and_status() -> None:
    core = GatewayCore(says("x"))
    assert call(core, "/v1/completions", {"prompt": "a"}, reports=True).status == 200
    body = call(core, "/metrics", method="GET").body.decode()
    assert 'graphgen_http_requests_total{code="200",path="/v1/completions"} 1.0' in body
    for path, method, status, counted in (
        ("/v1/models", "GET", 200, "/v1/models"),
        ("/v1/models/other", "GET", 404, "/v1/models/{name:path}"),
        ("/v1/completions", "POST", 400, "/v1/completions"),
        ("/no/such/path", "GET", 404, "other"),
    ):
        core.http_answers.clear()
        assert call(core, path, {"prompt": 1}, method, reports=True).status == status
        assert core.http_answers == {f"{counted} {status}": 1}


def queries(dashboard: Any) -> list[str]:
    if isinstance(dashboard, dict):
        own = [dashboard["expr"]] if "expr" in dashboard else []
        return own + [query for one in dashboard.values() for query in queries(one)]
    return [query for one in dashboard for query in queries(one)] if isinstance(dashboard, list) else []


def test_the_dashboard_asks_for_what_is_shown() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for query in queries(dashboard) for name in re.findall(r"\b(?:graphgen|vllm)[_:]\w+", query)}
    exported = {name for name, _ in shown()}
    assert asked <= exported, "a query for what is not there shows an empty panel"
    assert len(asked) >= 20
    for query in queries(dashboard):
        for labels, name in re.findall(r"by \(([^)]*)\) \((?:rate\()?(\w+)", query):
            wanted = set(labels.replace(" ", "").split(","))
            assert wanted <= {label for found, own in shown() if found == name for label, _ in own}, query


def test_every_metric_says_what_it_is_and_has_a_name_of_its_own() -> None:
    names = [series.name for series in (*GAUGES, *COUNTERS, *HISTOGRAMS)]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"graphgen_[a-z_]+", name) for name in names)
    assert all(name.endswith("_total") for name in (series.name for series in COUNTERS))
    assert all(len(series.meaning) > 15 for series in (*GAUGES, *COUNTERS, *HISTOGRAMS))


def test_the_documentation_lists_every_metric_under_both_names() -> None:
    rows = []
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
        for series in table:
            labels = f"{{{', '.join(series.labels)}}}" if series.labels else ""
            theirs = named(series, "vllm", "play")[0].name
            other = "" if theirs == series.name else f"`{theirs}`"
            rows.append(f"| `{series.name}{labels}` | {kind} | {other} | {series.meaning} |")
    shown = DOCUMENT.read_text().partition("<!-- begin metrics -->\n")[2].partition("<!-- end metrics -->")[0]
    assert shown.splitlines()[2:] == rows
