"""What do requests cost on a CPU, beside transformers and CTranslate2? CPU time, and the time to ready.

    python -m benchmarks.compare.cpu --model benchmarks/shapes/smollm2-135m --load-format dummy
    python -m benchmarks.compare.cpu --model FOLDER --requests 8 --tokens 24 --program graphgen --program ctranslate2

All run in fresh programs, with one compute thread. "ready" counts from the start of the program. Then they take turns:
--requests prompts at once here, as many there, all of them different, --tokens tokens each. CPU time is that of every
process involved, from the prompts to their last token: other programs on the machine do not show in it as they do in
"wall", and slow all down alike. By default a turn is one prompt to its first token; transformers computes the logits of
the last token alone, as the engine does.

The engine's cache is so small, and so many prompts come before those that count, that all of its pages have been
written to, as in an engine that has run for a while: memory that is used for the first time costs a page fault for
every 4 KiB. --fresh-pages leaves the engine the cache that it would take itself, which a prompt finds unused.

CTranslate2 (`pip install ctranslate2`) takes a checkpoint with its tokenizer, which its own converter makes over.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
from msgspec import Struct

from benchmarks.cpu_time import cpu_seconds, num_faults
from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.launch.processes import process_age_s

ROOT = Path(__file__).resolve().parents[2]
THREADS = 1
PAGE_SIZE = 16
LEAST_PAGES = 32


class Case(Struct, frozen=True):
    """What all are asked to do."""

    model: str
    load_format: str
    prompt_tokens: int
    turns: int
    fresh_pages: bool = False
    requests: int = 1  # of a turn, all at once
    tokens: int = 1  # that each of them gets
    converted: str = ""  # the same model as CTranslate2 reads it

    @property
    def num_pages(self) -> int:
        """Of a cache that a few prompts fill, but no smaller than a step."""
        return max(LEAST_PAGES, 8 * self.requests * self._pages_of_request)

    @property
    def _pages_of_request(self) -> int:
        return (self.prompt_tokens + self.tokens) // PAGE_SIZE + 1

    @property
    def num_warm_up(self) -> int:
        """Turns before those that count: each leaves its full pages in the cache."""
        return 2 + self.num_pages // max(1, self.requests * (self.prompt_tokens // PAGE_SIZE))


class Ready(Struct, frozen=True):
    """A program that waits for its first turn."""

    ready_s: float
    first_ms: float  # wall time of its first turn


class Turn(Struct, frozen=True):
    """The prompts that are sent at once."""

    wall_ms: float
    cpu_ms: float
    faults: int


class Run(Struct, frozen=True):
    """One program, as it saw itself."""

    ready_s: float
    first_ms: float
    wall_ms: float  # of the later turns, the median
    cpu_ms: float  # of the later turns, the mean
    faults: float  # page faults of a later turn, the mean


Prompts = list[list[int]]


class Contender(NamedTuple):
    """A model that answers in this process, or with processes of its own."""

    vocab_size: int
    answer: Callable[[Prompts], None]  # to the last token of all
    pids: list[int]


@contextlib.contextmanager
def graphgen_contender(case: Case, **settings: Any) -> Iterator[Contender]:  # Any: of EngineConfig, which checks them
    """An engine."""
    how: dict[str, Any] = {"dtype": "float32", **settings}
    config = EngineConfig(
        model=case.model,
        device="cpu",
        cpu_threads=THREADS,
        load_format=case.load_format,  # type: ignore[arg-type]  # checked by EngineConfig
        page_size=PAGE_SIZE,
        num_pages=None if case.fresh_pages else case.num_pages,
        **how,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=case.tokens, ignore_eos=True)
    with Engine(config) as engine:
        pids = [os.getpid(), *engine.pids.values()]
        yield Contender(engine.resolved.spec.vocab_size, lambda prompts: _answer(engine, prompts, sampling), pids)


def _answer(engine: Engine, prompts: Prompts, sampling: SamplingParams) -> None:
    engine.generate(prompts, sampling)


@contextlib.contextmanager
def transformers_contender(case: Case) -> Iterator[Contender]:
    """The same model in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    if case.load_format == "dummy":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.model), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    model.eval()

    def answer(prompts: Prompts) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            if case.tokens == 1:
                model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
            else:
                count = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **count)

    yield Contender(model.config.vocab_size, answer, [os.getpid()])


