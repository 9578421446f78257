"""One question for all who ask: what becomes of them where it gets no answer."""

from collections.abc import Callable

from graphgen.server.frontend.questions import MAX_WAITING, SharedQuestion


class Asked:
    """A question of which a test says what comes of it, and what those heard who asked."""

    def __init__(self, when_sent: Callable[[], None] | None = None) -> None:
        self.num_sent = 0
        self.heard: list[tuple[int, str]] = []
        self.when_sent = when_sent
        self.question: SharedQuestion[str] = SharedQuestion(self._send, fresh_s=1.0)

    def _send(self) -> None:
        self.num_sent += 1
        if self.when_sent is not None:
            self.when_sent()

    def ask(self, who: int, now_s: float) -> None:
        self.question.ask(lambda answer: self.heard.append((who, answer)), now_s)


def test_one_answer_is_for_all_and_good_for_a_while() -> None:
    asked = Asked()
    for who in range(3):
        asked.ask(who, 10.0)
    asked.question.ask_again()
    assert asked.num_sent == 1
    asked.question.answered("yes", 11.0)
    asked.ask(3, 11.5)
    assert asked.heard == [(0, "yes"), (1, "yes"), (2, "yes"), (3, "yes")]
    asked.ask(4, 12.5)
    assert asked.num_sent == 2


def test_who_waits_for_a_question_that_is_lost_gets_the_answer_to_the_next() -> None:
    asked = Asked()
    asked.ask(0, 10.0)
    asked.question.lost()
    assert asked.question.waited_s(12.0) == 2.0, "it is still being waited for"
    asked.question.ask_again()
    asked.question.ask_again()
    assert asked.num_sent == 2
    asked.question.answered("yes", 12.0)
    assert asked.heard == [(0, "yes")]


def test_a_question_that_is_lost_after_everybody_has_given_up_is_not_asked_again() -> None:
    asked = Asked()
    asked.ask(0, 10.0)
    asked.question.give_up("no")
    assert asked.question.waited_s(16.0) == 6.0, "it is on its way"
    asked.question.lost()
    asked.question.ask_again()
    assert (asked.num_sent, asked.heard, asked.question.waited_s(17.0)) == (1, [(0, "no")], 0.0)
    asked.ask(1, 18.0)
    assert (asked.num_sent, asked.question.waited_s(18.5)) == (2, 0.5)


def test_who_asks_after_a_lost_question_was_given_up_is_not_told_that_it_waited_for_long() -> None:
    asked = Asked()
    asked.ask(0, 10.0)
    asked.question.lost()
    asked.question.give_up("no")
    asked.ask(1, 100.0)
    assert (asked.num_sent, asked.question.waited_s(100.0)) == (2, 0.0)
    asked.question.answered("yes", 100.0)
    assert asked.heard == [(0, "no"), (1, "yes")]


def test_a_question_that_nobody_can_be_asked_is_tried_again() -> None:
    asked = Asked()
    asked.when_sent = asked.question.lost
    asked.ask(0, 10.0)
    for _ in range(3):
        asked.question.ask_again()
    assert asked.num_sent == 4
    asked.when_sent = lambda: asked.question.answered("yes", 11.0)
    asked.question.ask_again()
    assert asked.heard == [(0, "yes")]


def test_no_more_wait_than_there_is_room_for() -> None:
    asked = Asked()
    for who in range(MAX_WAITING + 5):
        asked.ask(who, 10.0)
    asked.question.answered("yes", 10.5)
    assert len(asked.heard) == MAX_WAITING
