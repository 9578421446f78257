"""The gateways of a server: processes that speak HTTP, all on one address, spread over the frontends.

Owns their listening sockets, which stay open while a gateway is started again, and their starts and ends. Used by the
supervisor, on its loop.
"""

from collections.abc import Callable
from functools import partial

from graphgen.gateway.settings import END_SIGNAL, GatewaySettings, ModelFacts, settings_file
from graphgen.launch.processes import EngineProcesses
from graphgen.server.frontends import private_address
from graphgen.server.http_address import check_tls, check_traces, listen, url_of
from graphgen.server.kept import Kept
from graphgen.server.options import ServeOptions

MODULE = "graphgen.gateway"
END_S = 2.0
"""For a gateway to send the last of its answers, whose tokens it has."""


class Gateways:
    """None where no HTTP was asked for."""

    def __init__(self, options: ServeOptions, model_name: str, say: Callable[[str], None]) -> None:
        """Raises ConfigError where the address of HTTP cannot be bound, for files by which no TLS can be spoken, and
        where spans cannot be sent."""
        check_tls(options.http_cert, options.http_key)
        check_traces(options.http_traces)
        self._options = options
        self._model_name = options.served_model_name or model_name
        self._say = say
        self._keys = options.http_key_folder
        self._listeners = [] if options.http is None else listen(options.http, options.http_workers)
        count = len(self._listeners)
        self._kept = [
            Kept(f"gateway{f' {number}' if count > 1 else ''}", "HTTP answers that were open in it have ended", say)
            for number in range(count)
        ]

    def start(self, processes: EngineProcesses, model: ModelFacts) -> None:
        """Starts all of them, and says where they listen. model: which it serves."""
        for number, kept in enumerate(self._kept):
            kept.start(partial(self._start_one, processes, model, number))
        if self._listeners:
            self._say(f"listening on {url_of(self._listeners[0], self._options.has_tls)} (OpenAI's API)")
            self._say("no API keys: who can connect may" if self._keys is None else f"only keys of {self._keys} may")

    def restore(self, processes: EngineProcesses, model: ModelFacts) -> None:
        """Starts those again that have ended."""
        for number, kept in enumerate(self._kept):
            found = processes.find_exit((_name(number),))
            if found is not None:
                kept.restore(found, partial(self._start_one, processes, model, number))

    def finish(self, processes: EngineProcesses) -> None:
        """Ends them when their last answers have left."""
        processes.finish([_name(number) for number in range(len(self._kept))], END_SIGNAL, END_S)

    def close(self) -> None:
        """From here on nobody can connect."""
        for listener in self._listeners:
            listener.close()

    def _start_one(self, processes: EngineProcesses, model: ModelFacts, number: int) -> None:
        options, descriptor = self._options, self._listeners[number].fileno()
        frontends = [private_address(processes.folder, one) for one in range(options.frontends)]
        GatewaySettings(
            descriptor=descriptor,
            frontend=frontends[number % len(frontends)],
            other_frontends=tuple(one for one in frontends if one != frontends[number % len(frontends)]),
            model_names=(self._model_name,),
            model=model,
            keys=None if self._keys is None else str(self._keys),
            metrics_names=options.metrics_names,
            rates=str(processes.folder / "rates"),
            memory_limit_bytes=options.memory_limit_mib << 20,
            open_requests=options.open_requests,
            origins=options.origins,
            certificate=options.http_cert,
            private_key=options.http_key,
            traces=options.http_traces,
        ).write(settings_file(processes.folder, number))
        processes.start(MODULE, descriptors=(descriptor,), number=number)


def _name(number: int) -> str:
    return f"gateway-{number}"
