"""How requests are sent to an engine, and when: in a closed or an open loop, with what they ask for.

Owns no figures: the time of each token goes to `benchmarks.serving`, which calls this.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from msgspec import Struct

from benchmarks.levels import RequestLevel
from benchmarks.metrics import ServedRequest
from benchmarks.workload import PlannedRequest
from graphgen import InvalidRequestError, SamplingParams
from graphgen.api.core import EngineCore
from graphgen.calls.outputs import Delivery, RequestOutput
from graphgen.calls.streams import AsyncStream, Mailbox

Reader = Callable[[PlannedRequest], Awaitable[tuple[float, ...]]]
"""Sends a request and waits for its last token: the time of each token since it was sent."""


class Targets(Struct, frozen=True):
    """What requests ask for: a level, or gaps of at most `itl_ms` and a first token in time; without both, nothing."""

    itl_ms: float | None = None
    prompt_rate: float = 512.0  # with itl_ms the first token is due after prompt tokens / rate seconds
    level: RequestLevel | None = None

    def sampling_of(self, request: PlannedRequest) -> SamplingParams:
        ttft_ms = tpot_ms = None
        if self.level is not None:
            ttft_ms, tpot_ms = 1000.0 * self.level.ttft_s, 1000.0 * self.level.tpot_s
        elif self.itl_ms is not None:
            ttft_ms = len(request.prompt_token_ids) / self.prompt_rate * 1000.0
        return SamplingParams(
            temperature=0.0,
            max_tokens=request.output_len,
            ignore_eos=True,
            itl_target_ms=self.itl_ms,
            ttft_target_ms=ttft_ms,
            tpot_target_ms=tpot_ms,
        )


def whole_reader(core: EngineCore, targets: Targets) -> Reader:
    """The engine keeps the times; this process wakes once a request, so measuring costs nothing per token."""
    loop = asyncio.get_running_loop()

    async def read(request: PlannedRequest) -> tuple[float, ...]:
        done: asyncio.Future[Delivery] = loop.create_future()

        def sink(delivery: Delivery) -> None:
            loop.call_soon_threadsafe(done.set_result, delivery)

        core.open([request.prompt_token_ids], targets.sampling_of(request), streams=False, sinks=[sink])
        output = await done
        if isinstance(output, Exception):
            raise output
        assert isinstance(output, RequestOutput), "a request that does not stream gets its output"
        return output.timing.token_times_s

    return read


def stream_reader(core: EngineCore, targets: Targets) -> Reader:
    """Takes the time where a user's task gets the token: what AsyncEngine.generate gives, with the loop's delays."""
    mailbox = Mailbox(asyncio.get_running_loop())

    async def read(request: PlannedRequest) -> tuple[float, ...]:
        sent_s = time.monotonic()
        times: list[float] = []
        sampling = targets.sampling_of(request)
        async for piece in AsyncStream(core, mailbox, request.prompt_token_ids, sampling):
            times += [time.monotonic() - sent_s] * len(piece.token_ids)
        return tuple(times)

    return read


async def serve(request: PlannedRequest, read: Reader) -> ServedRequest:
    """A refused request is a failed one; an engine that dies ends the benchmark."""
    sent_s = time.monotonic()
    prompt_len = len(request.prompt_token_ids)
    try:
        return ServedRequest(prompt_len, sent_s, await read(request))
    except InvalidRequestError as error:
        return ServedRequest(prompt_len, sent_s, (), str(error))


async def closed_loop(requests: Iterable[PlannedRequest], clients: int, read: Reader) -> list[ServedRequest]:
    """The next request goes to the client that is free first."""
    waiting = iter(requests)
    served: list[ServedRequest] = []

    async def client() -> None:
        for request in waiting:
            served.append(await serve(request, read))

    await asyncio.gather(*(client() for _ in range(clients)))
    return served


async def open_loop(requests: Iterable[PlannedRequest], read: Reader) -> list[ServedRequest]:
    """Every request at its time, whatever has become of those before it."""
    begun_s = time.monotonic()

    async def arrive(request: PlannedRequest) -> ServedRequest:
        await asyncio.sleep(begun_s + request.arrival_s - time.monotonic())
        return await serve(request, read)

    return await asyncio.gather(*map(arrive, requests))
