"""What do the masks of a step cost the worker's processor? No GPU is needed, nothing is computed but masks.

    python -m benchmarks.masks tokenizer.json

Requests that follow the schemas of `benchmarks.constrained` run ahead, as they do beside a device: each step is
launched before the tokens of the one before it are known. Then the worker's grammars (`graphgen.worker.grammars`) hear
of these, drawn at random among those that the masks allow, and make the masks of the launched step. The time until the
last of them is handed over is what that step must still take for all its draws to obey; the judging comes before the
step's result, for requests without a grammar too. Processor time is that of all threads.
"""

import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.constrained import SCHEMAS
from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.calls.structured import JsonSchema
from graphgen.capture.buffers import Words
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.worker_messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.requests.grammar_builder import Job, build
from graphgen.worker.background import share_interpreter_fairly
from graphgen.worker.grammar_compiler import GrammarCompiler
from graphgen.worker.grammars import GrammarSlots, LateMask, Verdicts, is_in_mask

PROMPT_LEN = 8
FIRST_STEPS = 8
"""Not counted: the lexers of a schema grow with their first uses."""
GUESSES = 20
"""At a token that is allowed, before all of them are listed."""


def allowed_token(mask: Words, vocab_size: int, chance: random.Random) -> int:
    for _ in range(GUESSES):
        token_id = chance.randrange(vocab_size)
        if is_in_mask(mask, token_id):
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


class Arrivals:
    """Masks by slot, and when the newest came."""

    def __init__(self, num_streams: int) -> None:
        self.masks: dict[int, Words] = {}
        self._num_streams = num_streams
        self._all_came = threading.Event()
        self._came_s = 0.0

    def expect(self) -> None:
        self.masks.clear()
        self._all_came.clear()

    def take(self, masks: Sequence[LateMask]) -> None:
        self.masks.update((mask.slot, mask.words) for mask in masks)
        self._came_s = time.perf_counter()
        if len(self.masks) == self._num_streams:
            self._all_came.set()

    def wait(self) -> float:
        """Returns when the last one came."""
        assert self._all_came.wait(10), f"{len(self.masks)} of {self._num_streams} masks came"
        return self._came_s


def measure(compiler: GrammarCompiler, vocab_size: int, schema: str, num_streams: int, num_steps: int) -> Row:
    arrivals, chance = Arrivals(num_streams), random.Random(0)
    grammars = GrammarSlots(compiler, arrivals.take)
    grammars.open(prompts_plan(num_streams, build(Job(JsonSchema(SCHEMAS[schema])))))
    draws = grammars.open(decodes_plan(num_streams, 0))
    arrivals.take([LateMask(draw.slot, draw.position, draw.mask) for draw in draws if draw.mask is not None])
    arrivals.wait()
    judged_ms, sent_ms, used_us = [], [], []
    for step in range(1, FIRST_STEPS + num_steps):
        ahead = grammars.open(decodes_plan(num_streams, step))
        token_ids = [allowed_token(arrivals.masks[draw.slot], vocab_size, chance) for draw in draws]
        arrivals.expect()
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        verdicts = grammars.judge(draws, token_ids)
        judged_s = time.perf_counter()
        assert verdicts == Verdicts((), ()), verdicts
        sent_s = arrivals.wait()
        if step >= FIRST_STEPS:
            judged_ms.append((judged_s - begun_s) * 1e3)
            sent_ms.append((sent_s - begun_s) * 1e3)
            used_us.append((time.process_time() - begun_cpu_s) / num_streams * 1e6)
        draws = ahead
    grammars.close()
    return {
        "schema": schema,
        "streams": num_streams,
        "judged in ms, p50": percentile(judged_ms, 50),
        "p99": percentile(judged_ms, 99),
        "masks made in ms, p50": percentile(sent_ms, 50),
        "p90 ": percentile(sent_ms, 90),
        "p99 ": percentile(sent_ms, 99),
        "CPU us a row, p50": percentile(used_us, 50),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--eos", type=int, help="its end-of-sequence token [default: the last one]")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(arguments)
    from tokenizers import Tokenizer

    text = options.tokenizer.read_text()
    vocab_size = Tokenizer.from_str(text).get_vocab_size()
    eos = vocab_size - 1 if options.eos is None else options.eos
    compiler = GrammarCompiler(vocab_size, (eos,), lambda: TokenizerPart(text, eos))
    compiler.prepare()
    share_interpreter_fairly()
    about = machine(f"{os.cpu_count()} cores")
    rows = [
        measure(compiler, vocab_size, schema, number, options.steps) for schema in SCHEMAS for number in options.streams
    ]
    show(f"Masks of {vocab_size} tokens", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
