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


def sum_answer(asked: "dict[int, Future[EngineStats]]", engines: Collection[int]) -> "Future[EngineStats]":
    """Done when all are: the sum of those that answered, and each for itself. engines: the numbers of all."""
    num_engines = max(engines, default=-1) + 1
    answer: Future[EngineStats] = Future()
    left = itertools.count(len(asked) - 1, -1)

    def take(_: "Future[EngineStats]") -> None:
        if next(left) == 0:
            found = {number: one.result() for number, one in asked.items() if one.exception() is None}
            answer.set_result(sum_of([found.get(number) for number in range(num_engines)]))

    for future in asked.values():
        future.add_done_callback(take)
    if not asked:
        answer.set_result(sum_of([None] * num_engines))
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
