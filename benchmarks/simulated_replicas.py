"""Several engines behind a router, in virtual time: how much of N engines do N engines give?

The router is the real one, and so are the schedulers of a few engines; of many, steps cost what a table says
(`benchmarks.modelled_engine`). Loads, each of so many clients an engine in a closed loop; what they send is in
`benchmarks.conversations`:

    conversations   share system prompts and their own earlier turns        uncached   prompts that share nothing
    death           conversations; an engine dies in mid-run and is back after BACK_S
    slow            conversations; an engine takes SLOW_PACE times as long from mid-run on
    hot             conversations; from mid-run on half of all begin with one long prompt
    bursts          conversations; in mid-run BURST_SHARE times as many clients send one request each at once

What is counted is what ends in the last half of the run. Owns the events and their order. Called by
`benchmarks.replica_rows`.
"""

import heapq
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

import numpy as np
from msgspec import Struct

from benchmarks.conversations import MAX_TOKENS, Client, Turn
from benchmarks.metrics import Figures
from benchmarks.modelled_engine import Heard
from benchmarks.routings import Routing
from benchmarks.virtual_engine import HOST_DELAY_S
from graphgen.ipc.reports import REPORT_EVERY_S, EngineReport
from graphgen.router.records import Capacity, Loss, Refusal, RoutedRequest

LOADS = ("conversations", "uncached", "death", "slow", "hot", "bursts")
CLIENTS = 16
BACK_S = 8.0
NOTICED_S = 0.05
"""After which the requests of a dead engine go on elsewhere."""
SLOW_PACE = 3.0
HOT_SHARE = 0.5
BURST_SHARE = 2


class SimulatedEngine(Protocol):
    """A ModelledEngine or a ScheduledEngine."""

    pace: float
    epoch: int

    @property
    def next_s(self) -> float: ...
    def submit(self, request_id: int, turn: Turn, num_output: int, tenant: str, now_s: float) -> None: ...
    def advance(self) -> list[Heard]: ...
    def report(self) -> EngineReport: ...
    def end(self) -> dict[int, int]: ...


class _Open:
    __slots__ = ("cached", "client", "first_s", "num_output", "sent_s", "turn")

    def __init__(self, client: int, turn: Turn, sent_s: float) -> None:
        self.client = client
        self.turn = turn
        self.sent_s = sent_s
        self.first_s = 0.0
        self.cached = 0
        self.num_output = 0


class Served(Struct):
    """What ended, column by column."""

    ended_s: "array[float]"
    first_s: "array[float]"  # since it was sent
    total_s: "array[float]"  # the same, of the last token
    prompt_len: "array[int]"
    cached: "array[int]"
    output_len: "array[int]"
    client: "array[int]"


class Setting(Struct, frozen=True):
    """What is run. clients: of an engine. seconds: of virtual time."""

    load: str
    num_engines: int
    capacity: Capacity
    clients: int = CLIENTS
    seconds: float = 40.0
    seed: int = 0
    num_routers: int = 1

    @property
    def middle_s(self) -> float:
        """When the run has warmed up, and when that happens which is to happen."""
        return self.seconds / 2

    @property
    def num_clients(self) -> int:
        return self.num_engines * self.clients


_REQUEST, _ENGINE, _REPORTS, _DEATH, _NOTICED, _BACK, _SLOW, _BURST = range(8)
_Event = tuple[float, int, int, int]
"""Time, order, kind and number of whom it happens to."""


