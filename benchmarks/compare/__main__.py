"""How do other engines fare with the same jobs on the same machine? One command, one table.

    python -m benchmarks.compare --model FOLDER --workload 2600/60:16 --workload 1200/128:64 --json compare.json
    python -m benchmarks.compare --model FOLDER --engine graphgen --engine "vLLM 512=vllm --max-num-batched-tokens 512"
    python -m benchmarks.compare --figures benchmarks/compare/h200-2026-11-28.json --table --plot h200.png

Each engine is served as its own users serve it, one after the other, with its own defaults: graphgen by `graphgen
serve` with HTTP, vLLM and SGLang by their servers of OpenAI's API. All get the same requests, token ids in, over that
API; the times are those of the client. Workloads are those of `benchmarks.serving`, greedy, end of sequence ignored.
Then --decodes requests of --context tokens decode together, and the median gap counts.

An engine that is not installed has no rows, and the table says how to install it; one that does not start says why, and
the others go on. Engines that want another torch than graphgen live in environments of their own: --python
vllm=/opt/vllm/bin/python. With --load-format dummy a folder needs no weights, and without a tokenizer it gets a made-up
one.

--figures measures nothing: it prints and draws a file that --json wrote. The picture needs matplotlib (extra `bench`).
"""

import argparse
import asyncio
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from benchmarks.compare.engines import ENGINES, Contender, Job, Served, serving
from benchmarks.compare.figures import About, Cells, Comparison, ServedRow, markdown, read
from benchmarks.compare.requests import http_reader
from benchmarks.constrained import write_tokenizer
from benchmarks.metrics import ServedRequest, ServiceLevel, summarize
from benchmarks.options import count, make_parser, run_script
from benchmarks.report import machine, percentile
from benchmarks.sending import closed_loop, open_loop
from benchmarks.workload import PlannedRequest, Workload
from graphgen.models.families import load_spec

LEVEL = ServiceLevel(itl_s=0.02)
"""What the column of requests in time is about."""


class Plan(Struct, frozen=True):
    """What is asked of every engine."""

    job: Job
    vocab_size: int
    workloads: tuple[Workload, ...]
    decodes: tuple[int, ...]
    context: int
    tokens: int  # of each of the requests that decode together
    seed: int
    timeout_s: float  # of a start
    settle_s: float  # between the first requests and those that count


class Measured(Struct, frozen=True):
    """One engine."""

    rows: list[ServedRow]
    decodes_ms: dict[int, float | None]
    ready_s: float


def measure(contender: Contender, python: str, plan: Plan, log: Path) -> Measured:
    """All of its rows, in one server. Raises RuntimeError where that does not start."""
    engine = ENGINES[contender.engine]

    def command(port: int) -> list[str]:
        return [python, *engine.arguments(plan.job, port), *contender.more]

    with serving(command, log, plan.timeout_s) as served:
        model = _model_of(served)
        # What a server leaves to its first requests is no part of a workload.
        _send(served, model, _alike(1, 8, 4, plan, plan.seed - 1), 1)
        time.sleep(plan.settle_s)
        decodes = {count: _gap_ms(served, model, count, plan) for count in plan.decodes}
        rows = [
            _row(contender.label, served, model, load, plan.seed + n, plan) for n, load in enumerate(plan.workloads)
        ]
        return Measured(rows, decodes, served.ready_s)


def _row(label: str, served: Served, model: str, load: Workload, seed: int, plan: Plan) -> ServedRow:
    requests = load.requests(seed, plan.vocab_size, plan.job.max_model_len)
    done = _send(served, model, requests, load.clients)
    if errors := [request.error for request in done if request.error is not None]:
        print(f"{label}, {load.label}: {len(errors)} of {len(done)} requests failed, the first: {errors[0]}")
    figures = summarize(done, [LEVEL]) | {"workload": load.label, "engine": label}
    names = (field for field in ServedRow.__struct_fields__)
    return msgspec.convert({name: 0.0 if (value := figures[name]) is None else value for name in names}, ServedRow)


def _send(served: Served, model: str, requests: Sequence[PlannedRequest], clients: int | None) -> list[ServedRequest]:
    reader = http_reader(served.url, model)
    return asyncio.run(open_loop(requests, reader) if clients is None else closed_loop(requests, clients, reader))


def _gap_ms(served: Served, model: str, count: int, plan: Plan) -> float | None:
    """The median gap between two tokens while all requests decode; None where one failed, or never all decoded."""
    tokens = plan.tokens + count  # the first one still decodes when the last prompt is computed
    done = _send(served, model, _alike(count, plan.context, tokens, plan, plan.seed + 1000 + count), count)
    if any(len(request.token_times_s) < 2 for request in done):
        return None
    begun = max(request.sent_s + request.token_times_s[0] for request in done)
    ended = min(request.ended_s for request in done)
    moments = [[request.sent_s + at for at in request.token_times_s] for request in done]
    together = [[at for at in of_one if begun <= at <= ended] for of_one in moments]
    gaps = [(after - before) * 1000.0 for of_one in together for before, after in itertools.pairwise(of_one)]
    return percentile(gaps, 50) if gaps else None


def _alike(count: int, prompt_len: int, output_len: int, plan: Plan, seed: int) -> list[PlannedRequest]:
    chance = np.random.default_rng(seed)
    prompt_len = max(1, min(prompt_len, plan.job.max_model_len - output_len))
    prompts = (chance.integers(plan.vocab_size, size=prompt_len).tolist() for _ in range(count))
    return [PlannedRequest(0.0, prompt, output_len) for prompt in prompts]


