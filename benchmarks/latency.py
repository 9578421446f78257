"""What does one token cost? Inter-token latency of B decodes that run together, and the time to ready.

    python -m benchmarks.latency --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384

B requests of --context random tokens are sent at once to an Engine; gaps count from the moment all of them decode
until the first one ends. TTFT is that of the batch of one.
"""

import itertools
import random
import time

from benchmarks.options import add_engine_options, engine_settings, make_parser
from benchmarks.report import machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.outputs import RequestOutput


def gaps_ms(outputs: list[RequestOutput]) -> list[float]:
    """Gaps between tokens while all requests decode. token_times_s counts from the arrival, the same for all."""
    all_started_s = max(output.timing.first_token_s for output in outputs)
    first_end_s = min(output.timing.total_s for output in outputs)
    gaps = []
    for output in outputs:
        times = [moment for moment in output.timing.token_times_s if all_started_s <= moment <= first_end_s]
        gaps += [(after - before) * 1000.0 for before, after in itertools.pairwise(times)]
    return gaps


def sampling_of(num_tokens: int) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each request")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens while all decode")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-log")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    config = EngineConfig(**engine_settings(options, step_log=options.step_log))
    rng = random.Random(options.seed)
    begun_s = time.monotonic()
    with Engine(config) as engine:
        ready_s = time.monotonic() - begun_s
        worker = engine.info.worker
        vocab_size = engine.resolved.spec.vocab_size
        context = min(options.context, engine.resolved.max_model_len - options.tokens)
        engine.generate([[1, 2, 3]], sampling_of(options.tokens))
        rows = []
        for batch in options.batches:
            prompts = [[rng.randrange(vocab_size) for _ in range(context)] for _ in range(batch)]
            # The first request must still decode when the last prompt is computed.
            num_tokens = options.tokens + 2 * batch * context // engine.resolved.token_budget
            outputs = engine.generate(prompts, sampling_of(min(num_tokens, engine.resolved.max_model_len - context)))
            gaps = gaps_ms(outputs)
            rows.append(
                {
                    "decodes": batch,
                    "context": context,
                    "TTFT p50 ms": percentile([output.timing.first_token_s * 1000 for output in outputs], 50),
                    **{f"ITL p{percent} ms": percentile(gaps, percent) for percent in (50, 95, 99)},
                    "ITL max ms": max(gaps, default=float("nan")),
                    "gaps": len(gaps),
                }
            )
        stats = engine.stats()
    about = machine(worker.device) | {"attention": worker.attention, "compiled": str(worker.compiled)}
    show("Inter-token latency of decodes that run together", rows, about)
    phases = [{"phase": phase.name, "seconds": phase.seconds} for phase in worker.phases]
    show("Time to ready", [*phases, {"phase": "all, processes and imports included", "seconds": ready_s}], about)
    print(f"steps {stats.steps}, graph replays {stats.graph_replays}, eager {stats.eager_steps}, ", end="")
    print(f"recompilations {stats.recompilations}, padding {stats.padding_share:.1%}")
    write_json(options.json, rows, about | {"ready_s": f"{ready_s:.2f}"})


if __name__ == "__main__":
    main()