class ReplicaRun:
    """One run: made, run once, read."""

    def __init__(
        self,
        setting: Setting,
        engines: Sequence[SimulatedEngine],
        routers: Sequence[Routing],
        tenant_of: Callable[[int], str] = lambda _: "",
        has_tokens: bool = True,
    ) -> None:
        """tenant_of: a client, by its number. has_tokens: the engines read token ids."""
        self._setting = setting
        self._engines = engines
        self._routers = routers
        self._tenant_of = tenant_of
        self._names = [f"engine {number}" for number in range(len(engines))]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        page_size = setting.capacity.page_size
        num_burst = BURST_SHARE * setting.num_clients if setting.load == "bursts" else 0
        self._clients = [
            Client(number, setting.seed, page_size, shares=setting.load != "uncached", has_tokens=has_tokens)
            for number in range(setting.num_clients + num_burst)
        ]
        self._random = Random(setting.seed)
        self._order = itertools.count()
        self._events: list[_Event] = []
        self._ids = itertools.count()
        self._open: dict[int, _Open] = {}
        self._dead: set[int] = set()
        self._now_s = 0.0
        self.num_moves = 0
        self.num_refused = 0
        self.decisions_us = array("d")
        self.served = Served(array("d"), array("d"), array("d"), *(array("l") for _ in range(4)))

    def run(self) -> None:
        setting, engines = self._setting, self._engines
        for number in range(setting.num_clients):
            self._push(self._random.random(), _REQUEST, number)
        self._push(0.0, _REPORTS, 0)
        happens = {"death": _DEATH, "slow": _SLOW, "bursts": _BURST}.get(setting.load)
        if happens is not None:
            self._push(setting.middle_s, happens, 0)
        events = self._events
        while events:
            now_s, _, kind, number = heapq.heappop(events)
            if now_s > setting.seconds:
                return
            self._now_s = now_s
            match kind:
                case 0:  # _REQUEST
                    self._send(number)
                case 1:  # _ENGINE
                    if engines[number].next_s == now_s:
                        self._advance(number)
                case 2:  # _REPORTS
                    self._report()
                case 3:  # _DEATH
                    self._die(number)
                case 4:  # _NOTICED
                    for router in self._routers:
                        self._move(router, router.died(self._names[number], now_s))
                case 5:  # _BACK
                    for router in self._routers:
                        router.renewed(self._names[number], engines[number].epoch, now_s)
                    self._dead.discard(number)
                case 6:  # _SLOW
                    engines[number].pace = SLOW_PACE
                case 7:  # _BURST
                    for client in range(setting.num_clients, len(self._clients)):
                        self._push(now_s, _REQUEST, client)

    def _push(self, at_s: float, kind: int, number: int) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), kind, number))

    def _router_of(self, client: int) -> Routing:
        return self._routers[client % len(self._routers)]

    def _send(self, client: int) -> None:
        setting, now_s = self._setting, self._now_s
        is_hot = setting.load == "hot" and now_s >= setting.middle_s
        turn = self._clients[client].next_turn(HOT_SHARE if is_hot else 0.0)
        request_id = next(self._ids)
        self._open[request_id] = _Open(client, turn, now_s)
        request = RoutedRequest(
            request_id=request_id,
            tenant=self._tenant_of(client),
            digests=turn.digests,
            prompt_len=turn.prompt_len,
            max_tokens=MAX_TOKENS,
            arrived_s=now_s,
        )
        router = self._router_of(client)
        begun_ns = time.thread_time_ns()
        choice = router.choose(request, now_s)
        self.decisions_us.append((time.thread_time_ns() - begun_ns) / 1000.0)
        if isinstance(choice, Refusal):
            self.num_refused += 1
            del self._open[request_id]
            self._push(now_s + (choice.retry_after_s or 1.0), _REQUEST, client)
            return
        router.sent(choice)
        self._submit(request_id, choice.engine_id)

    def _submit(self, request_id: int, engine_id: str) -> None:
        number, opened = self._numbers[engine_id], self._open[request_id]
        if number in self._dead:
            return  # nobody has noticed yet
        engine = self._engines[number]
        before_s = engine.next_s
        engine.submit(request_id, opened.turn, opened.num_output, self._tenant_of(opened.client), self._now_s)
        if engine.next_s != before_s:
            self._push(engine.next_s, _ENGINE, number)

    def _advance(self, number: int) -> None:
        engine, now_s = self._engines[number], self._now_s
        for heard in engine.advance():
            opened = self._open[heard.request_id]
            router = self._router_of(opened.client)
            opened.num_output += heard.num_new
            if heard.cached_tokens is not None:
                if not opened.first_s:
                    opened.first_s = now_s
                    opened.cached = heard.cached_tokens
                router.first_token(heard.request_id, heard.cached_tokens, now_s)
            if heard.is_last:
                router.finished(heard.request_id, opened.num_output)
                self._end(heard.request_id)
        if engine.next_s < float("inf"):
            self._push(engine.next_s, _ENGINE, number)

    def _end(self, request_id: int) -> None:
        opened, now_s, served = self._open.pop(request_id), self._now_s, self.served
        if opened.num_output != opened.turn.output_len:
            raise RuntimeError(f"request {request_id} got {opened.num_output} tokens, not {opened.turn.output_len}")
        served.ended_s.append(now_s)
        served.first_s.append(opened.first_s - opened.sent_s)
        served.total_s.append(now_s - opened.sent_s)
        served.prompt_len.append(opened.turn.prompt_len)
        served.cached.append(opened.cached)
        served.output_len.append(opened.num_output)
        served.client.append(opened.client)
        if opened.client < self._setting.num_clients:  # those of a burst send one request each
            self._push(now_s + HOST_DELAY_S, _REQUEST, opened.client)

    def _report(self) -> None:
        now_s = self._now_s
        for number, (name, engine) in enumerate(zip(self._names, self._engines, strict=True)):
            if number in self._dead:
                continue
            report = engine.report()
            for router in self._routers:
                router.report(name, report, now_s)
        for router in self._routers:
            self._move(router, router.watch(now_s))
        self._push(now_s + REPORT_EVERY_S, _REPORTS, 0)

    def _die(self, number: int) -> None:
        for request_id, count in self._engines[number].end().items():
            opened = self._open[request_id]
            opened.num_output += count
            self._router_of(opened.client).progress(request_id, opened.num_output, self._now_s)
        self._dead.add(number)
        self._push(self._now_s + NOTICED_S, _NOTICED, number)
        self._push(self._now_s + BACK_S, _BACK, number)

    def _move(self, router: Routing, losses: Sequence[Loss]) -> None:
        for loss in losses:
            assert not loss.error, loss
            choice = router.move(loss.request_id, self._now_s)
            assert not isinstance(choice, Refusal), choice
            router.sent(choice)
            self.num_moves += 1
            self._submit(loss.request_id, choice.engine_id)


