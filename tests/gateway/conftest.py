"""One server of the demo model for the tests of unchanged clients."""

from collections.abc import Iterator

import pytest

from graphgen import Client
from tests.serving import ServerProcess, serving

HTTP = ("--http", "127.0.0.1:0", "--served-model-name", "play")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server"), *HTTP) as server:
        yield server


@pytest.fixture(scope="session")
def ours(server: ServerProcess) -> Iterator[Client]:
    """The same server over its own protocol."""
    with Client(server.address) as ours:
        yield ours
