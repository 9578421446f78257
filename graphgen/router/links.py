"""The engines of one program or one server, as one: each request goes where the policy says, and goes on elsewhere
when its engine ends.

Owns the links, see `graphgen.router.engine_link`; `graphgen.router.engine_states` knows which engines serve or drain,
`graphgen.router.places` where each request is. Never starts or ends an engine: whoever keeps the engines
(`graphgen.launch.engines`) says which has ended, and calls `tick` ten times a second. Used by `graphgen.api.core` and
the frontend of a server. With one engine all of it is that engine's link: nothing is routed, and what is open when the
engine ends has ended with it.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from graphgen.base.owner import Owner
from graphgen.ipc.engine_messages import EngineStats, Notice, Ready
from graphgen.ipc.errors import EngineClosedError, EngineDeadError
from graphgen.ipc.reports import EngineReport
from graphgen.requests.open_request import OpenRequest
from graphgen.router.answers import first_answer, sum_answer
from graphgen.router.engine_link import EngineLink, LinkPlace, MakeLink
from graphgen.router.engine_states import EngineStates
from graphgen.router.places import Follower, Places, Reporter

POLL_S = 0.02
REPORTED_FOR_S = 1.0
"""After somebody asked what the one engine has to do, it is asked so long."""


class Links:
    """One or several engines. Has the calls of a `Link`; the calls for those who keep the engines say which one."""

    def __init__(
        self,
        engines: Sequence[MakeLink],
        on_notice: Callable[[Notice], None] | None = None,
        seed: int = 0,
        routes: bool = False,
    ) -> None:
        """engines: what makes the link of each. on_notice: gets what an operator should know, until `when_noticed`
        names another; None: it is logged. seed: of chance; of several routers to the same engines each has another.
        routes: also where there is one engine, since others may be added."""
        self._owner = Owner("the engine")
        self._lock = threading.RLock()
        self._on_ready: Callable[[int, Ready], None] | None = None
        self._on_notice = on_notice
        self._on_away: Callable[[int, str, bool], None] | None = None
        self._is_one = len(engines) == 1 and not routes
        self._report_asked_s = -REPORTED_FOR_S
        self._links: dict[int, EngineLink] = {}
        self._states = EngineStates(self._lock)
        self._places = Places(self._links, self._states, self._lock, seed)
        try:
            for number, make in enumerate(engines):
                self._link(number, make)
        except BaseException:
            for link in self._links.values():
                link.close()
            raise

    def _link(self, number: int, make: MakeLink) -> None:
        """From here on there is an engine of this number."""
        observer = Reporter(self._states, number) if self._is_one else Follower(self._places, self._states, number)
        on_notice = self._naming(number, self._on_notice)
        self._links[number] = link = make(
            LinkPlace(
                self._lock, observer, on_notice, functools.partial(self._hear_away, number), is_kept=not self._is_one
            )
        )
        link.when_ready(functools.partial(self._take_ready, number))

    def _naming(self, number: int, tell: Callable[[Notice], None] | None) -> Callable[[Notice], None] | None:
        """`tell`, which hears of several engines whose notice it is."""
        return tell if self._is_one or tell is None else functools.partial(_name_engine, tell, number)

    def __len__(self) -> int:
        return len(self._links)

    # --- what a link does ----------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float, least: int | None = None) -> Ready:
        """When all engines serve, or at least so many: what the one with least room said. Raises as `Link.wait_ready`
        does."""
        deadline_s = time.monotonic() + timeout_s
        if least is not None and least < len(self._links):
            while self.num_serving < least:
                if time.monotonic() >= deadline_s:
                    raise EngineDeadError(f"{self.num_serving} engines serve after {timeout_s:g} s, not {least}")
                time.sleep(POLL_S)
            return self.ready
        for number, link in list(self._links.items()):
            self._serve(number, link.wait_ready(max(0.0, deadline_s - time.monotonic())))
        return self.ready

    @property
    def ready(self) -> Ready:
        """Of the engines that serve, what the one with least room said: what fits there fits everywhere. Raises
        EngineDeadError where none serves."""
        return self._states.ready

    @property
    def num_serving(self) -> int:
        """Engines that serve now."""
        return len(self._states)

    @property
    def num_engines(self) -> int:
        """The same, those behind servers elsewhere each counted."""
        return self._states.num_engines

    def report(self) -> EngineReport | None:
        """What all that serve have to do, as of one engine; None before they have said so. While this is asked for they
        report ten times a second."""
        self._report_asked_s = time.monotonic()
        return self._states.report()

    def serves(self, number: int) -> bool:
        """Whether an engine serves now."""
        return number in self._states

    @property
    def is_own(self) -> bool:
        """False in a fork of the program."""
        return self._owner.is_this

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program: the receiving threads are the parent's."""
        self._owner.check()

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        """Opens the requests; from now on their sinks are called. Raises with none opened: what keeps an engine from
        taking them, or OverloadedError and DeadlineError where no engine would serve one in time."""
        self.check_process()
        if self._is_one:
            self._links[0].submit(requests)
            return
        self._places.submit(list(requests))

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored."""
        if not self._owner.is_this:
            return
        if self._is_one:
            self._links[0].cancel(request_ids)
            return
        self._places.cancel(request_ids)

    def stats(self, timeout_s: float) -> EngineStats:
        """A snapshot of all that serve. Raises EngineDeadError when one of them does not answer in time."""
        try:
            return self.ask_stats().result(timeout_s)
        except FutureTimeoutError:
            raise EngineDeadError(f"a scheduler did not answer for {timeout_s:g} s: close the engine") from None

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        """Asks for a snapshot and does not wait for it. steps: with those since the last such question."""
        self.check_process()
        if self._is_one:
            return self._links[0].ask_stats(steps)
        with self._lock:
            self._places.raise_fault()
            asked = {number: self._links[number].ask_stats(steps) for number in sorted(self._states)}
        return sum_answer(asked, self._links)

    def ask_probe(self) -> "Future[None]":
        """Is done when scheduler, worker and device of some engine have answered, behind the steps in flight."""
        self.check_process()
        if self._is_one:
            return self._links[0].ask_probe()
        with self._lock:
            self._places.raise_fault()
            asked = [self._links[number].ask_probe() for number in sorted(self._states)]
        return first_answer(asked)

    def when_ready(self, call: Callable[[int, Ready], None]) -> None:
        """From now on `call` is made, on a receiving thread, each time that an engine begins to serve."""
        self._on_ready = call

    def when_noticed(self, call: Callable[[Notice], None]) -> None:
        """From now on `call` gets what an operator should know, on a receiving thread."""
        self._on_notice = call
        for number, link in self._links.items():
            if (tell := self._naming(number, call)) is not None:
                link.when_noticed(tell)

    def close(self) -> None:
        """Ends the engines, then the threads. Open requests get EngineClosedError. Idempotent."""
        if not self._owner.is_this:
            return
        self._places.fail(EngineClosedError("the engine was closed: make a new Engine"))
        for link in self._links.values():
            link.begin_close()
        for link in self._links.values():
            link.close()

    def when_away(self, call: Callable[[int, str, bool], None]) -> None:
        """From now on `call` is made, on a receiving thread, each time that a link finds that its engine has ended or
        cannot be reached: see `LinkPlace.on_away`. What the engine had goes on elsewhere."""
        self._on_away = call

    # --- for those who keep the engines ----------------------------------------------------------------------------

    def lose(self, number: int, final_reason: str | None = None) -> bool:
        """An engine has ended. Returns whether its requests go on, at another engine or as soon as one serves; False:
        there is but this one, and they are forgotten.

        final_reason: why it ended, if no other is started in its place; when none is left, all ends with
        EngineDeadError.
        """
        with self._lock:
            self._states.end(number)
            if self._is_one:
                self._links[0].await_another_engine()
                return False
            self._places.drain(number)
        self._links[number].lose(functools.partial(self._take_lost, number, final_reason))
        return True

    def drain(self, number: int, grace_s: float, when_drained: Callable[[int], None]) -> None:
        """An engine gets no new requests from here on. `when_drained` is called when it has none left; those that are
        open after `grace_s` go on at other engines. Whoever keeps the engine ends it then.

        Raises EngineDeadError where no other engine serves, and for one that does not serve itself.
        """
        with self._lock:
            self._states.drain(number, grace_s, when_drained)
            self._places.drain(number)

    def is_draining(self, number: int) -> bool:
        """Whether an engine drains now."""
        with self._lock:
            return self._states.is_draining(number)

    def expect(self, number: int) -> None:
        """An engine that has drained is about to be started again, or is kept after all: as soon as it says that it
        serves it gets requests."""
        with self._lock:
            if self._states.expect(number):
                self._links[number].await_another_engine()
            else:
                self._places.undrain(number)
            self._links[number].expect()

    def __contains__(self, number: int) -> bool:
        """Whether there is an engine of this number, in whatever state."""
        return number in self._links

    def add(self, number: int, make: MakeLink) -> None:
        """Another engine, by a number that none has, which gets requests as soon as it serves."""
        with self._lock:
            self._places.raise_fault()
            self._link(number, make)

    def remove(self, number: int) -> None:
        """An engine that has drained, or does not serve, is not there any more. Raises EngineDeadError for another."""
        with self._lock:
            if number in self._states:
                raise EngineDeadError(f"engine {number} serves: drain it first")
            link = self._links.pop(number)
            self._states.forget(number)
            self._places.forget(number)
        link.close()

    def tick(self) -> None:
        """Ten times a second: what has been waited for long enough."""
        now_s = time.monotonic()
        if self._is_one:
            if now_s - self._report_asked_s < REPORTED_FOR_S:
                self._links[0].ask_report()
            return
        with self._lock:
            self._places.tell_progress()
            for number in self._states:
                self._links[number].ask_report()
            self._places.leave_silent(now_s)
            for number, grace_ends_s in self._states.drains().items():
                if now_s >= grace_ends_s or not self._links[number].open_requests():
                    self.lose(number)  # what is left goes on elsewhere, as if it had ended
            self._places.find()

    def _hear_away(self, number: int, reason: str, is_refused: bool) -> None:
        with self._lock:
            if number in self._states:  # else it has drained, or been left already
                self.lose(number)
        if self._on_away is not None:
            self._on_away(number, reason, is_refused)

    def _take_ready(self, number: int, ready: Ready) -> None:
        if self._serve(number, ready) and self._on_ready is not None:
            self._on_ready(number, ready)

    def _serve(self, number: int, ready: Ready) -> bool:
        """Whether it did not serve before."""
        with self._lock:
            if not self._states.serve(number, ready):
                return False
            if not self._is_one:
                self._places.join(number, ready)
            return True

    def _take_lost(self, number: int, final_reason: str | None, requests: list[OpenRequest]) -> None:
        """What an engine had when it ended or was left. On the link's thread."""
        with self._lock:
            when_drained = self._states.end_drain(number, rests=self._places.knows(number))
            is_expected = when_drained is None and final_reason is None
            self._places.take_back(number, requests, is_expected)
            is_last = final_reason is not None and not self._places.has_engines
        if when_drained is not None:
            when_drained(number)
        if is_last:
            error = EngineDeadError(f"no engine is left, the last one ended: {final_reason}\nMake a new Engine")
            self._places.fail(error)


def _name_engine(tell: Callable[[Notice], None], number: int, notice: Notice) -> None:
    tell(Notice(f"engine {number}: {notice.text}"))