@contextlib.contextmanager
def ctranslate2_contender(case: Case, compute_type: str = "float32") -> Iterator[Contender]:
    """The converted model in this process."""
    import ctranslate2

    generator = ctranslate2.Generator(
        case.converted, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=THREADS
    )
    words: list[str] = json.loads((Path(case.converted) / "vocabulary.json").read_bytes())

    def answer(prompts: Prompts) -> None:
        generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=case.tokens,
            min_length=case.tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )

    yield Contender(len(words), answer, [os.getpid()])


CONTENDERS: dict[str, Callable[[Case], contextlib.AbstractContextManager[Contender]]] = {
    "graphgen": graphgen_contender,
    "graphgen bfloat16": partial(graphgen_contender, dtype="bfloat16"),
    "graphgen int8": partial(graphgen_contender, dtype="bfloat16", quantization="int8"),
    "graphgen int4": partial(graphgen_contender, dtype="bfloat16", quantization="int4"),
    "transformers": transformers_contender,
    "ctranslate2": ctranslate2_contender,
    "ctranslate2 int8": partial(ctranslate2_contender, compute_type="int8_float32"),
}
"""In float32, but where the name says otherwise; int8 and int4 of graphgen are weights that bfloat16 multiplies."""


@contextlib.contextmanager
def converted(model: str, programs: Sequence[str]) -> Iterator[str]:
    """A folder with the model as CTranslate2 reads it, where that is among the programs."""
    if not any(name.startswith("ctranslate2") for name in programs):
        yield ""
        return
    if find_spec("ctranslate2") is None:
        raise SystemExit("ctranslate2 is not installed: pip install ctranslate2, or leave it out")
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as folder:
        yield str(TransformersConverter(model).convert(f"{folder}/model"))


def take_turns(name: str, case: Case, turns: IO[bytes], replies: IO[bytes]) -> None:
    """Starts one of CONTENDERS, replies Ready, and takes a turn for each line of `turns`, which has a reply."""
    with CONTENDERS[name](case) as contender:
        ready_s = process_age_s()
        first, warm_up, later = _turns(case, contender.vocab_size)
        begun_s = time.perf_counter()
        contender.answer(first)
        first_ms = (time.perf_counter() - begun_s) * 1000.0
        for prompts in warm_up:
            contender.answer(prompts)
        _reply(replies, Ready(ready_s, first_ms))
        faults, cpu_s = num_faults(contender.pids), _cpu_s(contender)
        for prompts in later:
            if not turns.readline():
                break
            begun_s = time.perf_counter()
            contender.answer(prompts)
            wall_s = time.perf_counter() - begun_s
            # What an engine still does after its answer counts for the turn after it.
            faults_before, cpu_before_s = faults, cpu_s
            faults, cpu_s = num_faults(contender.pids), _cpu_s(contender)
            _reply(replies, Turn(wall_s * 1000.0, (cpu_s - cpu_before_s) * 1000.0, faults - faults_before))


def _cpu_s(contender: Contender) -> float:
    """Of all processes. This one's clock is finer than what the system says of others."""
    others = sum(cpu_seconds(pid) for pid in contender.pids if pid != os.getpid())
    return time.process_time() + others


def _reply(replies: IO[bytes], reply: Struct) -> None:
    replies.write(msgspec.json.encode(reply) + b"\n")
    replies.flush()


