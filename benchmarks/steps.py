"""How long is a step of each bucket? Every bucket with all its rows live, timed on the device, one after another.

    python -m benchmarks.steps --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384

Runs the worker's runner in this process: no scheduler, no sockets. Decode rows attend to --context positions; prompt
rows are one chunk that starts at --prompt-start. The KV cache holds random numbers, so that no kernel meets zeros.
"""

from pathlib import Path

import torch

from benchmarks.options import add_engine_options, engine_settings, make_parser
from benchmarks.report import machine, percentile, show, write_json
from graphgen.config import EngineConfig, LaunchConfig, resolve
from graphgen.demo import model_folder
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.models.families import load_spec
from graphgen.worker.runner import ModelRunner


def deal_pages(config: LaunchConfig, context: int, chunk_positions: int) -> list[int]:
    """(slot, index, page) triples: slot 0 holds the chunk, every other slot a decode; pages in order."""
    triples: list[int] = []
    next_page = 0
    for slot in range(config.max_running):
        for index in range(-(-(context if slot else chunk_positions) // config.page_size)):
            triples += (slot, index, next_page)
            next_page += 1
    return triples


def full_step(bucket: Bucket, config: LaunchConfig, context: int, prompt_start: int) -> StepPlan:
    """A plan whose rows are all live: one chunk in slot 0, decodes in the slots from the last one down."""
    chunks: tuple[Chunk, ...] = ()
    if bucket.prefill_rows:
        init = SlotInit(prompt_start + bucket.prefill_rows, 0, (), SamplerParams())
        chunks = (Chunk(0, prompt_start, bucket.prefill_rows, True, init),)
    slots = [config.max_running - 1 - row for row in range(bucket.decode_rows)]
    tokens = pack_int32(number % config.spec.vocab_size for number in range(bucket.prefill_rows))
    positions = pack_int32([context - 1] * bucket.decode_rows)
    return StepPlan(0, bucket, chunks, tokens, pack_int32(slots), positions, b"", 0.0)


def time_bucket(runner: ModelRunner, plan: StepPlan, repeats: int) -> list[float]:
    """Milliseconds of each repeat, from the start of its input's copy to its end; two steps are always in flight."""
    launched = []
    times = []
    for _ in range(repeats + 2):
        launched.append(runner.launch(plan, received_s=0.0))
        if len(launched) > 2:
            step = launched.pop(0)
            times.append((step.finished.wait() - step.started.wait()) * 1000.0)
    for step in launched:
        step.fetched.wait()
    return times[1:]


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser)
    parser.set_defaults(model=str(model_folder()))
    parser.add_argument("--context", type=int, default=1024, help="positions a decode row attends to")
    parser.add_argument("--prompt-start", type=int, default=512, help="position of the chunk's first token")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    settings = EngineConfig(**engine_settings(options))
    config = resolve(settings, load_spec(options.model), Path(options.model))
    context = min(options.context, config.max_model_len)
    with torch.inference_mode():
        runner = ModelRunner(config, report=lambda progress: None)
        for pages in (*runner.kv_cache.k_pages, *runner.kv_cache.v_pages):
            pages.normal_()  # kernels run at other speeds over zeros
        worker = runner.describe()
        widest = max(bucket.prefill_rows for bucket in worker.buckets)
        prompt_start = min(options.prompt_start, config.max_model_len - widest)
        triples = deal_pages(config, context, prompt_start + widest)
        if len(triples) // 3 > worker.num_pages:
            raise SystemExit(f"{len(triples) // 3} pages are needed, {worker.num_pages} fit: lower --context")
        setup = StepPlan(0, worker.buckets[-1], (), b"", b"", b"", pack_int32(triples), 0.0)
        runner.launch(setup, received_s=0.0).fetched.wait()
        rows = []
        for bucket in worker.buckets:
            times = time_bucket(runner, full_step(bucket, config, context, prompt_start), options.repeats)
            p50 = percentile(times, 50)
            rows.append(
                {
                    "bucket": str(bucket),
                    "rows": bucket.num_rows,
                    "ms p50": p50,
                    "ms max": max(times),
                    "rows/s": round(bucket.num_rows / p50 * 1000.0),
                }
            )
        counters = runner.counters
    about = machine(worker.device) | {"attention": worker.attention, "compiled": str(worker.compiled)}
    show(f"Step time of {options.model}, decodes at {context} positions", rows, about)
    phases = [{"phase": phase.name, "seconds": phase.seconds} for phase in worker.phases]
    show("Start of the worker", phases, about)
    print(f"graph replays {counters.graph_replays}, eager steps {counters.eager_steps}, pages {worker.num_pages}")
    write_json(options.json, rows, about)


if __name__ == "__main__":
    main()
