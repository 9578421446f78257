"""API keys: who is let in by them, as whom, and what of a key is kept."""

from pathlib import Path
from typing import Any

import pytest

from graphgen import ConfigError, SamplingParams
from graphgen.base.salt import cache_salt
from graphgen.gateway import keys
from graphgen.gateway.admission import Admission
from graphgen.gateway.keys import ApiKeys, Holder, make_key
from graphgen.gateway.rates import RateLimits
from graphgen.server.options import ServeOptions
from tests.gateway.asgi import GatewayCore, Reply, call, says

CHATS = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_S", 0.0)


def asks_for_keys(folder: Path) -> Admission:
    return Admission(ApiKeys(folder), RateLimits(folder / "rates"))


def test_a_key_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    folder = tmp_path / "http"
    ann, bob = make_key(folder, "ann"), make_key(folder, "bob", max_priority=3)
    assert ann != bob
    known = ApiKeys(folder)
    assert (known.find(ann), known.find(bob)) == (Holder("ann", 9), Holder("bob", 3))
    for wrong in ("", ann[:-1], ann + "x", ann.upper(), "gg-" + "A" * 43):
        assert known.find(wrong) is None
    kept = "".join(path.read_text() for path in folder.iterdir())
    assert ann not in kept
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    with pytest.raises(ConfigError, match=r"ann\.key is there already"):
        make_key(folder, "ann")
    for name in ("", "../x", "a b", "1.2.3.4"):
        with pytest.raises(ConfigError, match="no name for a key"):
            make_key(folder, name)


def test_keys_come_and_go_while_a_gateway_runs(tmp_path: Path) -> None:
    known = ApiKeys(tmp_path / "http")
    assert known.find("x") is None
    key = make_key(tmp_path / "http", "ann")
    assert known.find(key) == Holder("ann", 9)
    (tmp_path / "http" / "ann.key").unlink()
    assert known.find(key) is None


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        ('sha256 = "{digest}"\n', Holder("ann", 9)),
        ('max-priority="0"\n sha256 = "{digest}"', Holder("ann", 0)),
        ('sha256 = "{digest}"\nmax-priority = "much"\n', Holder("ann", 0)),
        ('sha256 = "{digest}"\nmax-priority = "10"\n', Holder("ann", 0)),
        ("", None),
        ('sha256 = ""', None),
        ('sha256 = "abc"', None),
        ("\udcff", None),
    ],
)
def test_a_damaged_file_lets_nobody_in_and_nobody_else_out(tmp_path: Path, text: str, holder: Holder | None) -> None:
    key, other = make_key(tmp_path, "bob"), "gg-other"
    text = text.format(digest=keys._digest(other))
    (tmp_path / "ann.key").write_bytes(text.encode(errors="surrogateescape"))
    known = ApiKeys(tmp_path)
    assert (known.find(other), known.find(key)) == (holder, Holder("bob", 9))


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_who_has_a_key_is_accounted_to_it(tmp_path: Path, header: str) -> None:
    key, core = make_key(tmp_path, "ann", max_priority=2), GatewayCore(says("a"))
    headers = {header: key if header == "x-api-key" else f"Bearer {key}"}
    body = {**HELLO, "priority": 5, "cache_salt": "s"}
    assert call(core, CHATS, body, admission=asks_for_keys(tmp_path), headers=headers).status == 200
    assert core.tenants == ["ann"]
    assert isinstance(core.sampling, SamplingParams)
    assert (core.sampling.priority, core.sampling.cache_salt) == (2, cache_salt("ann", "s"))
    assert core.sampling.cache_salt != cache_salt("bob", "s")


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer x"}, {"authorization": "Basic x"}, {"x-api-key": ""}]
)
def test_who_has_none_is_told_before_anything_is_read(tmp_path: Path, headers: dict[str, str]) -> None:
    make_key(tmp_path, "ann")
    core = GatewayCore(says("a"))
    for path, method in ((CHATS, "POST"), ("/v1/models", "GET"), ("/v1/models/fake", "GET")):
        reply = call(core, path, b"{", method, admission=asks_for_keys(tmp_path), headers=headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert call(core, path, method="GET", admission=asks_for_keys(tmp_path), headers=headers).status == 200
    assert not core.prompts


def test_a_key_makes_so_many_requests_a_minute_at_all_gateways_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("graphgen.gateway.rates.time.monotonic", lambda: now_s[0])
    slow, free = make_key(tmp_path, "slow", requests_per_minute=6), make_key(tmp_path, "free")
    gateways = [asks_for_keys(tmp_path), asks_for_keys(tmp_path)]

    def ask(key: str, number: int) -> Reply:
        headers = {"authorization": f"Bearer {key}"}
        return call(GatewayCore(says("a")), CHATS, HELLO, admission=gateways[number % 2], headers=headers)

    assert [ask(slow, number).status for number in range(7)] == [200] * 6 + [429]
    refused = ask(slow, 1)
    assert (refused.error["code"], refused.headers["retry-after"]) == ("rate_limit_exceeded", "10")
    assert ask(free, 0).status == 200, "others have their own"
    looks = call(GatewayCore(says("a")), "/v1/models", method="GET", admission=gateways[0], headers={"x-api-key": slow})
    assert looks.status == 200, "what computes nothing is not counted"
    now_s[0] += 11
    assert [ask(slow, number).status for number in range(2)] == [200, 429]
    now_s[0] += 3600
    assert [ask(slow, number).status for number in range(7)] == [200] * 6 + [429], "rest does not add up for ever"


@pytest.mark.parametrize(("rate", "holder"), [("60", 60), ("0", 1), ("many", 1), (None, None)])
def test_a_rate_that_is_none_is_the_lowest(tmp_path: Path, rate: str | None, holder: int | None) -> None:
    line = "" if rate is None else f'requests-per-minute = "{rate}"\n'
    (tmp_path / "ann.key").write_text(f'sha256 = "{keys._digest("gg-x")}"\n{line}')
    assert ApiKeys(tmp_path).find("gg-x") == Holder("ann", 9, holder)


def test_a_public_address_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHGEN_KEYS", str(tmp_path))
    assert ServeOptions(http="127.0.0.1:0").http_key_folder is None
    with pytest.raises(ConfigError, match="graphgen keys http NAME"):
        ServeOptions(http="0.0.0.0:0")
    assert ServeOptions(http="0.0.0.0:0", insecure_public=True).http_key_folder is None
    make_key(tmp_path / "http", "ann")
    assert ServeOptions(http="0.0.0.0:0").http_key_folder == tmp_path / "http"
    assert ServeOptions(http="127.0.0.1:0").http_key_folder is None
