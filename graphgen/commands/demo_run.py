"""What `graphgen demo` runs: prompts of many lengths at once on the embedded model, one of them shown as it is made.

Owns the choice of prompts and the figures made from the outputs. Prints nothing; `commands.cli` shows what it returns.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from graphgen.api.engine import Engine
from graphgen.calls.outputs import RequestOutput
from graphgen.calls.sampling_params import SamplingParams
from graphgen.demo import play_file
from graphgen.ipc.engine_messages import EngineStats

STREAMED_PROMPT = "ROMEO:\n"
PROMPT_CHARACTERS = (40, 1500, 80, 1200, 160, 700, 24, 1500, 320, 1500, 60, 480)
"""Lengths of the other prompts, about: long ones among short ones, as a serving engine meets them."""


class DemoFigures(Struct, frozen=True):
    """What the demo measured, as the program saw it. Times in seconds."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    ttft_s: tuple[float, ...]  # of each request
    itl_s: tuple[float, ...]  # of each pair of tokens
    stats: EngineStats


def run_demo(engine: Engine, max_tokens: int, show: Callable[[str], None]) -> DemoFigures:
    """Serves all prompts at once; `show` gets the text of the streamed one, piece by piece."""
    prompts = background_prompts()
    samplings = [
        SamplingParams(max_tokens=max_tokens, temperature=0.8, top_p=0.95, ignore_eos=True, seed=seed)
        for seed in range(1 + len(prompts))
    ]
    started_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(engine.generate, prompts, samplings[1:])
        show(STREAMED_PROMPT)
        times_s: list[float] = []
        for piece in engine.stream(STREAMED_PROMPT, samplings[0]):
            times_s.append(time.monotonic() - started_s)
            show(piece.text)
        outputs = others.result()
    return _figures(outputs, times_s, time.monotonic() - started_s, engine.stats())


def background_prompts() -> list[str]:
    """Passages of the play, each from the beginning of a speech, from the part that the model was not trained on."""
    play = play_file().read_text()
    held_out = play[len(play) - len(play) // 10 :]
    prompts = []
    start = 0
    for num_characters in PROMPT_CHARACTERS:
        start = held_out.index("\n\n", start) + 2
        prompts.append(held_out[start : start + num_characters].rstrip())
        start += num_characters
    return prompts


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed (nearest rank); 0 for none."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1] if ordered else 0.0


def _figures(
    outputs: Sequence[RequestOutput], streamed_times_s: Sequence[float], seconds: float, stats: EngineStats
) -> DemoFigures:
    times = [list(output.timing.token_times_s) for output in outputs] + [list(streamed_times_s)]
    return DemoFigures(
        num_requests=len(times),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        output_tokens=sum(len(one) for one in times),
        seconds=seconds,
        ttft_s=tuple(one[0] for one in times if one),
        itl_s=tuple(later - earlier for one in times for earlier, later in itertools.pairwise(one)),
        stats=stats,
    )
