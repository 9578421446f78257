"""The engines of one router: which are there, what state each is in, and which of them get new requests.

Owns the engines' states; moves no request. Called by `graphgen.router.policy`, read by `graphgen.router.choosing`.
"""

from collections.abc import Iterator

from graphgen.ipc.reports import EngineReport
from graphgen.router.load import FALLBACK_OUTPUT_S, FALLBACK_PROMPT_S, EngineLoad, Speeds
from graphgen.router.prefix_index import PrefixIndex
from graphgen.router.records import Capacity, EngineStatus, RouterSettings

WARM_DIVISOR = 2
"""An engine is warm when it keeps this part of what engines keep on average, or of what it can hold."""


class Fleet:
    """All engines, by id and by number: numbers are small, and are used again."""

    def __init__(self, settings: RouterSettings, index: PrefixIndex) -> None:
        self._settings = settings
        self._index = index
        self._engines: dict[str, EngineLoad] = {}
        self._last_speeds = Speeds(FALLBACK_PROMPT_S, FALLBACK_OUTPUT_S, 0.0, False)
        self.by_number: dict[int, EngineLoad] = {}
        self.eligible: list[EngineLoad] = []
        """Those that get new requests: all that serve and do not drain; if none does, suspects."""
        self.eligible_mask = 0
        self.warming: list[EngineLoad] = []
        """Of these: those that keep little yet."""

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[EngineLoad]:
        return iter(self._engines.values())

    def find(self, engine_id: str) -> EngineLoad:
        """Raises KeyError for an engine that is not there."""
        try:
            return self._engines[engine_id]
        except KeyError:
            known = ", ".join(self._engines) or "none"
            raise KeyError(f"there is no engine {engine_id}: those that joined and have not left are {known}") from None

    def join(self, engine_id: str, capacity: Capacity, epoch: int, now_s: float) -> None:
        if engine_id in self._engines:
            raise ValueError(f"engine {engine_id} is there already: give each engine an id of its own")
        number = next(number for number in range(len(self.by_number) + 1) if number not in self.by_number)
        engine = EngineLoad(engine_id, number, capacity, epoch, self._last_speeds, now_s)
        self._engines[engine_id] = self.by_number[number] = engine
        self._index.join(number, capacity.num_pages)
        self._list()

    def leave(self, engine: EngineLoad) -> None:
        self._index.leave(engine.number)
        del self._engines[engine.engine_id], self.by_number[engine.number]
        self._list()

    def drain(self, engine: EngineLoad, is_draining: bool) -> None:
        engine.is_draining = is_draining
        self._list()

    def set_status(self, engine: EngineLoad, status: EngineStatus, now_s: float) -> None:
        if status != engine.status:
            engine.status = status
            engine.status_s = now_s
            self._list()

    def take_report(self, engine: EngineLoad, report: EngineReport, now_s: float) -> None:
        """What it says of itself; its epoch is that of its state."""
        has_stepped = report.num_steps != engine.num_steps or not report.num_open
        engine.take_report(report)
        engine.heard_s = now_s
        if has_stepped:
            engine.num_steps = report.num_steps
            engine.stepped_s = now_s
        if report.prompt_token_s > 0.0 and report.output_token_s > 0.0:
            engine.speeds = Speeds(report.prompt_token_s, report.output_token_s, report.step_s, True)
            self._last_speeds = Speeds(report.prompt_token_s, report.output_token_s, report.step_s, False)
        if not report.is_serving:
            self.set_status(engine, "paused", now_s)
        elif engine.status == "paused" or has_stepped:
            engine.stepped_s = now_s
            self.set_status(engine, "serving", now_s)

    def heard(self, engine: EngineLoad, now_s: float) -> None:
        """Tokens came from it."""
        engine.heard_s = engine.stepped_s = max(engine.heard_s, now_s)
        if engine.status == "suspect":
            self.set_status(engine, "serving", now_s)

    def begin_epoch(self, engine: EngineLoad, epoch: int) -> None:
        """It keeps nothing of what it had."""
        engine.epoch = epoch
        engine.is_warming = True
        self._index.empty(engine.number)
        self._list()

    def note_warmth(self, engine: EngineLoad) -> None:
        """It was sent a prompt: it may be as warm as others by now."""
        if not engine.is_warming:
            return
        num_pages = self._index.num_pages(engine.number)
        others = self._index.num_pairs / len(self._engines)
        if num_pages * WARM_DIVISOR >= min(others, engine.capacity.num_pages):
            engine.is_warming = False
            self.warming = [one for one in self.warming if one is not engine]

    def find_suspects(self, now_s: float) -> None:
        """An engine that was heard before and says nothing, or that has requests and runs no step, is suspect."""
        for engine in self:
            report = engine.report
            if engine.status != "serving" or report is None:
                continue
            is_silent = now_s - engine.heard_s > self._settings.silent_s
            is_stuck = report.num_open > 0 and now_s - engine.stepped_s > self._settings.stuck_s
            if is_silent or is_stuck:
                self.set_status(engine, "suspect", now_s)

    def gives_up(self, engine: EngineLoad, now_s: float) -> bool:
        """Whether its requests shall not wait for it any longer. While nobody else serves, they wait."""
        match engine.status:
            case "suspect":
                most_s = self._settings.lost_s
            case "paused":
                most_s = self._settings.pause_s
            case _:
                return False
        serves_another = any(one is not engine and one.status == "serving" for one in self.eligible)
        return serves_another and now_s - engine.status_s >= most_s

    def describe(self) -> str:
        """What keeps requests from being served, in words."""
        counts: dict[str, int] = {}
        for engine in self:
            word = "draining" if engine.is_draining and engine.status == "serving" else engine.status
            counts[word] = counts.get(word, 0) + 1
        return ", ".join(f"{count} {word}" for word, count in counts.items()) or "none has joined"

    def _list(self) -> None:
        """Who gets new requests, and who is warming up."""
        takes = [engine for engine in self if not engine.is_draining]
        serving = [engine for engine in takes if engine.status == "serving"]
        self.eligible = serving or [engine for engine in takes if engine.status == "suspect"]
        self.eligible_mask = sum(1 << engine.number for engine in self.eligible)
        self.warming = [engine for engine in self.eligible if engine.is_warming]
