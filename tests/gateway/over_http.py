"""The gateway's application behind a real socket, in a thread of the test."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from graphgen.gateway.app import make_app
from graphgen.gateway.protocol import LimitedProtocol
from graphgen.gateway.service import Service


@contextlib.contextmanager
def serving_http(service: Service) -> Iterator[int]:
    """The port."""
    config = uvicorn.Config(make_app(service), http=LimitedProtocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
