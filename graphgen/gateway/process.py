"""The gateway process: connects to the frontend, and serves HTTP on the socket that the supervisor listens on.

It may die at any time: the supervisor starts another, and clients that connect meanwhile wait in the socket's queue.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.base.garbage import leave_imports_alone
from graphgen.base.logs import log_to_stderr
from graphgen.base.memory import limit_memory
from graphgen.gateway.admission import Admission
from graphgen.gateway.app import make_app
from graphgen.gateway.frontends import Frontends
from graphgen.gateway.keys import ApiKeys
from graphgen.gateway.live import LiveFeed
from graphgen.gateway.protocol import LimitedProtocol
from graphgen.gateway.rates import RateLimits
from graphgen.gateway.service import Service
from graphgen.gateway.settings import END_SIGNAL, GatewaySettings, settings_file
from graphgen.gateway.tracing import Tracing, export_to
from graphgen.launch.processes import end_with_parent
from graphgen.remote.core import RemoteCore

MOST_CONNECTIONS = 4096
SPARE_DESCRIPTORS = 64
"""For all else than connections."""
KEEP_ALIVE_S = 65
"""For which an idle connection stays open: longer than proxies keep theirs, which would else use one that is closed."""


def main(folder: Path, parent_pid: int, number: int) -> None:
    """Runs until its signal; then until open answers have ended."""
    end_with_parent(parent_pid, folder)
    raise_descriptor_limit()
    log_to_stderr(f"gateway-{number}", drops_repeats=True)
    settings = GatewaySettings.read(settings_file(folder, number))
    core = RemoteCore(settings.frontend, {})
    frontends = Frontends(core, settings.other_frontends)
    try:
        service = Service(core, settings.model_names, settings.model, frontends, settings.open_requests)
        limit_memory(settings.memory_limit_bytes)
        asyncio.run(_serve(service, settings))
    finally:
        frontends.close()


async def _serve(service: Service, settings: GatewaySettings) -> None:
    admission = None
    if settings.keys is not None:
        admission = Admission(ApiKeys(Path(settings.keys)), RateLimits(Path(settings.rates)))
    tracing = None if settings.traces is None else Tracing(export_to(settings.traces))
    app = make_app(service, admission, settings.metrics_names, settings.origins, tracing)
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        limit_concurrency=_most_connections(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    server = _Server(config, app.live)
    asyncio.get_running_loop().add_signal_handler(END_SIGNAL, server.end)
    reports = asyncio.create_task(service.answers.report_always())
    leave_imports_alone()
    await server.serve(sockets=[socket.socket(fileno=settings.descriptor)])
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    reports.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reports


def _most_connections() -> int:
    """A request beyond them is answered with 503."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(MOST_CONNECTIONS, descriptors - SPARE_DESCRIPTORS))


class _Server(uvicorn.Server):
    """Ends when the supervisor says so. What service managers send to all processes is not for it."""

    def __init__(self, config: uvicorn.Config, live: LiveFeed) -> None:
        """live: whose streams end with it; those of answers end by themselves."""
        super().__init__(config)
        self._live = live

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self._live.end()
        self.should_exit = True
