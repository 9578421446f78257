"""How long is a step of each bucket? Every bucket with all its rows live, timed on the device, one after another.

    python -m benchmarks.steps --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384

Runs the worker's runner in this process: no scheduler, no sockets. Decode rows attend to --context positions; prompt
rows are one chunk that starts at --prompt-start. The steps are those of `graphgen tune`, at places and as often as you
like.
"""

from pathlib import Path

import torch

from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.report import machine, percentile, show, write_json
from graphgen.demo import model_folder
from graphgen.launch.config import EngineConfig
from graphgen.launch.resolve import resolve
from graphgen.models.families import load_spec
from graphgen.worker.runner import ModelRunner
from graphgen.worker.step_timing import Depth, Places, open_timer


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
    with torch.inference_mode():
        runner = ModelRunner(config, report=lambda progress: None)
        worker = runner.describe()
        widest = max(bucket.prefill_rows for bucket in worker.buckets)
        last_start = max(0, config.max_model_len - widest)
        places = Places(min(options.context, config.max_model_len), min(options.prompt_start, last_start))
        rows = []
        with open_timer(runner, config, places) as timer:
            for bucket in worker.buckets:
                times = timer.times_ms(bucket, places, Depth(settling=2, repeats=options.repeats))
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
    show(f"Step time of {options.model}, decodes at {places.decode_context} positions", rows, about)
    phases = [{"phase": phase.name, "seconds": phase.seconds} for phase in worker.phases]
    show("Start of the worker", phases, about)
    print(f"graph replays {counters.graph_replays}, eager steps {counters.eager_steps}, pages {worker.num_pages}")
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
