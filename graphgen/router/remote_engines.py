"""Engines that are servers elsewhere: how each is reached, and that all of them serve one thing.

Owns what is known of those that were admitted. Makes the links to them, for `graphgen.router.links`. Used by the
frontend of `graphgen serve --engines`.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import zmq.auth
from msgspec import Struct

from graphgen.base.addresses import check_connectable
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import MAJOR, Welcome
from graphgen.remote.address import ServerAddress
from graphgen.router.engine_link import EngineLink, LinkPlace, MakeLink
from graphgen.router.remote_link import RemoteLink

OWN_KEY = "frontend.key_secret"
SERVER_KEY = "server.key"


class Model(Struct, frozen=True):
    """What all engines have to serve."""

    name: str  # a folder's last part, or a name's
    vocab_size: int
    eos_token_ids: frozenset[int]
    context_len: int


class RemoteEngines:
    """Any thread may call it: each link admits its engine on its own."""

    def __init__(
        self, model: Model, keys: Path | None, after_outputs: Callable[[], None] | None, takes_any_context: bool
    ) -> None:
        """model: what this frontend tokenizes for. keys: the folder of `--engine-keys`; None: without CURVE.
        takes_any_context: until `settle` an engine with a shorter context is admitted too."""
        self._model = model
        self._keys = keys
        self._after_outputs = after_outputs
        self._takes_any_context = takes_any_context
        self._lock = threading.Lock()
        self._instances: dict[str, str] = {}  # by address: which run of a server is there
        self._contexts: dict[str, int] = {}

    def maker(self, address: str) -> MakeLink:
        """What makes the link to a server. Raises ConfigError for an address or keys that cannot work."""
        check_connectable(address)
        server = server_address(address, self._keys)
        return partial(self._make, server)

    def _make(self, server: ServerAddress, place: LinkPlace) -> EngineLink:
        return RemoteLink(server, place, partial(self.admit, server.address), self._after_outputs)

    def settle(self) -> int:
        """The shortest context of all engines so far and of the frontend's own model, which later ones must have."""
        with self._lock:
            self._takes_any_context = False
            context_len = min([self._model.context_len, *self._contexts.values()])
            self._model = Model(self._model.name, self._model.vocab_size, self._model.eos_token_ids, context_len)
        return context_len

    def forget(self, address: str) -> None:
        """It is none of the engines any more."""
        with self._lock:
            self._instances.pop(address, None)
            self._contexts.pop(address, None)

    def admit(self, address: str, welcome: Welcome) -> None:
        """Raises ConfigError for a server that cannot be one of these engines, with what differs."""
        model = self._model
        found = Model(
            model_name(welcome.model),
            welcome.vocab_size,
            frozenset(welcome.eos_token_ids),
            welcome.limits.prompt_tokens,
        )
        for what, theirs, ours in (
            ("the version of the protocol", welcome.version, MAJOR),
            ("the model", found.name, model.name),
            ("the size of the vocabulary", found.vocab_size, model.vocab_size),
            ("the end-of-sequence tokens", sorted(found.eos_token_ids), sorted(model.eos_token_ids)),
        ):
            if theirs != ours:
                raise ConfigError(
                    f"the engine {address} is none of this frontend's: {what} there is {theirs!r}, here {ours!r}: give"
                    " engines that serve the model of this frontend"
                )
        if "elsewhere" in welcome.features:  # requests could go round for ever, through this frontend itself
            raise ConfigError(
                f"the engine {address} is a frontend whose engines are elsewhere, as this one is: give the addresses of"
                " the engines themselves"
            )
        if "routed" not in welcome.features:
            raise ConfigError(
                f"the engine {address} ({welcome.server}) does not let this frontend route requests of others: let its"
                " key do so there with `graphgen keys allow NAME KEY --routes`, or start a later version of graphgen"
            )
        with self._lock:
            if not self._takes_any_context and found.context_len < model.context_len:
                raise ConfigError(
                    f"the engine {address} has a context of {found.context_len} tokens, this frontend serves"
                    f" {model.context_len}: start the engine, or the frontend, with another max_model_len"
                )
            for other, instance in self._instances.items():
                if instance == welcome.instance and other != address:
                    raise ConfigError(f"{address} and {other} are one server: name each engine once")
            self._instances[address] = welcome.instance
            self._contexts[address] = found.context_len


def model_name(model: str) -> str:
    """What a model is called wherever its folder lies."""
    return model.rstrip("/").rpartition("/")[2]


def server_address(address: str, keys: Path | None) -> ServerAddress:
    """With the keys of a folder: the frontend's own, and the server's public one. Raises ConfigError."""
    if keys is None:
        return ServerAddress(address=address)
    own = next((path for path in (keys / OWN_KEY, keys / "clients" / OWN_KEY) if path.exists()), None)
    if own is None:
        raise ConfigError(
            f"there is no {OWN_KEY} in {keys}: make one with `graphgen keys new frontend --routes` on an engine, and"
            f" copy it here with that engine's {SERVER_KEY}"
        )
    servers = [keys / name for name in (f"{address.partition('://')[2].replace(':', '_')}.key", SERVER_KEY)]
    public = next((path for path in servers if path.exists()), None)
    if public is None:
        raise ConfigError(f"there is no key of the engine {address} in {keys}: copy its {SERVER_KEY} there")
    try:
        server_key = zmq.auth.load_certificate(public)[0].decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{public} cannot be read ({error}): copy the engine's {SERVER_KEY} there") from None
    return ServerAddress(address=address, server_key=server_key, key_file=own)
