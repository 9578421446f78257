"""The router's policy: which engine serves a request, from what is known of the engines at that moment.

Owns the engines' states, the requests that are open and the index of prompts. Never reads a clock or a socket and never
waits: times are arguments, chance comes from the seed, and equal calls give equal choices. Called by the link layer
over several engines, and by `benchmarks.simulate`.

    joined, left                     an engine is there; it is not any more
    drain, undrain                   it finishes what it has and gets nothing new; or does again
    report                           what the engine says of itself, ten times a second
    died, renewed                    its processes ended; it serves, with an empty cache: a new epoch
    watch                            ten times a second: finds the engines that say or do nothing

    choose  ->  sent  ->  first_token  ->  progress ...  ->  finished
                  |  rejected                                the engine has no room: another Choice, or none
                  |  died, left, lost, watch  ->  Loss       the request has no engine: `move` it, or it has failed
                  +- move  ->  sent  ->  ...                 prompt and emitted tokens are computed again elsewhere

A choice looks at few engines: at most four of those that keep the longest beginnings of the prompt, and two at random;
all of them where there are no more than six. It takes the one with the least cost in seconds (`load`): the work that
goes before, and what the request itself takes there. So a prefix that everybody asks for spreads by itself: as soon as
the work of the engines that keep it exceeds its computation, another engine computes it and keeps it too. Without a
prefix the choice is that of the better of two at random. How many engines there are costs nothing.

- **What an engine keeps** is a guess (`prefix_index`). The first token of a request says how much of it was right.
- **A new engine** keeps nothing, so few prompts would lead there: a share of the prompts that nobody keeps much of look
  at it.
- **Other routers** send to the same engines. What they sent is in the engines' reports, a tenth of a second old; two
  random candidates keep several routers from running to the same engine in between.
- **Refused** is a request that none of the engines looked at, and of as many more, completes before its deadline.
  Refusing costs little more than choosing, so that a flood of hopeless requests does no harm.
- **A lost engine** costs its requests nothing but time: each goes on at another engine with the tokens that it has.
  Losses count since the last new token. After two the request runs alone at the engine with the fewest requests; the
  third one fails it, since what ended three engines is likely the request itself.
"""

from collections.abc import Iterable
from random import Random

from graphgen.ipc.reports import EngineReport
from graphgen.router.choosing import Chooser
from graphgen.router.fleet import Fleet
from graphgen.router.load import EngineLoad
from graphgen.router.open_request import OpenRequest
from graphgen.router.prefix_index import PrefixIndex
from graphgen.router.records import (
    MAX_LOSSES,
    Capacity,
    Choice,
    EngineView,
    Loss,
    Refusal,
    RoutedRequest,
    RouterSettings,
)

_WEIGHT = 1.0 / 32
"""Of the newest request in the mean share of max_tokens that outputs have."""