def _model_of(served: Served) -> str:
    """As the server calls it."""
    with urllib.request.urlopen(f"{served.url}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def compare(contenders: Sequence[Contender], pythons: dict[str, str], plan: Plan, folder: Path) -> Comparison:
    """Every engine that is there, one after the other. folder: for what the servers print."""
    versions: dict[str, str] = {}
    measured: dict[str, Measured] = {}
    absent: dict[str, str] = {}
    for number, contender in enumerate(contenders):
        engine, python = ENGINES[contender.engine], pythons.get(contender.engine, sys.executable)
        if (version := engine.version(python)) is None:
            absent[contender.label] = f"not installed for {python}: {engine.install}"
            continue
        print(f"{contender.label} {version} ...", flush=True)
        try:
            measured[contender.label] = measure(contender, python, plan, folder / f"{number}.log")
        except RuntimeError as error:
            absent[contender.label] = str(error)
            continue
        versions[contender.label] = " ".join((version, *contender.more)) if contender.more else f"{version}, defaults"
    rows = [
        row for load in plan.workloads for one in measured.values() for row in one.rows if row.workload == load.label
    ]
    decodes: list[Cells] = [
        {"decodes": count, **{label: one.decodes_ms[count] for label, one in measured.items()}}
        for count in plan.decodes
    ]
    start: Cells = {"what": "start to ready, s", **{label: one.ready_s for label, one in measured.items()}}
    return Comparison(
        about=_about(plan, versions),
        rows=rows,
        decodes_about=f"median gap in ms when all requests decode, prompts of {plan.context} tokens",
        decodes=decodes,
        start_s=[start] if measured else [],
        absent=absent,
    )


def _about(plan: Plan, versions: dict[str, str]) -> About:
    here = machine(_device())
    weights = "random weights" if plan.job.random_weights else "the checkpoint's weights"
    return About(
        device=here["device"],
        date=here["date"],
        host=here["host"],
        model=f"{Path(plan.job.model).name}, {weights}; greedy, end of sequence ignored, token ids in,"
        f" max_model_len {plan.job.max_model_len}",
        load="lengths are normal with a standard deviation of 0.3 of the mean; every engine gets the same ids over"
        " OpenAI's API, streamed, one engine after the other",
        engines=versions,
        in_time="requests a second whose first token came within a second per 512 prompt tokens and whose moving"
        " average (span 16) of gaps stayed within 20 ms at every token",
    )


def _device() -> str:
    """Asked of a process of its own, which leaves the device alone afterwards."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() or "unknown"


@contextmanager
def complete_folder(model: Path, random_weights: bool) -> Iterator[Path]:
    """The model's folder; with a made-up tokenizer in a copy, where weights are random and it has none."""
    if not random_weights or (model / "tokenizer.json").exists():
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / model.name
        copy.mkdir()
        shutil.copy(model / "config.json", copy)
        write_tokenizer(copy, _vocab_size(model))
        yield copy


def _vocab_size(model: Path) -> int:
    return load_spec(model).vocab_size


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, or of its config with --load-format dummy")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--dtype", help="default: the checkpoint's")
    parser.add_argument(
        "--engine", action="append", default=[], help=f"{', '.join(ENGINES)}, or LABEL=ENGINE ARGUMENTS"
    )
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="its interpreter")
    parser.add_argument("--workload", action="append", default=[], help="PROMPT/OUTPUT:CLIENTS, as in serving")
    parser.add_argument("--num-requests", type=count, help="of each workload; default 4 a client and 32 more")
    parser.add_argument("--decodes", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of requests that decode together")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each while all decode")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20), help="default: another in each run")
    parser.add_argument(
        "--settle", type=float, default=15.0, metavar="SECONDS", help="left to each server for what it does when idle"
    )
    parser.add_argument("--start-timeout", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here, too")
    parser.add_argument("--figures", type=Path, help="measure nothing: take this file")
    parser.add_argument("--plot", type=Path, help="draw the picture here")
    parser.add_argument("--table", action="store_true", help="print the tables of --figures")
    return parser


def _measured(options: argparse.Namespace) -> Comparison:
    """Raises ValueError."""
    contenders = [Contender.parse(text) for text in options.engine or ENGINES]
    pythons = dict(text.split("=", 1) for text in options.python)
    workloads = tuple(Workload.parse(text, options.num_requests) for text in options.workload)
    is_random = options.load_format == "dummy"
    with complete_folder(options.model.absolute(), is_random) as model, tempfile.TemporaryDirectory() as logs:
        plan = Plan(
            job=Job(str(model), is_random, options.max_model_len, options.dtype),
            vocab_size=_vocab_size(model),
            workloads=workloads,
            decodes=tuple(options.decodes),
            context=options.context,
            tokens=options.tokens,
            seed=options.seed,
            timeout_s=options.start_timeout,
            settle_s=options.settle,
        )
        return compare(contenders, pythons, plan, Path(logs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.figures is None):
        parser.error("give --model to measure, or --figures for a file that is there")
    try:
        found = read(options.figures) if options.figures is not None else _measured(options)
    except ValueError as error:
        parser.error(str(error))
    if options.table or options.figures is None:
        print(markdown(found))
    if options.markdown is not None:
        options.markdown.write_text(markdown(found) + "\n")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if options.plot is not None:
        from benchmarks.compare.picture import plot_comparison  # matplotlib is an extra

        plot_comparison(found, options.plot)


if __name__ == "__main__":
    run_script(main)
