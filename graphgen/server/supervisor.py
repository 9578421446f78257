"""The supervisor of a server: starts scheduler, worker and frontend, watches them, and ends them in order.

Owns the decision which death ends the server: that of an engine which has been started again too often. A scheduler
that dies is started anew (the scheduler itself replaces its worker), and clients get an error that says to try again. A
frontend that dies is started anew as often as it takes, with growing waits, while the engine stays as it is. Serves
nothing itself. Called by the command line, in a process of its own whose SIGTERM, SIGINT and SIGHUP it takes.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

import zmq

from graphgen.base.addresses import remove_dead
from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.base.progress import StartProgress
from graphgen.base.signals import EndSignals
from graphgen.gateway.output_parsers.formats import PLAIN, choose_format
from graphgen.gateway.settings import ModelFacts
from graphgen.ipc.channel import Channel
from graphgen.ipc.errors import EngineDeadError
from graphgen.ipc.messages import (
    Drain,
    Drained,
    EngineLost,
    Failed,
    FrontendToSupervisor,
    Listening,
    Notice,
    Progress,
    Ready,
    RequestEnded,
    SupervisorToFrontend,
)
from graphgen.launch.config import EngineConfig, check_device
from graphgen.launch.processes import EngineProcesses
from graphgen.launch.starts import StartLimit
from graphgen.requests.core import describe_start, launch_config, load_config_tokenizer
from graphgen.requests.failures import error_of
from graphgen.requests.tokenizer import write_tokenizer
from graphgen.server.frontend.settings import FrontendSettings
from graphgen.server.gateways import Gateways, private_address
from graphgen.server.kept import Kept
from graphgen.server.options import ServeOptions
from graphgen.server.request_log import RequestLog

logger = logging.getLogger("graphgen.server.supervisor")

FRONTEND_MODULE = "graphgen.server.frontend"
WATCH_S = 0.1
LOST_GRACE_S = 5.0
"""For the frontend to tell clients that the engine is gone."""


class Supervisor:
    """One server, from its start to its end. `say` gets what an operator should see, line by line."""

    def __init__(self, config: EngineConfig, options: ServeOptions, say: Callable[[str], None]) -> None:
        self._config = config
        self._options = options
        self._say = say
        self._started_s = time.monotonic()
        self._signals = EndSignals()
        self._asked_to_end = 0
        self._engine_starts = StartLimit()
        self._engine_is_lost = False  # and is being started again
        self._ready: Ready | None = None
        self._model = ModelFacts(PLAIN, {})
        self._progress = StartProgress(config.progress)
        self._num_lost: int | None = None
        self._listening = False
        self._data, self._control = options.data, options.control_address
        self._keys = options.key_folder
        self._request_log = RequestLog(self._keys)
        self._frontend = Kept("frontend", "its clients have lost their sessions", say)
        self._gateways = Gateways(options, self._model_name, say)

    def run(self) -> int:
        """Serves until a signal: the exit code. Raises GraphgenError when the engine does not start, or dies."""
        check_device(self._config.device)
        raise_descriptor_limit()
        processes = EngineProcesses()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        channel: Channel[SupervisorToFrontend, FrontendToSupervisor] = Channel(
            context, processes.folder, "frontend", "upper", FrontendToSupervisor
        )
        try:
            self._start(processes)
            with self._progress as progress:
                while not self._listening and self._num_lost is None:
                    self._turn(processes, channel, progress.show)
            while self._num_lost is None:
                self._turn(processes, channel, lambda _: None)
            self._gateways.finish(processes)
            return 0 if self._num_lost == 0 else 1
        finally:
            self._signals.ignore()
            self._gateways.close()
            processes.stop(grace_s=0.0)
            channel.close()
            context.term()
            for address in (self._data, self._control):
                remove_dead(address)

    def _start(self, processes: EngineProcesses) -> None:
        """The engine's processes import torch meanwhile."""
        launch = launch_config(self._config)
        launch.write(processes.folder)
        # It binds its sockets at once, so that an address in use is found soon.
        self._frontend.start(partial(self._start_frontend, processes))
        tokenizer = load_config_tokenizer(self._config, launch)
        write_tokenizer(tokenizer, processes.folder)
        if tokenizer is not None:
            parsers = self._options.tool_parser, self._options.reasoning_parser
            output_format = choose_format(
                *parsers, tokenizer.chat_text, tokenizer.added_tokens, tokenizer.response_template
            )
            self._model = ModelFacts(output_format, {**tokenizer.special_tokens, "chat_template": tokenizer.chat_text})

    def _start_frontend(self, processes: EngineProcesses) -> None:
        FrontendSettings(
            model=self._model_name,
            data=self._data,
            control=self._control,
            keys=None if self._keys is None else str(self._keys),
            private=private_address(processes.folder),
            memory_limit_bytes=self._options.memory_limit_mib << 20,
            slow_consumer_s=self._options.slow_consumer_s,
            open_requests=self._options.open_requests,
            log_requests=self._options.log_requests,
        ).write(processes.folder)
        processes.start(FRONTEND_MODULE)

    @property
    def _model_name(self) -> str:
        return self._config.model or "demo"

    def _turn(
        self,
        processes: EngineProcesses,
        channel: Channel[SupervisorToFrontend, FrontendToSupervisor],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """One look at messages, signals and processes."""
        message = channel.receive(WATCH_S)
        if message is not None:
            self._take(message, processes, on_progress)
        self._pass_signals_on(processes, channel)
        if self._num_lost is not None:
            return
        self._watch_engine(processes, channel)
        self._watch_frontend(processes)
        self._gateways.restore(processes, self._model)
        if not self._listening and time.monotonic() - self._started_s > self._config.start_timeout_s:
            tails = "\n".join(f"[{name}]\n{processes.log_tail(name)}" for name in processes.pids)
            raise EngineDeadError(
                f"the server was not ready after {self._config.start_timeout_s:g} s: raise start_timeout_s, or see what"
                f" its processes wrote:\n{tails}"
            )

    def _take(
        self, message: FrontendToSupervisor, processes: EngineProcesses, on_progress: Callable[[Progress], None]
    ) -> None:
        match message:
            case Progress():
                on_progress(message)
            case Ready():
                self._ready = message
                if self._engine_is_lost:
                    self._engine_is_lost = False
                    self._say("the engine serves again")
            case Notice():
                self._say(message.text)
            case Listening():
                self._tell_ready(message, processes)
            case Drained():
                self._num_lost = message.num_lost
            case RequestEnded():
                self._request_log.write(message)
            case Failed():
                if not self._listening:  # a start that cannot succeed, by the name that its error has
                    raise error_of(message)
                logger.error("the frontend failed with %s: %s", message.error, message.message)

    def _tell_ready(self, where: Listening, processes: EngineProcesses) -> None:
        again, self._listening = self._listening, True
        self._data, self._control = where.data, where.control  # a frontend that is started anew has the same ports
        if again:
            self._say("the frontend serves again")
            return
        assert self._ready is not None, "the frontend serves after the engine"
        self._say(
            describe_start(self._ready, time.monotonic() - self._started_s, with_phases=self._progress.shows_bars)
        )
        self._say(f"listening on {where.data} (data)\nlistening on {where.control} (control)")
        self._say(
            "no keys: who can connect may" if self._keys is None else f"only CURVE keys of {self._keys} may connect"
        )
        self._gateways.start(processes, self._model)
        self._say("ready")

    def _pass_signals_on(
        self, processes: EngineProcesses, channel: Channel[SupervisorToFrontend, FrontendToSupervisor]
    ) -> None:
        if self._signals.num_wishes == self._asked_to_end:
            return
        self._asked_to_end = self._signals.num_wishes
        if not self._listening:
            self._num_lost = 0
        elif self._asked_to_end == 1:
            self._say(f"draining: open requests have {self._options.grace_s:g} s; a second signal ends them now")
            channel.send(Drain(self._options.grace_s))
        else:
            channel.send(Drain(0.0))

    def _watch_engine(
        self, processes: EngineProcesses, channel: Channel[SupervisorToFrontend, FrontendToSupervisor]
    ) -> None:
        found = processes.find_exit(("scheduler",))
        if found is None:
            return
        reason = f"the engine ended: the {found.name} exited with code {found.code}"
        if self._listening and not self._asked_to_end and self._engine_starts.take(time.monotonic()):
            logger.error("%s", found)
            self._say(f"{reason}, and is started again; requests that were open get an error that says to try again")
            channel.send(EngineLost(reason, restarts=True))
            self._engine_is_lost = True
            processes.restart_scheduler()
            return
        if self._listening:
            channel.send(EngineLost(reason))
            deadline_s = time.monotonic() + LOST_GRACE_S
            while time.monotonic() < deadline_s and not isinstance(channel.receive(WATCH_S), Drained):
                pass
        else:
            self._raise_reason(channel)
        raise EngineDeadError(str(found))

    def _raise_reason(self, channel: Channel[SupervisorToFrontend, FrontendToSupervisor]) -> None:
        """A process that ends on an error says so first, through the frontend: its word is better than an exit code."""
        deadline_s = time.monotonic() + 3 * WATCH_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = channel.receive(left_s)
            if isinstance(message, Failed):
                raise error_of(message)

    def _watch_frontend(self, processes: EngineProcesses) -> None:
        """One that ends before it has ever served ends the server."""
        found = processes.find_exit(("frontend",))
        if found is None:
            return
        if self._asked_to_end:
            self._num_lost = 1
            return
        if not self._listening:
            logger.error("%s", found)
            raise EngineDeadError(str(found))
        self._frontend.restore(found, partial(self._start_frontend, processes))
