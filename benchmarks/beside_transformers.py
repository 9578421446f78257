"""What does an engine cost on a CPU, beside transformers? The time to ready, and a short prompt.

    python -m benchmarks.beside_transformers --model benchmarks/shapes/smollm2-135m --load-format dummy
    python -m benchmarks.beside_transformers --model FOLDER --prompt-tokens 40 --rounds 5

Both run in fresh programs that take turns, in float32 with one compute thread. "ready" counts from the start of the
program; then each is asked for the first token of one prompt after another, all of them different. CPU time is that of
every process involved, from the prompt to its token: other programs on the machine do not show in it as they do in
"wall". transformers computes the logits of the last token alone, as the engine does.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.cpu_time import CpuMeter
from benchmarks.options import make_parser
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.launch.processes import process_age_s

ROOT = Path(__file__).resolve().parent.parent
THREADS = 1


class Case(Struct, frozen=True):
    """What both are asked to do."""

    model: str
    load_format: str
    prompt_tokens: int
    prompts: int


class Run(Struct, frozen=True):
    """One program, as it saw itself."""

    ready_s: float
    first_ms: float  # wall time to the token of the first prompt
    wall_ms: float  # of the later ones, the median
    cpu_ms: float  # of the later ones, the mean


def run_graphgen(case: Case) -> Run:
    """Starts an engine in this process, which should be fresh."""
    config = EngineConfig(
        model=case.model,
        device="cpu",
        dtype="float32",
        cpu_threads=THREADS,
        load_format=case.load_format,  # type: ignore[arg-type]  # checked by EngineConfig
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with Engine(config) as engine:
        ready_s = process_age_s()
        first, *others = _prompts(case, engine.resolved.spec.vocab_size)
        first_ms = engine.generate([first], sampling)[0].timing.total_s * 1000.0
        meter, own_s = CpuMeter(engine.pids), time.process_time()
        walls = [engine.generate([prompt], sampling)[0].timing.total_s * 1000.0 for prompt in others]
        cpu_s = sum(meter.read().values()) + time.process_time() - own_s
    return Run(ready_s, first_ms, percentile(walls, 50), cpu_s / len(others) * 1000.0)


def run_transformers(case: Case) -> Run:
    """The same with the model in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    if case.load_format == "dummy":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.model), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    model.eval()
    ready_s = process_age_s()

    def token_ms(prompt: list[int]) -> float:
        begun_s = time.perf_counter()
        with torch.inference_mode():
            model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
        return (time.perf_counter() - begun_s) * 1000.0

    first, *others = _prompts(case, model.config.vocab_size)
    first_ms = token_ms(first)
    begun_s = time.process_time()
    walls = [token_ms(prompt) for prompt in others]
    cpu_s = time.process_time() - begun_s
    return Run(ready_s, first_ms, percentile(walls, 50), cpu_s / len(others) * 1000.0)


RUNS = {"graphgen": run_graphgen, "transformers": run_transformers}


def in_new_process(name: str, case: Case, timeout_s: float) -> Run:
    """One of RUNS in a program of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.beside_transformers", "--once", name],
        input=msgspec.json.encode(case),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=timeout_s,
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}: what it printed is above")
    return msgspec.json.decode(done.stdout, type=Run)


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
            "CPU / transformers'": percentile(
                [run.cpu_ms / other.cpu_ms for run, other in zip(of_one, reference, strict=True)], 50
            ),
        }
        for name, of_one in runs.items()
    ]


def _prompts(case: Case, vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocab_size) for _ in range(case.prompt_tokens)] for _ in range(case.prompts + 1)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or of its config with --load-format dummy")
    parser.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=20, help="of each run, besides the first one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--once", choices=list(RUNS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        run = RUNS[options.once](msgspec.json.decode(sys.stdin.buffer.read(), type=Case))
        sys.stdout.buffer.write(msgspec.json.encode(run))
        return
    if not options.model:
        parser.error("--model is missing: give a folder")
    case = Case(str(Path(options.model).absolute()), options.load_format, options.prompt_tokens, options.prompts)
    runs: dict[str, list[Run]] = {name: [] for name in RUNS}
    for _ in range(options.rounds):
        for name in RUNS:
            runs[name].append(in_new_process(name, case, options.timeout))
    about = machine("cpu")
    rows = rows_of(runs)
    show(f"{options.prompt_tokens} tokens of prompt, one of output, {options.rounds} runs each", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    main()
