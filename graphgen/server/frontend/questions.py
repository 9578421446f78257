"""Questions that many clients ask and one answer serves: statistics and health.

Owns who waits for the answer, and that the engine is not asked more often than it need be. Used on the server's loop.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
Reply = Callable[[Answer], None]

MAX_WAITING = 1024


class SharedQuestion(Generic[Answer]):
    """At most one question is on its way. An answer is good for `fresh_s`; asking takes `timeout_s` at most."""

    def __init__(self, ask: Callable[[], None], fresh_s: float, timeout_s: float) -> None:
        """ask: sends the question; `answered` is called when its answer has come."""
        self._ask = ask
        self._fresh_s = fresh_s
        self._timeout_s = timeout_s
        self._waiting: list[Reply[Answer]] = []
        self._asked_s: float | None = None
        self._last: tuple[float, Answer] | None = None

    def ask(self, reply: Reply[Answer], now_s: float) -> None:
        """`reply` is called now or when the answer comes; of too many that wait, the newest hear nothing."""
        if self._last is not None and now_s - self._last[0] < self._fresh_s:
            reply(self._last[1])
            return
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(reply)
        if self._asked_s is None:
            self._asked_s = now_s
            self._ask()

    def answered(self, answer: Answer, now_s: float) -> None:
        self._asked_s = None
        self._last = (now_s, answer)
        self._reply(answer)

    def lost(self) -> None:
        """The question gets no answer: the next one is sent. Who waits gets that one's answer."""
        self._asked_s = None

    def waited_s(self, now_s: float) -> float:
        """How long the question has been on its way; 0 if none is."""
        return 0.0 if self._asked_s is None else now_s - self._asked_s

    def give_up(self, answer: Answer, now_s: float) -> None:
        """Answers those who wait when no answer has come in time. The question stays on its way: it is not repeated."""
        if self._waiting and self.waited_s(now_s) >= self._timeout_s:
            self._reply(answer)

    def _reply(self, answer: Answer) -> None:
        waiting, self._waiting = self._waiting, []
        for reply in waiting:
            reply(answer)