class Router:
    """One router. All calls from one thread, or under one lock."""

    def __init__(self, settings: RouterSettings | None = None, seed: int = 0) -> None:
        settings = settings or RouterSettings()
        random = Random(seed)
        self._max_rejections = settings.max_rejections
        self._index = PrefixIndex(settings.max_digests, random)
        self._fleet = Fleet(settings, self._index)
        self._chooser = Chooser(settings, self._fleet, self._index, random)
        self._requests: dict[int, OpenRequest] = {}
        self._output_share = 1.0

    # --- engines -------------------------------------------------------------------------------------------------

    def joined(self, engine_id: str, capacity: Capacity, now_s: float, epoch: int = 0) -> None:
        """An engine serves. Raises ValueError for an id that is in use."""
        self._fleet.join(engine_id, capacity, epoch, now_s)

    def left(self, engine_id: str) -> tuple[Loss, ...]:
        """An engine is gone for good. Returns what was open there."""
        engine = self._fleet.find(engine_id)
        losses = self._lose_all(engine)
        self._fleet.leave(engine)
        return losses

    def drain(self, engine_id: str) -> None:
        """It gets no new requests and finishes those it has; `view` says how many are left."""
        self._fleet.drain(self._fleet.find(engine_id), True)

    def undrain(self, engine_id: str) -> None:
        """It gets requests again."""
        self._fleet.drain(self._fleet.find(engine_id), False)

    def report(self, engine_id: str, report: EngineReport, now_s: float) -> None:
        """What an engine says of itself. A new epoch means that its cache is empty and that its requests begin again
        there. Of an engine that `died` it comes too late and is ignored."""
        engine = self._fleet.find(engine_id)
        if engine.status == "dead":
            return
        if report.epoch != engine.epoch:
            self._begin_epoch(engine, report.epoch)
        self._fleet.take_report(engine, report, now_s)

    def died(self, engine_id: str, now_s: float) -> tuple[Loss, ...]:
        """The engine's processes ended; until `renewed` it gets nothing. Returns what was open there."""
        engine = self._fleet.find(engine_id)
        self._fleet.set_status(engine, "dead", now_s)
        self._index.empty(engine.number)
        return self._lose_all(engine)

    def renewed(self, engine_id: str, epoch: int, now_s: float) -> None:
        """A new life of the engine serves, with an empty cache. What is open there begins again there."""
        engine = self._fleet.find(engine_id)
        engine.forget_report(now_s)
        self._begin_epoch(engine, epoch)
        self._fleet.set_status(engine, "serving", now_s)

    def watch(self, now_s: float) -> tuple[Loss, ...]:
        """Looks for engines that are silent, stuck or paused. Returns the requests that shall not wait for theirs any
        longer: cancel them there."""
        self._fleet.find_suspects(now_s)
        losses: list[Loss] = []
        for engine in list(self._fleet):
            if engine.num_open and self._fleet.gives_up(engine, now_s):
                losses += self._lose_all(engine)
        return tuple(losses)

    # --- requests ------------------------------------------------------------------------------------------------

    def choose(self, request: RoutedRequest, now_s: float) -> Choice | Refusal:
        """Where a new request goes. Changes nothing but the state of chance."""
        return self._chooser.choose(OpenRequest(request), self._output_share, now_s)

    def sent(self, choice: Choice) -> None:
        """The request of a choice was sent. Raises ValueError for one that is open at an engine, KeyError for an engine
        that has left."""
        engine, request = self._fleet.find(choice.engine_id), choice.request
        opened = self._requests.get(request.request_id)
        if opened is None:
            opened = self._requests[request.request_id] = OpenRequest(request)
        elif opened.engine is not None:
            raise ValueError(
                f"request {request.request_id} is open at engine {opened.engine.engine_id}: ids are unique"
            )
        opened.enter(engine, choice.num_cached, self._output_share)
        # What a request brings that is not computed yet is nothing that the engine could have given up.
        earliest = next(iter(engine.unbegun.values()), None)
        age = self._index.add(engine.number, request.digests)
        if age is not None and (earliest is None or age <= earliest):
            opened.age = age
        engine.unbegun[request.request_id] = self._index.num_touches - len(request.digests)
        self._fleet.note_warmth(engine)

    def first_token(self, request_id: int, cached_tokens: int, now_s: float) -> None:
        """The first token from its engine came; cached_tokens: what the engine found of its prompt. Raises KeyError for
        a request that is not open. One that is lost is ignored, and so is the token if `progress` told of it."""
        opened = self._requests[request_id]
        engine = opened.engine
        if engine is None:
            return
        if opened.age is not None and cached_tokens + engine.capacity.page_size < opened.cached:
            self._index.correct(engine.number, opened.age)
        opened.age = None
        if not opened.has_begun:
            self.progress(request_id, opened.num_output + 1, now_s)

    def progress(self, request_id: int, num_output: int, now_s: float) -> None:
        """It has so many tokens by now. As often as is convenient; before `died`, so that losses count since the last
        new token. Raises KeyError for a request that is not open, ValueError for fewer tokens than before."""
        opened = self._requests[request_id]
        if num_output < opened.num_output:
            raise ValueError(
                f"request {request_id} has {opened.num_output} tokens, not {num_output}: count those of all its engines"
            )
        engine = opened.engine
        if engine is None or num_output == opened.num_output:
            return
        self._fleet.heard(engine, now_s)
        engine.unbegun.pop(request_id, None)
        opened.advance(engine, num_output)

    def finished(self, request_id: int, num_output: int) -> None:
        """It has ended in whatever way, with so many tokens: its last token, a stop string, an error, a cancel. Raises
        KeyError for one that is not open."""
        opened = self._requests.pop(request_id)
        opened.leave()
        if num_output:
            share = min(1.0, num_output / opened.request.max_tokens)
            self._output_share += _WEIGHT * (share - self._output_share)

    def rejected(self, request_id: int, now_s: float) -> Choice | None:
        """Its engine turned it away because it has no room. Returns where it goes instead; None: nowhere, its sender
        gets the engine's answer, and it has ended. Raises KeyError for a request that is not open."""
        opened = self._requests[request_id]
        if opened.engine is not None:
            opened.rejections = (*opened.rejections, opened.engine)
            opened.leave()
        if len(opened.rejections) <= self._max_rejections:
            choice = self._chooser.choose(opened, self._output_share, now_s)
            if isinstance(choice, Choice):
                return choice
        del self._requests[request_id]
        return None

    def lost(self, request_ids: Iterable[int]) -> tuple[Loss, ...]:
        """Their engines live and do not go on with these. Raises KeyError for a request that is not open."""
        return tuple(self._lose(self._requests[one]) for one in request_ids if self._requests[one].engine is not None)

    def move(self, request_id: int, now_s: float) -> Choice | Refusal:
        """Where a lost request goes on. After a Refusal it is still lost: `move` it again later, or say `finished`.
        Raises KeyError for a request that is not open, ValueError for one that has an engine."""
        opened = self._requests[request_id]
        if opened.engine is not None:
            raise ValueError(f"request {request_id} is open at engine {opened.engine.engine_id}: it is not lost")
        return self._chooser.choose(opened, self._output_share, now_s)

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Requests that have not ended, lost ones included."""
        return len(self._requests)

    @property
    def num_digests(self) -> int:
        """(engine, page) pairs that the index remembers."""
        return self._index.num_pairs

    def view(self, engine_id: str) -> EngineView:
        """Raises KeyError for an engine that is not there."""
        return self._view(self._fleet.find(engine_id))

    def views(self) -> list[EngineView]:
        """Of all engines."""
        return [self._view(engine) for engine in self._fleet]

    def _view(self, engine: EngineLoad) -> EngineView:
        return EngineView(
            engine.engine_id,
            engine.status,
            engine.is_draining,
            engine.epoch,
            engine.num_open,
            engine.num_others,
            len(engine.tenants),
            engine.prompt_tokens,
            engine.output_tokens,
            engine.open_work_s,
            self._index.num_pages(engine.number),
            engine.speeds.prompt_token_s,
            engine.speeds.output_token_s,
        )

    def _begin_epoch(self, engine: EngineLoad, epoch: int) -> None:
        self._fleet.begin_epoch(engine, epoch)
        for request_id in engine.requests:
            self._requests[request_id].begin_again(engine)
            engine.unbegun[request_id] = self._index.num_touches

    def _lose_all(self, engine: EngineLoad) -> tuple[Loss, ...]:
        return tuple(self._lose(self._requests[request_id]) for request_id in list(engine.requests))

    def _lose(self, opened: OpenRequest) -> Loss:
        """A request that is at an engine, and stays there no longer."""
        request_id, engine = opened.request.request_id, opened.engine
        assert engine is not None, "a request that has no engine cannot lose it"
        opened.leave()
        opened.rejections = ()
        opened.num_losses += 1
        error = ""
        if opened.num_losses >= MAX_LOSSES:
            del self._requests[request_id]
            error = (
                f"{opened.num_losses} engines ended or hung one after another while they computed this request, the"
                " last one alone, so it is not tried again"
            )
        return Loss(request_id, engine.engine_id, opened.num_losses, error)
