"""Several gateways on one port, TLS, and web pages of other origins, against `graphgen serve`."""

import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphgen import ConfigError
from graphgen.server.gateways import Gateways
from graphgen.server.http_address import listen
from graphgen.server.options import ServeOptions
from tests.gateway.asgi import GatewayCore, call, says
from tests.serving import ServerProcess, serving

ORIGIN = "https://chat.example"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]) -> Iterator[ServerProcess]:
    cert, key = certificate
    options = ("--http", "127.0.0.1:0", "--http-workers", "2", "--http-origins", ORIGIN)
    with serving(tmp_path_factory.mktemp("server"), *options, "--http-cert", cert, "--http-key", key) as server:
        yield server


def test_counts_are_the_same_whichever_gateway_is_asked(server: ServerProcess, certificate: tuple[str, str]) -> None:
    """Each connection may reach another one of them."""
    context = ssl.create_default_context(cafile=certificate[0])

    def read(path: str, body: bytes | None = None) -> str:
        with urllib.request.urlopen(f"{server.url}{path}", body, timeout=60, context=context) as answer:
            return str(answer.read().decode())

    for _ in range(6):
        read("/v1/completions", b'{"prompt": "a", "max_tokens": 2}')
    counted = 'graphgen_http_requests_total{code="200",path="/v1/completions"} 6.0'
    deadline_s = time.monotonic() + 20
    while counted not in read("/metrics") and time.monotonic() < deadline_s:
        time.sleep(0.1)  # the others report each second
    for _ in range(12):
        shown = read("/metrics")
        assert counted in shown
        assert "graphgen_output_tokens_total 12.0" in shown


def test_two_gateways_share_a_port_and_one_serves_while_the_other_is_started_again(
    server: ServerProcess, certificate: tuple[str, str]
) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    first, second = server.pids_of("graphgen.gateway")
    os.kill(first, signal.SIGKILL)
    headers = {"origin": ORIGIN}
    for _ in range(20):  # those that wait for the dead one are served when another has taken its place
        request = urllib.request.Request(f"{server.url}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            assert answer.headers["access-control-allow-origin"] == ORIGIN
    deadline_s = time.monotonic() + 20
    while len(pids := server.pids_of("graphgen.gateway")) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert second in pids
    assert first not in pids


def test_http_over_tls_is_not_spoken_in_the_clear(server: ServerProcess) -> None:
    assert server.url.startswith("https://")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(server.url.replace("https", "http") + "/health", timeout=10)


def test_an_address_that_another_server_has_is_not_shared_with_it() -> None:
    one, other = listen("127.0.0.1:0", 2)
    try:
        assert one.getsockname() == other.getsockname()
        for num_sockets in (1, 2):
            with pytest.raises(ConfigError, match="choose another with --http"):
                listen(f"127.0.0.1:{one.getsockname()[1]}", num_sockets)
    finally:
        one.close()
        other.close()


def test_files_that_are_no_certificate_are_told_at_once(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    with pytest.raises(ConfigError, match="give both --http-cert and --http-key"):
        Gateways(ServeOptions(http="127.0.0.1:0", http_cert=cert), "model", print)
    for wrong in ((key, cert), (cert, str(tmp_path / "none"))):
        with pytest.raises(ConfigError, match="are no certificate and its key"):
            Gateways(ServeOptions(http="127.0.0.1:0", http_cert=wrong[0], http_key=wrong[1]), "model", print)


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [((), ORIGIN, None), ((ORIGIN,), ORIGIN, ORIGIN), ((ORIGIN,), "https://evil.example", None), (("*",), ORIGIN, "*")],
)
def test_pages_of_other_origins_call_only_where_the_operator_says_so(
    origins: tuple[str, ...], origin: str, allowed: str | None
) -> None:
    core = GatewayCore(says("x"))
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    preflight = call(core, "/v1/chat/completions", method="OPTIONS", headers=asked, origins=origins)
    assert preflight.headers.get("access-control-allow-origin") == allowed
    assert (preflight.status == 200) == (allowed is not None)
    reply = call(core, "/v1/models", method="GET", headers={"origin": origin}, origins=origins)
    assert (reply.status, reply.headers.get("access-control-allow-origin")) == (200, allowed)
