"""Questions that many clients ask and one answer serves: statistics and health.

Owns who waits for the answer, and that the engine is not asked more often than it need be. Used on the server's loop.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
Reply = Callable[[Answer], None]

MAX_WAITING = 1024


class SharedQuestion(Generic[Answer]):
    """At most one question is on its way. An answer is good for `fresh_s`."""

    def __init__(self, ask: Callable[[], None], fresh_s: float) -> None:
        """ask: sends the question; `answered` or `lost` is called in the end, at once or later."""
        self._ask = ask
        self._fresh_s = fresh_s
        self._waiting: list[Reply[Answer]] = []
        self._asked_s: float | None = None  # since when there has been no answer
        self._is_on_its_way = False
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
            self._send()

    def answered(self, answer: Answer, now_s: float) -> None:
        self._is_on_its_way, self._asked_s = False, None
        self._last = (now_s, answer)
        self._reply(answer)

    def lost(self) -> None:
        """The question gets no answer. Who waits gets that of the next one: see `ask_again`."""
        self._is_on_its_way = False
        if not self._waiting:
            self._asked_s = None

    def ask_again(self) -> None:
        """For those who wait, where their question was lost. To be called a few times a second."""
        if self._waiting and not self._is_on_its_way:
            self._send()

    def waited_s(self, now_s: float) -> float:
        """How long there has been no answer; 0 if none is waited for."""
        return 0.0 if self._asked_s is None else now_s - self._asked_s

    def give_up(self, answer: Answer) -> None:
        """Answers those who wait when none has come in time. A question on its way stays so: it is not repeated."""
        if not self._is_on_its_way:
            self._asked_s = None
        self._reply(answer)

    def _send(self) -> None:
        self._is_on_its_way = True
        self._ask()

    def _reply(self, answer: Answer) -> None:
        waiting, self._waiting = self._waiting, []
        for reply in waiting:
            reply(answer)
