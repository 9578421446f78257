"""What does it cost to decide where a request goes, as engines become many?

    python -m benchmarks.router --engines 16 256 1000

Conversations as in `benchmarks.conversations`, sixteen clients an engine, each with one open request. CPU times of this
thread, in microseconds: `digests` are made once, when a prompt comes; then follow a choice, what it costs to take note
that the request was sent, and that it began and ended. `refusal` is a choice for a request whose deadline nobody meets.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import ParamSpec, TypeVar

import msgspec

from benchmarks.conversations import Client
from benchmarks.metrics import Figures
from benchmarks.options import make_parser, run_script
from benchmarks.report import machine, percentile, show, write_json
from graphgen.base.page_digests import TOKEN_BYTES, prompt_digests
from graphgen.ipc.reports import EngineReport
from graphgen.router.policy import Router
from graphgen.router.records import MAX_DIGESTS, Capacity, Choice, Refusal, RoutedRequest

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")

PAGE_SIZE = 64
CAPACITY = Capacity(num_slots=256, num_pages=4000, page_size=PAGE_SIZE, token_budget=1024)
CLIENTS = 16
"""Of an engine."""
NUM_REPEATS = 2000
REPORT = EngineReport(
    epoch=0,
    is_serving=True,
    num_open=0,
    num_tenants=1,
    prompt_tokens=0,
    output_tokens=0,
    num_others=0,
    others_prompt_tokens=0,
    others_output_tokens=0,
    num_steps=0,
    pages_free=0,
    prompt_token_s=27e-6,
    output_token_s=75e-6,
    step_s=5e-3,
)


def measure(num_engines: int, num_repeats: int) -> Figures:
    """A row. The engines have the speed of an H200 with an 8B model."""
    router, clients, ids = _filled(num_engines)
    asked = [_request_of(clients[number % len(clients)], next(ids)) for number in range(num_repeats)]
    choices, sent, ended, refusals, digests = [], [], [], [], []
    tokens = os.urandom(TOKEN_BYTES * 2600)
    for request in asked:
        hopeless = msgspec.structs.replace(request, deadline_ms=1.0, request_id=next(ids))
        took_us, refusal = _timed(router.choose, hopeless, 0.0)
        assert isinstance(refusal, Refusal)
        refusals.append(took_us)
        digests.append(_timed(prompt_digests, tokens, PAGE_SIZE, "", MAX_DIGESTS)[0])
        took_us, choice = _timed(router.choose, request, 0.0)
        assert isinstance(choice, Choice)
        choices.append(took_us)
        sent.append(_timed(router.sent, choice)[0])
        ended.append(_timed(_serve, router, choice)[0])
    return {
        "engines": num_engines,
        "pages": sum(len(request.digests) for request in asked) // len(asked),
        **{
            f"{name} {kind}": percentile(values, percent)
            for name, values in (
                ("digests", digests),
                ("choice", choices),
                ("sent", sent),
                ("served", ended),
                ("refusal", refusals),
            )
            for kind, percent in (("p50", 50), ("p99", 99))
        },
    }


def _filled(num_engines: int) -> tuple[Router, list[Client], Iterator[int]]:
    """Every client of every engine has a request open."""
    router, ids = Router(), count()
    for number in range(num_engines):
        router.joined(str(number), CAPACITY, 0.0)
        router.report(str(number), REPORT, 0.0)
    clients = [Client(number, 0, PAGE_SIZE, shares=True, has_tokens=False) for number in range(CLIENTS * num_engines)]
    for client in clients:
        choice = router.choose(_request_of(client, next(ids)), 0.0)
        assert isinstance(choice, Choice)
        router.sent(choice)
    return router, clients, ids


def _request_of(client: Client, request_id: int) -> RoutedRequest:
    turn = client.next_turn()
    return RoutedRequest(
        request_id=request_id,
        tenant="",
        digests=turn.digests,
        prompt_len=turn.prompt_len,
        max_tokens=256,
        arrived_s=0.0,
    )


def _serve(router: Router, choice: Choice) -> None:
    router.first_token(choice.request.request_id, choice.num_cached, 0.0)
    router.finished(choice.request.request_id, 100)


def _timed(call: Callable[_Given, _Found], *given: _Given.args, **named: _Given.kwargs) -> tuple[float, _Found]:
    """Microseconds of this thread, and what came of them."""
    begun_ns = time.thread_time_ns()
    found = call(*given, **named)
    return (time.thread_time_ns() - begun_ns) / 1000.0, found


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    parser = make_parser(__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[16, 256, 1000])
    parser.add_argument("--repeats", type=int, default=NUM_REPEATS)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args(arguments)
    gc.disable()  # a collection would be timed with whatever it interrupts
    try:
        rows = [measure(num_engines, options.repeats) for num_engines in options.engines]
    finally:
        gc.enable()
    about = machine("no device")
    show("CPU of routing one request, in microseconds", rows, about)
    write_json(options.json, rows, about)
    return rows


if __name__ == "__main__":
    run_script(main)
