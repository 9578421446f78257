"""What does an engine cost on a CPU, beside transformers? The time to ready, and a short prompt.

    python -m benchmarks.beside_transformers --model benchmarks/shapes/smollm2-135m --load-format dummy
    python -m benchmarks.beside_transformers --model FOLDER --prompt-tokens 40 --rounds 5

Both run in fresh programs, in float32 with one compute thread. "ready" counts from the start of the program. Then they
take turns: one prompt here, one there, all of them different, each to its first token. CPU time is that of every
process involved, from the prompt to its token: other programs on the machine do not show in it as they do in "wall",
and slow both down alike. transformers computes the logits of the last token alone, as the engine does.

The engine's cache is so small, and so many prompts come before those that count, that all of its pages have been
written to, as in an engine that has run for a while: memory that is used for the first time costs a page fault for
every 4 KiB. --fresh-pages leaves the engine the cache that it would take itself, which a prompt finds unused.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
from msgspec import Struct

from benchmarks.cpu_time import cpu_seconds, num_faults
from benchmarks.options import make_parser
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.launch.processes import process_age_s

ROOT = Path(__file__).resolve().parent.parent
THREADS = 1
PAGE_SIZE = 16
LEAST_PAGES = 32


class Case(Struct, frozen=True):
    """What both are asked to do."""

    model: str
    load_format: str
    prompt_tokens: int
    prompts: int
    fresh_pages: bool = False

    @property
    def num_pages(self) -> int:
        """Of a cache that a few prompts fill, but no smaller than a step."""
        return max(LEAST_PAGES, 8 * (self.prompt_tokens // PAGE_SIZE + 1))

    @property
    def num_warm_up(self) -> int:
        """Prompts before those that count: each leaves its full pages in the cache."""
        return 2 + self.num_pages // max(1, self.prompt_tokens // PAGE_SIZE)


class Ready(Struct, frozen=True):
    """A program that waits for its first turn."""

    ready_s: float
    first_ms: float  # wall time to the token of the first prompt


class Turn(Struct, frozen=True):
    """One prompt."""

    wall_ms: float
    cpu_ms: float
    faults: int


class Run(Struct, frozen=True):
    """One program, as it saw itself."""

    ready_s: float
    first_ms: float
    wall_ms: float  # of the later prompts, the median
    cpu_ms: float  # of the later prompts, the mean
    faults: float  # page faults of a later prompt, the mean


class Contender(NamedTuple):
    """A model that answers in this process, or with processes of its own."""

    vocab_size: int
    answer: Callable[[list[int]], None]  # to the first token
    pids: list[int]


@contextlib.contextmanager
def graphgen_contender(case: Case) -> Iterator[Contender]:
    """An engine."""
    config = EngineConfig(
        model=case.model,
        device="cpu",
        dtype="float32",
        cpu_threads=THREADS,
        load_format=case.load_format,  # type: ignore[arg-type]  # checked by EngineConfig
        page_size=PAGE_SIZE,
        num_pages=None if case.fresh_pages else case.num_pages,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with Engine(config) as engine:
        pids = [os.getpid(), *engine.pids.values()]
        yield Contender(engine.resolved.spec.vocab_size, lambda prompt: _answer(engine, prompt, sampling), pids)


def _answer(engine: Engine, prompt: list[int], sampling: SamplingParams) -> None:
    engine.generate([prompt], sampling)


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

    def answer(prompt: list[int]) -> None:
        with torch.inference_mode():
            model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax(-1).item()

    yield Contender(model.config.vocab_size, answer, [os.getpid()])


CONTENDERS = {"graphgen": graphgen_contender, "transformers": transformers_contender}


def take_turns(name: str, case: Case, turns: IO[bytes], replies: IO[bytes]) -> None:
    """Starts one of CONTENDERS, replies Ready, and answers a prompt for each line of `turns`, which has a reply."""
    with CONTENDERS[name](case) as contender:
        ready_s = process_age_s()
        first, warm_up, later = _prompts(case, contender.vocab_size)
        begun_s = time.perf_counter()
        contender.answer(first)
        first_ms = (time.perf_counter() - begun_s) * 1000.0
        for prompt in warm_up:
            contender.answer(prompt)
        _reply(replies, Ready(ready_s, first_ms))
        faults, cpu_s = num_faults(contender.pids), _cpu_s(contender)
        for prompt in later:
            if not turns.readline():
                break
            begun_s = time.perf_counter()
            contender.answer(prompt)
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
        command = [sys.executable, "-m", "benchmarks.beside_transformers", "--once", name]
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


def one_round(case: Case) -> dict[str, Run]:
    """Both programs, one after the other while they start, then in turns."""
    children = {name: Child(name, case) for name in CONTENDERS}
    for _ in range(case.prompts):
        for child in children.values():
            child.turn()
    return {name: child.end() for name, child in children.items()}


def rows_of(runs: dict[str, list[Run]]) -> list[Row]:
    """A row for each: medians over its runs, and its CPU time as a multiple of transformers' of the same round."""
    reference = runs["transformers"]
    return [
        {
            "program": name,
            "ready s": percentile([run.ready_s for run in of_one], 50),
            "first prompt ms": percentile([run.first_ms for run in of_one], 50),
            "later prompts ms": percentile([run.wall_ms for run in of_one], 50),
            "CPU ms a prompt": percentile([run.cpu_ms for run in of_one], 50),
            "faults a prompt": percentile([run.faults for run in of_one], 50),
            "CPU / transformers'": percentile(
                [run.cpu_ms / other.cpu_ms for run, other in zip(of_one, reference, strict=True)], 50
            ),
        }
        for name, of_one in runs.items()
    ]


def _prompts(case: Case, vocab_size: int) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """The first, those that fill the cache, and those that count."""
    rng, warm = random.Random(0), case.num_warm_up
    first, *others = (
        [rng.randrange(3, vocab_size) for _ in range(case.prompt_tokens)] for _ in range(1 + warm + case.prompts)
    )
    return first, others[:warm], others[warm:]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or of its config with --load-format dummy")
    parser.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=40, help="that count, of each round")
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
    case = Case(
        str(Path(options.model).absolute()),
        options.load_format,
        options.prompt_tokens,
        options.prompts,
        options.fresh_pages,
    )
    rounds = [one_round(case) for _ in range(options.rounds)]
    about = machine("cpu")
    rows = rows_of({name: [runs[name] for runs in rounds] for name in CONTENDERS})
    show(f"{options.prompt_tokens} tokens of prompt, one of output, {options.rounds} runs each", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    main()
