"""AsyncEngine: many streams in one loop, and none that outlives its reader."""

import asyncio
from collections.abc import Iterator

import pytest

from graphgen import AsyncEngine, DeadlineError, EngineClosedError, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0)
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(device="cpu", token_budget=16, num_pages=160, cpu_threads=1)
    yield engine
    asyncio.run(engine.close())


async def read(engine: AsyncEngine, prompt: str, sampling: SamplingParams) -> str:
    return "".join([piece.text async for piece in engine.generate(prompt, sampling)])


async def wait_until_free(engine: AsyncEngine) -> None:
    for _ in range(200):
        stats = await engine.stats()
        if (stats.pages_free, stats.running, stats.waiting) == (stats.pages_total, 0, 0):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(stats)


def test_concurrent_streams_are_what_each_is_alone(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        prompts = ["ROMEO:\n", "To be, or", "A", "What, ho!"]
        alone = [await read(engine, prompt, GREEDY) for prompt in prompts]
        together = await asyncio.gather(*(read(engine, prompt, GREEDY) for prompt in prompts * 4))
        assert list(together) == alone * 4
        assert all(alone)

    asyncio.run(scenario())


def test_another_loop_may_use_the_engine_later(engine: AsyncEngine) -> None:
    first = asyncio.run(read(engine, "A", GREEDY))
    assert asyncio.run(read(engine, "A", GREEDY)) == first


def test_breaking_out_frees_the_pages(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        async for _ in engine.generate("A", ENDLESS):
            break
        await wait_until_free(engine)

    asyncio.run(scenario())


def test_closing_the_iterator_frees_the_pages_and_ends_it(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        stream = engine.generate("A", ENDLESS)
        await anext(stream)
        assert (await engine.stats()).running == 1
        await stream.aclose()
        await wait_until_free(engine)
        assert [piece async for piece in stream] == []

    asyncio.run(scenario())


def test_cancelling_the_task_frees_the_pages(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        tasks = [asyncio.create_task(read(engine, "A", ENDLESS)) for _ in range(3)]
        while (await engine.stats()).running < 3:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await wait_until_free(engine)

    asyncio.run(scenario())


def test_a_loop_that_ends_under_its_streams_frees_their_pages(engine: AsyncEngine) -> None:
    async def abandon() -> None:
        stream = engine.generate("A", ENDLESS)
        await anext(stream)

    asyncio.run(abandon())
    asyncio.run(wait_until_free(engine))


def test_a_bad_prompt_is_refused_by_the_call_itself(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidRequestError, match="empty"):
            engine.generate("")

    asyncio.run(scenario())


def test_a_refusal_is_raised_by_the_iterator(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        async for piece in engine.generate([1, 2, 3], SamplingParams(max_tokens=4)):
            assert piece.cached_tokens == 0
        with pytest.raises(DeadlineError):
            async for _ in engine.generate([1], SamplingParams(max_tokens=900, ignore_eos=True, deadline_ms=1.0)):
                pass

    asyncio.run(scenario())


def test_a_loop_is_not_held_up_by_the_start_and_closing_ends_its_streams() -> None:
    async def scenario() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.05)

        ticking = asyncio.create_task(tick())
        async with await AsyncEngine.create(device="cpu", token_budget=8, num_pages=160, cpu_threads=1) as engine:
            ticking.cancel()
            stream = engine.generate("A", ENDLESS)
            await anext(stream)
        with pytest.raises(EngineClosedError):
            [piece async for piece in stream]
        return ticks

    assert asyncio.run(scenario()) > 5