class Child:
    """A program of its own that takes turns."""

    def __init__(self, name: str, case: Case) -> None:
        """Returns when it is ready."""
        self._name = name
        command = [sys.executable, "-m", "benchmarks.compare.cpu", "--once", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        self._say(msgspec.json.encode(case))
        self._ready = msgspec.json.decode(self._hear(), type=Ready)
        self._turns: list[Turn] = []

    def turn(self) -> None:
        self._say(b"")
        self._turns.append(msgspec.json.decode(self._hear(), type=Turn))

    def end(self) -> Run:
        self._process.communicate()
        return Run(
            self._ready.ready_s,
            self._ready.first_ms,
            percentile([turn.wall_ms for turn in self._turns], 50),
            sum(turn.cpu_ms for turn in self._turns) / len(self._turns),
            sum(turn.faults for turn in self._turns) / len(self._turns),
        )

    def _say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with exit code {self._process.wait()}: what it printed is above")
        return line


def one_round(case: Case, programs: Sequence[str]) -> dict[str, Run]:
    """The programs, one after the other while they start, then in turns."""
    children = {name: Child(name, case) for name in programs}
    for _ in range(case.turns):
        for child in children.values():
            child.turn()
    return {name: child.end() for name, child in children.items()}


def rows_of(runs: dict[str, list[Run]], reference: str) -> list[Row]:
    """A row for each: medians over its runs, and its CPU time as a multiple of the reference's of the same round."""
    compared = runs[reference]
    return [
        {
            "program": name,
            "ready s": percentile([run.ready_s for run in of_one], 50),
            "first turn ms": percentile([run.first_ms for run in of_one], 50),
            "later turns ms": percentile([run.wall_ms for run in of_one], 50),
            "CPU ms a turn": percentile([run.cpu_ms for run in of_one], 50),
            "faults a turn": percentile([run.faults for run in of_one], 50),
            f"CPU / {reference}'s": percentile(
                [run.cpu_ms / other.cpu_ms for run, other in zip(of_one, compared, strict=True)], 50
            ),
        }
        for name, of_one in runs.items()
    ]


def _turns(case: Case, vocab_size: int) -> tuple[Prompts, list[Prompts], list[Prompts]]:
    """The first, those that fill the cache, and those that count."""
    rng, warm = random.Random(0), case.num_warm_up
    first, *others = (
        [[rng.randrange(3, vocab_size) for _ in range(case.prompt_tokens)] for _ in range(case.requests)]
        for _ in range(1 + warm + case.turns)
    )
    return first, others[:warm], others[warm:]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or of its config with --load-format dummy")
    parser.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], default="auto")
    parser.add_argument(
        "--program", action="append", choices=list(CONTENDERS), help="graphgen and transformers if none"
    )
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--requests", type=int, default=1, help="of a turn, all at once")
    parser.add_argument("--tokens", type=int, default=1, help="that each request gets")
    parser.add_argument("--turns", type=int, default=40, help="that count, of each round")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--fresh-pages", action="store_true", help="a cache of the size that the engine chooses")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--once", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        case = msgspec.json.decode(sys.stdin.buffer.readline(), type=Case)
        take_turns(options.once, case, sys.stdin.buffer, sys.stdout.buffer)
        return
    if not options.model:
        parser.error("--model is missing: give a folder")
    programs: list[str] = list(dict.fromkeys(options.program or ["graphgen", "transformers"]))
    if options.load_format == "dummy" and any(name.startswith("ctranslate2") for name in programs):
        parser.error("ctranslate2 has no random weights: give a checkpoint")
    model = str(Path(options.model).absolute())
    with converted(model, programs) as folder:
        case = Case(
            model,
            options.load_format,
            options.prompt_tokens,
            options.turns,
            options.fresh_pages,
            options.requests,
            options.tokens,
            folder,
        )
        rounds = [one_round(case, programs) for _ in range(options.rounds)]
    about = machine("cpu")
    rows = rows_of({name: [runs[name] for runs in rounds] for name in programs}, programs[-1])
    sizes = f"{options.requests} x {options.prompt_tokens} tokens of prompt, {options.tokens} of output"
    show(f"{sizes}, {options.rounds} runs each", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
