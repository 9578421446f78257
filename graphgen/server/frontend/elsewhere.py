"""Engines of a frontend that are servers elsewhere: they are connected before the frontend serves, and come and go.

Owns what is known of them in this process. The links do the rest: `graphgen.router.remote_link`. Used by the frontend's
process, and on the server's loop.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.server_messages import EngineAway, EngineServes, FrontendToSupervisor
from graphgen.launch.launch_config import LaunchConfig
from graphgen.requests.core import end_token_ids
from graphgen.requests.tokenizer import Tokenizer
from graphgen.router.links import Links
from graphgen.router.remote_engines import Model, RemoteEngines, model_name
from graphgen.server.frontend.settings import FrontendSettings

CONNECT_S = 10.0
"""An engine that does not answer for so long at the first start keeps the server from starting."""


class Elsewhere:
    """The engines of `graphgen serve --engines`, by number."""

    def __init__(
        self,
        settings: FrontendSettings,
        launch: LaunchConfig,
        tokenizer: Tokenizer | None,
        tell: Callable[[FrontendToSupervisor], None],
        after_outputs: Callable[[], None],
    ) -> None:
        """Begins to connect to all of them. tell: to the supervisor. Raises ConfigError for addresses and keys that
        cannot work."""
        model = Model(
            model_name(settings.model),
            launch.spec.vocab_size,
            frozenset(end_token_ids(launch, tokenizer)),
            launch.max_model_len,
        )
        keys = None if settings.engine_keys is None else Path(settings.engine_keys)
        self._tell = tell
        self._engines = RemoteEngines(model, keys, after_outputs, takes_any_context=True)
        self._addresses: dict[int, str] = {}
        self.links = Links([], tell, routes=True)
        try:
            for number, address in settings.elsewhere or ():
                self._addresses[number] = address
                self.links.add(number, self._engines.maker(address))
        except BaseException:
            self.links.close()
            raise
        self._launch = launch
        self._awaits_all = settings.awaits_all

    def wait_ready(self) -> Ready:
        """At the first start when all serve, later when one does. Raises ConfigError for a server that does not serve
        what the frontend does, ConnectionLostError for one that is not there."""
        if self._awaits_all:
            return self.links.wait_ready(CONNECT_S)
        return self.links.wait_ready(threading.TIMEOUT_MAX, 1)

    def settle(self) -> LaunchConfig:
        """With the context that all engines have, which later ones must have. Called once they serve."""
        return msgspec.structs.replace(self._launch, max_model_len=self._engines.settle())

    def tell_serving(self) -> None:
        """Which engines serve, to the supervisor: it may have heard otherwise of an earlier frontend."""
        for number in self._addresses:
            if self.links.serves(number):
                self._tell(EngineServes(number))

    def add(self, number: int, address: str) -> None:
        """Another engine, or one that has drained and is to serve again."""
        try:
            if number in self.links:
                self.links.expect(number)
            else:
                make = self._engines.maker(address)
                self._addresses[number] = address
                self.links.add(number, make)
        except ConfigError as error:
            self._tell(EngineAway(number, str(error), is_refused=True))

    def remove(self, number: int) -> None:
        """One at which nothing is open."""
        if number in self.links:
            self.links.remove(number)
            self._engines.forget(self._addresses.pop(number))
