"""The supervisor of a server: starts schedulers and frontends, watches them, and ends them in order.

Owns the decision which death ends the server: that of the last engine which has been started again too often. A
scheduler that dies is started anew (the scheduler itself replaces its worker); with several engines its requests go on
at others, of the only one clients get an error that says to try again. A
frontend that dies is started anew as often as it takes, with growing waits, while the engine stays as it is. Serves
nothing itself. Called by the command line, in a process of its own whose SIGTERM, SIGINT and SIGHUP it takes.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import zmq
from msgspec import Struct

from graphgen.base.addresses import check_free, remove_dead
from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.base.progress import StartProgress
from graphgen.base.signals import EndSignals
from graphgen.gateway.output_parsers.formats import PLAIN, choose_format
from graphgen.gateway.settings import ModelFacts
from graphgen.ipc.engine_messages import Notice, Ready
from graphgen.ipc.errors import EngineDeadError
from graphgen.ipc.server_messages import (
    Drain,
    Drained,
    DrainEngine,
    EngineAway,
    EngineDrained,
    EngineLost,
    EngineServes,
    ExpectEngine,
    FrontendToSupervisor,
    Listening,
    RequestEnded,
)
from graphgen.ipc.worker_messages import Failed, Progress
from graphgen.launch.config import EngineConfig
from graphgen.launch.engines import Engines
from graphgen.launch.processes import SCHEDULER_MODULE, EngineProcesses
from graphgen.launch.replicas import check_devices, of_frontend, of_replica
from graphgen.requests.core import describe_start, launch_config, load_config_tokenizer
from graphgen.requests.failures import error_of
from graphgen.requests.tokenizer import write_tokenizer
from graphgen.server.engines_elsewhere import EnginesElsewhere
from graphgen.server.frontends import Frontends
from graphgen.server.gateways import Gateways
from graphgen.server.operator import EngineState, OperatorSocket, Told, Wish
from graphgen.server.options import ServeOptions
from graphgen.server.request_log import RequestLog

logger = logging.getLogger("graphgen.server.supervisor")

WATCH_S = 0.1
LOST_GRACE_S = 5.0
"""For the frontend to tell clients that the engine is gone."""
FORCED_END_S = 5.0
"""Beyond the time that open requests have to finish: a frontend that has not drained by then is killed."""


class _Drain(NamedTuple):
    """An engine drains: until when, and which frontends have not said yet that nothing of theirs is open there."""

    by_s: float
    left: set[int]


class ServerPlace(Struct, frozen=True):
    """Where a server that is ready is found: by clients, and in its folder by operators."""

    data: tuple[str, ...]  # of each frontend
    control: tuple[str, ...]
    folder: str
    num_slots: int  # requests that run at a time at its engine, of several at the one with the fewest slots


class Supervisor:
    """One server, from its start to its end. `say` gets what an operator should see, line by line."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServeOptions,
        say: Callable[[str], None],
        on_ready: Callable[[ServerPlace], None] = lambda place: None,
    ) -> None:
        self._config = config
        self._options = options
        self._say = say
        self._on_ready = on_ready
        self._started_s = time.monotonic()
        self._signals = EndSignals()
        self._asked_to_end = 0
        self._end_by_s = math.inf  # when frontends that have been told to drain and have not are killed
        self._ready: Ready | None = None
        self._states: list[EngineState] = []  # of each engine, "serving" from when the server listens
        self._drains: dict[int, _Drain] = {}  # of engines that drain
        self._model = ModelFacts(PLAIN, {})
        self._progress = StartProgress(config.progress)
        self._num_lost: int | None = None
        self._elsewhere: EnginesElsewhere | None = None
        self._keys = options.key_folder
        self._request_log = RequestLog(self._keys)
        self._gateways = Gateways(options, self._model_name, say)

    def run(self) -> int:
        """Serves until a signal: the exit code. Raises GraphgenError when the engine does not start, or dies."""
        is_elsewhere = bool(self._options.engine_addresses)
        if not is_elsewhere:
            check_devices(self._config)
        self._states = ["serving"] * self._config.replicas
        raise_descriptor_limit()
        check_free(address for both in self._options.addresses for address in both)
        ranks, senders = self._config.tensor_parallel, self._options.frontends
        modules = () if is_elsewhere else (SCHEDULER_MODULE,)
        engines = Engines(
            self._config.replicas, partial(EngineProcesses, modules, num_ranks=ranks, num_senders=senders)
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        frontends = Frontends(context, self._options, self._model_name, list(engines), self._say)
        operator = OperatorSocket(context, engines[0].folder)
        if is_elsewhere:
            self._elsewhere = EnginesElsewhere(self._options.engine_addresses, frontends.tell, self._say)
            frontends.elsewhere = self._elsewhere.addresses
        try:
            self._start(engines, frontends)
            with self._progress as progress:
                while not frontends.have_listened and self._num_lost is None:
                    self._turn(engines, frontends, operator, progress.show)
            while self._num_lost is None:
                self._turn(engines, frontends, operator, lambda _: None)
            self._gateways.finish(engines[0])
            return 0 if self._num_lost == 0 else 1
        finally:
            self._signals.ignore()
            self._gateways.close()
            engines.stop(grace_s=0.0)
            frontends.close()
            operator.close()
            context.term()
            for one in frontends:
                remove_dead(one.data)
                remove_dead(one.control)

    def _start(self, engines: Engines, frontends: Frontends) -> None:
        """The engines' processes import torch meanwhile."""
        config = of_frontend(self._config) if self._options.engine_addresses else self._config
        launch = launch_config(config)
        for number, processes in enumerate(engines):
            of_replica(launch, number, len(engines)).write(processes.folder)
        frontends.start()
        tokenizer = load_config_tokenizer(self._config, launch)
        for processes in engines:
            write_tokenizer(tokenizer, processes.folder)
        if tokenizer is not None:
            parsers = self._options.tool_parser, self._options.reasoning_parser
            output_format = choose_format(
                *parsers, tokenizer.chat_text, tokenizer.added_tokens, tokenizer.response_template
            )
            self._model = ModelFacts(output_format, {**tokenizer.special_tokens, "chat_template": tokenizer.chat_text})

    @property
    def _model_name(self) -> str:
        return self._config.model or "demo"

    def _turn(
        self,
        engines: Engines,
        frontends: Frontends,
        operator: OperatorSocket,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """One look at messages, signals and processes."""
        for number, message in frontends.receive(WATCH_S):
            self._take(number, message, engines, frontends, on_progress)
        self._pass_signals_on(frontends)
        if frontends.have_listened:
            operator.serve(lambda wish: self._fulfil(wish, engines, frontends))
        self._end_silent(frontends)
        if self._num_lost is not None:
            return
        if self._elsewhere is None:
            self._watch_engines(engines, frontends)
        self._watch_frontends(engines, frontends)
        self._gateways.restore(engines[0], self._model)
        if not frontends.have_listened and time.monotonic() - self._started_s > self._config.start_timeout_s:
            raise EngineDeadError(
                f"the server was not ready after {self._config.start_timeout_s:g} s: raise start_timeout_s, or see what"
                f" its processes wrote:\n{engines.log_tails()}"
            )

    def _take(
        self,
        number: int,
        message: FrontendToSupervisor,
        engines: Engines,
        frontends: Frontends,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """number: of the frontend that says it."""
        match message:
            case Progress():
                if number == frontends.speaker:
                    on_progress(message)
            case Ready():
                self._ready = message
            case EngineServes() | EngineAway() | EngineDrained() if self._elsewhere is not None:
                self._elsewhere.take(message)
            case EngineServes():
                self._take_serving(message, engines)
            case EngineDrained():
                self._take_drained(number, message, engines, frontends)
            case Notice():
                if number == frontends.speaker:
                    self._say(message.text)
            case Listening():
                self._take_listening(number, message, engines, frontends)
            case Drained():
                frontends[number].num_lost = message.num_lost
                self._num_lost = frontends.num_lost
            case RequestEnded():
                self._request_log.write(message)
            case Failed():
                frontends[number].has_failed = True
                if not frontends.have_listened:  # a start that cannot succeed, by the name that its error has
                    raise error_of(message)
                logger.error("the %s failed with %s: %s", frontends[number].name, message.error, message.message)

    def _take_listening(self, number: int, where: Listening, engines: Engines, frontends: Frontends) -> None:
        if frontends.listen(number, where):
            self._say(f"the {frontends[number].name} serves again")
            for engine, drain in self._drains.items():  # it has not been told, or has forgotten
                drain.left.add(number)
                frontends[number].channel.send(DrainEngine(engine, max(0.0, drain.by_s - time.monotonic())))
            if self._elsewhere is not None:
                self._elsewhere.begin_again()
        elif frontends.have_listened:
            self._tell_ready(engines, frontends)

    def _take_serving(self, serves: EngineServes, engines: Engines) -> None:
        """The first frontend that says it is believed."""
        if self._states[serves.engine] in ("starting", "ended"):
            engines.serves(serves.engine)
            self._states[serves.engine] = "serving"
            self._say(f"{_name(engines, serves.engine)} serves again")

    def _take_drained(self, number: int, drained: EngineDrained, engines: Engines, frontends: Frontends) -> None:
        """An engine has drained when all frontends say so; one that cannot drain it, for want of others, keeps it."""
        drain, name = self._drains.get(drained.engine), _name(engines, drained.engine)
        if drain is None:
            if self._states[drained.engine] != "drained" and not drained.error:
                frontends[number].channel.send(ExpectEngine(drained.engine))  # it was kept meanwhile
            return
        if drained.error:
            self._say(f"{name} does not drain: {drained.error}")
            self._states[drained.engine] = "serving"
            del self._drains[drained.engine]
            if len(frontends) > 1:
                frontends.tell(ExpectEngine(drained.engine))
            return
        drain.left.discard(number)
        if not drain.left:
            del self._drains[drained.engine]
            self._say(f"{name} has drained, and ends")
            engines.rest(drained.engine)
            self._states[drained.engine] = "drained"

    def _fulfil(self, wish: Wish, engines: Engines, frontends: Frontends) -> Told:
        """What an operator asks for."""
        if self._elsewhere is not None:
            return self._elsewhere.fulfil(wish)
        error = self._why_not(wish, len(engines))
        if not error and wish.action == "drain":
            self._say(f"engine {wish.engine} drains; what is open there after {wish.grace_s:g} s goes on elsewhere")
            self._states[wish.engine] = "draining"
            self._drains[wish.engine] = _Drain(time.monotonic() + wish.grace_s, set(range(len(frontends))))
            frontends.tell(DrainEngine(wish.engine, wish.grace_s))
        if not error and wish.action == "resume":
            self._say(f"engine {wish.engine} is started again")
            self._states[wish.engine] = "starting"
            frontends.tell(ExpectEngine(wish.engine))
            engines.wake(wish.engine)
        drained = (number for number, state in enumerate(self._states) if state == "drained")
        still_ending = {number for number in drained if not engines.is_at_rest(number)}
        states = tuple("draining" if one in still_ending else state for one, state in enumerate(self._states))
        return Told(states, error)

    def _why_not(self, wish: Wish, count: int) -> str:
        """Why a wish cannot be fulfilled; "" if it can."""
        if wish.action == "show":
            return ""
        if wish.action in ("add", "remove"):
            return "the engines of this server are its own: `graphgen serve --engines` takes others"
        if not 0 <= wish.engine < count:
            return f"there is no engine {wish.engine}: they are 0 to {count - 1}"
        state = self._states[wish.engine]
        if wish.action == "resume":
            return "" if state in ("drained", "ended") else f"engine {wish.engine} is {state}: it needs no resume"
        if state != "serving":
            return f"engine {wish.engine} is {state}: only one that serves can drain"
        if self._states.count("serving") < 2:
            return f"engine {wish.engine} is the only one that serves: let another one serve first"
        return ""

    def _tell_ready(self, engines: Engines, frontends: Frontends) -> None:
        assert self._ready is not None, "a frontend serves after the engine"
        start_s, elsewhere = time.monotonic() - self._started_s, self._options.engine_addresses
        if elsewhere:
            self._say(f"graphgen serves over {len(elsewhere)} engines, {', '.join(elsewhere)}, after {start_s:.2f} s")
        else:
            self._say(describe_start(self._ready, start_s, with_phases=self._progress.shows_bars))
        for one in frontends:
            self._say(f"listening on {one.data} (data)\nlistening on {one.control} (control)")
        self._say(
            "no keys: who can connect may" if self._keys is None else f"only CURVE keys of {self._keys} may connect"
        )
        self._gateways.start(engines[0], self._model)
        if elsewhere:
            self._say(f"`graphgen replicas --server {engines[0].folder}` drains engines, adds and removes them")
        elif len(engines) > 1:
            self._say(f"`graphgen replicas --server {engines[0].folder}` drains engines and starts them again")
        self._on_ready(
            ServerPlace(
                tuple(one.data for one in frontends),
                tuple(one.control for one in frontends),
                str(engines[0].folder),
                self._ready.num_slots,
            )
        )
        self._say("ready")

    def _pass_signals_on(self, frontends: Frontends) -> None:
        if self._signals.num_wishes == self._asked_to_end:
            return
        self._asked_to_end = self._signals.num_wishes
        if not frontends.have_listened:
            self._num_lost = 0
        elif self._asked_to_end == 1:
            self._say(f"draining: open requests have {self._options.grace_s:g} s; a second signal ends them now")
            self._drain(frontends, self._options.grace_s)
        else:
            self._drain(frontends, 0.0)

    def _drain(self, frontends: Frontends, grace_s: float) -> None:
        frontends.tell(Drain(grace_s))
        self._end_by_s = min(self._end_by_s, time.monotonic() + grace_s + FORCED_END_S)

    def _end_silent(self, frontends: Frontends) -> None:
        """Those that had time enough to drain, and do not answer."""
        if time.monotonic() >= self._end_by_s and self._num_lost is None:
            for name in frontends.kill_undrained():
                logger.error(
                    "the %s has not drained %g s after the time that open requests had, and is killed",
                    name,
                    FORCED_END_S,
                )
            self._num_lost = frontends.num_lost

    def _watch_engines(self, engines: Engines, frontends: Frontends) -> None:
        for end in engines.look(may_restart=frontends.have_listened and not self._asked_to_end):
            logger.error("%s", end.found)
            if not frontends.have_listened:
                self._raise_reason(frontends)
                raise EngineDeadError(str(end.found))
            name = _name(engines, end.number)
            reason = f"{name} ended: the {end.found.name} exited with code {end.found.code}"
            is_last = engines.num_kept == 0
            self._states[end.number] = "starting" if end.restarts else "ended"
            frontends.tell(EngineLost(reason, end.restarts, end.number, is_last))
            if end.restarts and len(engines) == 1:
                self._say(f"{reason}, and is started again; open requests get an error that says to try again")
            elif end.restarts:
                self._say(f"{reason}, and is started again; its requests go on at others")
            elif not is_last:
                self._say(f"{reason}, and is not started again now; its requests go on at others")
            else:
                self._await_end(frontends)
                raise EngineDeadError(str(end.found))

    def _await_end(self, frontends: Frontends) -> None:
        """Of the frontends, which tell their clients that nothing is left."""
        deadline_s = time.monotonic() + LOST_GRACE_S
        while time.monotonic() < deadline_s and frontends.num_lost is None:
            for number, message in frontends.receive(WATCH_S):
                if isinstance(message, Drained):
                    frontends[number].num_lost = message.num_lost

    def _raise_reason(self, frontends: Frontends) -> None:
        """A process that ends on an error says so first, through a frontend: its word is better than an exit code."""
        deadline_s = time.monotonic() + 3 * WATCH_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            for _, message in frontends.receive(left_s):
                if isinstance(message, Failed):
                    raise error_of(message)

    def _watch_frontends(self, engines: Engines, frontends: Frontends) -> None:
        """One that ends before it has ever served ends the server."""
        for number, found in frontends.find_exits():
            for message in frontends.last_words(number, found):
                self._take(number, message, engines, frontends)
            if frontends[number].num_lost is not None:
                continue
            if self._asked_to_end:
                frontends[number].num_lost = 1
                self._num_lost = frontends.num_lost
            elif not frontends.have_listened:
                logger.error("%s", found)
                raise EngineDeadError(str(found))
            else:
                frontends.restore(number, found)


def _name(engines: Engines, number: int) -> str:
    """What an operator calls an engine."""
    return "the engine" if len(engines) == 1 else f"engine {number}"
