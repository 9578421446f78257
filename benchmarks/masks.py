"""What do the masks of a step cost the worker's processor? No GPU is needed, nothing is computed but masks.

    python -m benchmarks.masks tokenizer.json

STREAMS requests that follow the schemas of `benchmarks.constrained` draw tokens at random among those that their masks
allow: the worker's grammars (`graphgen.worker.grammars`) hear of a step's tokens and make the masks of the next, and
the masks are copied into one block. Processor time is that of all threads, so it counts what several share; the time
that passes is what a step has to wait if there is nothing else to do.
"""

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.constrained import SCHEMAS
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.calls.structured import JsonSchema
from graphgen.capture.buffers import Words
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.sampling import mask_words
from graphgen.requests.grammar_builder import Job, build
from graphgen.worker.grammar_compiler import GrammarCompiler
from graphgen.worker.grammars import Draw, GrammarSlots

PROMPT_LEN = 8
FIRST_STEPS = 8
"""Not counted: the lexers of a schema grow with their first uses."""
GUESSES = 20
"""At a token that is allowed, before all of them are listed."""


def allowed_token(mask: Words, vocab_size: int, chance: random.Random) -> int:
    for _ in range(GUESSES):
        token_id = chance.randrange(vocab_size)
        if mask[token_id // 32] >> (token_id % 32) & 1:
            return token_id
    return int(chance.choice(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]))


def prompts_plan(num_streams: int, grammar: str) -> StepPlan:
    """The prompts of all streams but their last tokens."""
    init = SlotInit(PROMPT_LEN, 0, (), SamplerParams(), grammar=grammar)
    length = PROMPT_LEN - 1
    return StepPlan(
        step_id=0,
        bucket=Bucket(num_streams * length, num_streams),
        chunks=tuple(Chunk(slot=slot, start=0, length=length, draws=False, init=init) for slot in range(num_streams)),
        chunk_token_ids=pack_int32([1] * length * num_streams),
        planned_s=0.0,
    )


def decodes_plan(num_streams: int, num_tokens: int) -> StepPlan:
    """num_tokens: that the output of each stream has."""
    return StepPlan(
        step_id=1 + num_tokens,
        bucket=Bucket(0, num_streams),
        decode_slots=pack_int32(list(range(num_streams))),
        decode_positions=pack_int32([PROMPT_LEN - 1 + num_tokens] * num_streams),
        planned_s=0.0,
    )


def wait_for_masks(grammars: GrammarSlots, plan: StepPlan) -> Sequence[Draw]:
    """A first mask takes longer than a step waits, since its grammar is compiled; then the step is as one that drew
    nothing, whose tokens are refused."""
    draws = grammars.open(plan)
    while any(draw.mask is None for draw in draws):
        grammars.judge(draws, [-1] * len(draws))
        draws = grammars.open(plan)
    return draws


def measure(compiler: GrammarCompiler, vocab_size: int, schema: str, num_streams: int, num_steps: int) -> Row:
    grammars, chance = GrammarSlots(compiler), random.Random(0)
    grammar = build(Job(JsonSchema(SCHEMAS[schema])))
    block = np.empty((num_streams, mask_words(vocab_size)), np.int32)
    grammars.judge(grammars.open(prompts_plan(num_streams, grammar)), [])
    draws = wait_for_masks(grammars, decodes_plan(num_streams, 0))
    passed_us, used_us = [], []
    for step in range(1, FIRST_STEPS + num_steps):
        masks = [draw.mask for draw in draws]
        token_ids = [allowed_token(mask, vocab_size, chance) for mask in masks if mask is not None]
        plan = decodes_plan(num_streams, step)
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        grammars.judge(draws, token_ids)
        draws = wait_for_masks(grammars, plan)
        for row, draw in enumerate(draws):
            assert draw.mask is not None, "it was waited for"
            block[row] = draw.mask
        if step >= FIRST_STEPS:
            used_us.append((time.process_time() - begun_cpu_s) / num_streams * 1e6)
            passed_us.append((time.perf_counter() - begun_s) / num_streams * 1e6)
    grammars.close()
    return {
        "schema": schema,
        "streams": num_streams,
        "CPU us a row, least": min(used_us),
        "p50": percentile(used_us, 50),
        "p90": percentile(used_us, 90),
        "passed us a row, least": min(passed_us),
        "p50 ": percentile(passed_us, 50),
        "p90 ": percentile(passed_us, 90),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--eos", type=int, default=1, help="its end-of-sequence token")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(arguments)
    from tokenizers import Tokenizer

    text = options.tokenizer.read_text()
    vocab_size = Tokenizer.from_str(text).get_vocab_size()
    compiler = GrammarCompiler(vocab_size, (options.eos,), lambda: TokenizerPart(text, options.eos))
    compiler.prepare()
    about = machine(f"{os.cpu_count()} cores")
    rows = [
        measure(compiler, vocab_size, schema, number, options.steps) for schema in SCHEMAS for number in options.streams
    ]
    show(f"Masks of {vocab_size} tokens", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    main()