def figures_of(run: ReplicaRun, setting: Setting) -> Figures:
    """Of what ended in the last half of a run."""
    served = run.served
    ended = np.frombuffer(served.ended_s)
    counted = ended >= setting.middle_s
    seconds = setting.seconds - setting.middle_s
    first_ms = np.frombuffer(served.first_s)[counted] * 1000.0
    prompts = np.frombuffer(served.prompt_len, np.int64)[counted]
    cached = np.frombuffer(served.cached, np.int64)[counted]
    outputs = np.frombuffer(served.output_len, np.int64)[counted]
    per_second = np.histogram(ended, np.arange(0.0, setting.seconds + 0.5, 1.0))[0]
    return {
        "load": setting.load,
        "engines": setting.num_engines,
        "request_throughput": float(counted.sum() / seconds),
        "output_throughput": float(outputs.sum() / seconds),
        "hit_rate": float(cached.sum() / prompts.sum()),
        **{f"p{percent}_ttft_ms": float(np.percentile(first_ms, percent)) for percent in (50, 95, 99)},
        "max_ttft_ms": float(first_ms.max()),
        "least_throughput": float(per_second[int(setting.middle_s) :].min()),
        "moves": run.num_moves,
        "refused": run.num_refused,
        **{f"p{percent}_decision_us": float(np.percentile(run.decisions_us, percent)) for percent in (50, 99)},
        "per_second": per_second.tolist(),
    }
