"""One answer of what several engines were asked.

Owns nothing; the answers come on the receiving threads of the links. Called by `graphgen.router.links`.
"""

import itertools
import threading
from collections.abc import Collection
from concurrent.futures import Future

from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.errors import EngineDeadError
from graphgen.router.engine_stats import sum_of
from graphgen.router.kept_counts import KeptCounts


def sum_answer(
    asked: "dict[int, Future[EngineStats]]", engines: Collection[int], counts: KeptCounts
) -> "Future[EngineStats]":
    """Done when all are: the sum of those that answered, and each for itself. engines: the numbers of all. counts: of
    those that answered before, which stay in the sum."""
    num_engines = max(engines, default=-1) + 1
    answer: Future[EngineStats] = Future()
    left = itertools.count(len(asked) - 1, -1)

    def finish() -> None:
        found = {number: one.result() for number, one in asked.items() if one.exception() is None}
        answer.set_result(sum_of([found.get(number) for number in range(num_engines)], counts.take(found)))

    def take(_: "Future[EngineStats]") -> None:
        if next(left) == 0:
            finish()

    for future in asked.values():
        future.add_done_callback(take)
    if not asked:
        finish()
    return answer


def first_answer(asked: "list[Future[None]]") -> "Future[None]":
    """Done when one is; fails when all have failed."""
    answer: Future[None] = Future()
    lock = threading.Lock()
    left = itertools.count(len(asked) - 1, -1)

    def take(future: "Future[None]") -> None:
        with lock:
            is_last = next(left) == 0
            if answer.done():
                return
            if future.exception() is None:
                answer.set_result(None)
            elif is_last:
                answer.set_exception(future.exception())

    for future in asked:
        future.add_done_callback(take)
    if not asked:
        answer.set_exception(EngineDeadError("no engine serves at the moment: try again"))
    return answer
