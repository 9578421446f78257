"""The page at `/`: what is sent of it, what it is fed with, and what a browser makes of both."""

import asyncio
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from graphgen.gateway import live
from graphgen.gateway.admission import Admission
from graphgen.gateway.keys import ApiKeys, make_key
from graphgen.gateway.output_parsers.formats import PLAIN
from graphgen.gateway.page_files import FOLDER
from graphgen.gateway.rates import RateLimits
from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from graphgen.ipc.errors import ConnectionLostError
from graphgen.ipc.ggp.messages import Stats, StatsRequest
from tests.gateway.asgi import GatewayCore, Reply, acall, call, says
from tests.serving import ServerProcess, serving

GRAPHGEN = (sys.executable, "-P", "-m", "graphgen")

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
MOST_BYTES = 60_000
"""Of all files, as a browser loads them."""
BROWSER = Path(__file__).parent / "browser"
CHROMIUM = shutil.which("chromium")


def get(path: str, **further: Any) -> Reply:
    return call(GatewayCore(says("x")), path, method="GET", **further)


def test_the_page_is_small_and_whole() -> None:
    """Also as bytes: compressed and plain are the same file."""
    num_bytes = 0
    for name in FILES:
        path = "/" if name == "index.html" else f"/page/{name}"
        plain, compressed = get(path), get(path, headers={"accept-encoding": "gzip, br"})
        assert (plain.status, compressed.headers["content-encoding"]) == (200, "gzip")
        assert gzip.decompress(compressed.body) == plain.body == (FOLDER / name).read_bytes()
        num_bytes += len(compressed.body)
    assert num_bytes < MOST_BYTES


@pytest.mark.parametrize("name", ["", "nothing.js", "../app.py", "%2e%2e/app.py", "/etc/passwd", "vendor"])
def test_nothing_but_its_files_is_served(name: str) -> None:
    assert get(f"/page/{name}").status == 404


def test_a_browser_loads_nothing_from_elsewhere_and_runs_nothing_but_files() -> None:
    policy = get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", html)
    for name in FILES:
        if not name.startswith("vendor/"):
            text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
            assert "://" not in text, name
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name


def test_what_is_anothers_has_its_licence() -> None:
    assert "MIT License" in get("/page/vendor/uPlot.LICENSE").body.decode()


def test_the_page_needs_no_key_and_what_it_shows_does(tmp_path: Path) -> None:
    make_key(tmp_path, "ann")
    admission = Admission(ApiKeys(tmp_path), RateLimits(tmp_path))
    assert get("/", admission=admission).status == 200
    assert get("/page/main.js", admission=admission).status == 200
    for path in ("/v1/engine/steps", "/metrics", "/v1/models"):
        assert get(path, admission=admission).status == 401


async def watch(core: GatewayCore, num_asked: int) -> Reply:
    """Until the server was asked so often: all but the last answer have been shown by then."""
    leaves = asyncio.Event()
    async with asyncio.timeout(30):
        reply = asyncio.create_task(acall(core, "/v1/engine/steps", method="GET", leaves=leaves))
        while len(core.asked) < num_asked:
            await asyncio.sleep(0.01)
        leaves.set()
        return await reply


def test_the_engine_is_asked_only_while_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD_S", 0.01)

    async def scenario() -> None:
        core = GatewayCore(says("x"))
        reply = await watch(core, 4)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert len(reply.events) >= 2
        assert (reply.events[0]["running"], reply.events[0]["waiting"]) == (2, [4, 0, 0, 5])
        assert [question.live_after for question in core.asked[:2]] == [0, 7], "from the newest step on that is known"
        await asyncio.sleep(0.3)
        num_asked = len(core.asked)
        await asyncio.sleep(0.3)
        assert len(core.asked) == num_asked

    asyncio.run(scenario())


def test_a_gateway_that_ends_does_not_wait_for_viewers() -> None:
    async def scenario() -> None:
        feed = live.LiveFeed(Service(GatewayCore(says("x")), ["fake"], ModelFacts(PLAIN, {})))  # type: ignore[arg-type]  # a stand-in
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async with asyncio.timeout(10):
            viewer = asyncio.create_task(feed.steps({}, receive, send))
            while not sent:
                await asyncio.sleep(0.01)
            feed.end()
            await viewer
        assert sent[-1] == {"type": "http.response.body", "body": b""}

    asyncio.run(scenario())


def test_a_server_that_is_away_is_told_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "AWAY_S", 0.01)

    class Away(GatewayCore):
        def stats(self, question: StatsRequest) -> Stats:
            if not self.asked:
                self.asked.append(question)
                raise ConnectionLostError("it does not answer")
            return super().stats(question)

    async def scenario() -> Reply:
        return await watch(Away(says("x")), 4)

    first, second, *_ = asyncio.run(scenario()).events
    assert first["error"]["code"] == "engine_lost"
    assert second["serves"]


# --- in a browser ----------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not (BROWSER / "node_modules").exists(),
    reason="needs Debian's chromium and playwright-core: `make browser` installs them",
)


def read(server: ServerProcess, key: str, stop: threading.Event) -> None:
    """Requests that run meanwhile."""
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 100}).encode()
    while not stop.is_set():
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/v1/completions", body, {"authorization": f"Bearer {key}"}), timeout=60
        ) as answer:
            answer.read()


@needs_browser
def test_a_browser_asks_for_the_key_draws_steps_and_chats(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    folder = tmp_path / "keys"
    key = make_key(folder / "http", "ann")
    subprocess.run([*GRAPHGEN, "keys", "new", "--keys", str(folder)], check=True, capture_output=True)
    with serving(tmp_path, "--http", "127.0.0.1:0", "--keys", str(folder)) as server:
        stop = threading.Event()
        reader = threading.Thread(target=read, args=(server, key, stop))
        reader.start()
        try:
            command = ["node", str(BROWSER / "look.js"), CHROMIUM, server.url, key]
            found = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
        finally:
            stop.set()
            reader.join()
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    # The browser reports each refusal: of no key, of a wrong one, and of log-probabilities where there are none.
    assert [error for error in seen["errors"] if not re.search("status of 40[01]", error)] == []
    assert all(request.startswith(server.url) for request in seen["requests"]), "it needs no other server"
    assert seen["model"] == "demo"
    assert seen["kept"] == [1, 0, ""], "the key lies in this tab's storage and nowhere else"
    assert "of 40" in seen["row"] or "of 100" in seen["row"] or "waits" in seen["row"]
    assert re.match(r"first token after .* \(TTFT\) · then .* a token \(ITL\).* · 40 tokens", seen["figures"])
    assert seen["answer"].strip()
    shown = [["sure", ""], [" and", "p2"], [" <b>unlikely</b>", "p0"]]
    assert [one for one in seen["coloured"] if one in shown] == shown, "the less likely, the stronger the colour"
    assert all(count > 200 for count in seen["painted"].values()), seen["painted"]
    assert "had a target" in seen["note"]
