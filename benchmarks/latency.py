"""What does one token cost? Inter-token latency of B decodes that run together, and the time to ready.

    python -m benchmarks.latency --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384

B requests of --context random tokens are sent at once to an Engine; gaps count from the moment all of them decode
until the first one ends. The floor of a step is the time to read all weights and the keys and values of its rows once,
in the formats that they have, of several ranks one's share, at the bandwidth that is measured first. CPU time is that
of the engine's processes, of all steps of a batch, but for a standby, which imports meanwhile.
"""

import itertools
import random
import time

import torch

from benchmarks.cpu_time import CpuMeter
from benchmarks.options import add_engine_options, count, engine_settings, make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from benchmarks.timing import read_bytes_per_s
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.base.garbage import leave_imports_alone
from graphgen.calls.outputs import RequestOutput
from graphgen.launch.devices import find_device
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.spec import DTYPE_BYTES, Experts, FeedForward
from graphgen.models.spec.formats import places_of


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


def floor_ms(config: LaunchConfig, batch: int, context: int, bytes_per_s: float) -> float:
    """Time to read what one token of every request needs: the weights once, in the formats that they have, and each
    request's keys and values; of several ranks, what one of them reads.

    Of a mixture of experts, the weights of as many experts as `batch` rows choose on average when all are alike.
    """
    spec, item_bytes = config.rank_spec, DTYPE_BYTES[config.dtype]
    embedding = 0 if spec.head.tied else spec.vocab_size * spec.hidden_size * item_bytes
    weights = config.spec.rank_weight_bytes(config.dtype, config.num_ranks) - embedding
    idle = sum(idle_bytes(layer.feed_forward, spec.hidden_size, batch, item_bytes) for layer in spec.layers)
    kv_bytes = spec.kv_bytes_per_token(config.kv_format) * batch * context
    return (weights - idle + kv_bytes) / bytes_per_s * 1000.0


def idle_bytes(feed_forward: FeedForward, hidden_size: int, rows: int, item_bytes: int) -> float:
    """Weights of the experts that none of `rows` chooses, if each row chooses `top_k` with equal probability.
    item_bytes: of a weight without a format."""
    if not isinstance(feed_forward, Experts):
        return 0.0
    unchosen = (1.0 - feed_forward.top_k / feed_forward.num_experts) ** rows
    places = places_of(feed_forward, feed_forward.linears(hidden_size))
    return unchosen * sum(place.num_bytes(item_bytes) for place in places)


def measure(engine: Engine, prompts: list[list[int]], num_tokens: int, bytes_per_s: float) -> Row:
    """One row of the table: a batch from its submission to its last token."""
    config = engine.resolved
    batch, context = len(prompts), len(prompts[0])
    # The first request must still decode when the last prompt is computed, in steps as short as a third of the budget
    # beside ever more decodes.
    most_tokens = num_tokens + 5 * batch * context // config.token_budget
    steps_before = engine.stats().steps
    meter = CpuMeter({name: pid for name, pid in engine.pids.items() if not name.startswith("standby")})
    outputs = engine.generate(prompts, sampling_of(min(most_tokens, config.max_model_len - context)))
    steps = engine.stats().steps - steps_before
    spent = meter.read()
    gaps = gaps_ms(outputs)
    p50 = percentile(gaps, 50)
    floor = floor_ms(config, batch, context + len(outputs[0].token_ids) // 2, bytes_per_s)
    return {
        "decodes": batch,
        "context": context,
        "TTFT p50 ms": percentile([output.timing.first_token_s * 1000 for output in outputs], 50),
        "ITL p50 ms": p50,
        "ITL p95 ms": percentile(gaps, 95),
        "ITL p99 ms": percentile(gaps, 99),
        "ITL max ms": max(gaps, default=float("nan")),
        "floor ms": floor,
        "of the floor": floor / p50,
        "gaps": len(gaps),
        **{f"{name} us/step": seconds / steps * 1e6 for name, seconds in spent.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser, without=("step_log",))
    parser.add_argument("--context", type=count, default=1024, help="prompt tokens of each request")
    parser.add_argument("--tokens", type=count, default=128, help="output tokens while all decode")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument(
        "--idle", type=float, default=5.0, metavar="SECONDS", help="without requests, for their CPU time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-log")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    config = EngineConfig(**engine_settings(options, step_log=options.step_log))
    rng = random.Random(options.seed)
    device = torch.device(find_device() if config.device == "auto" else config.device)
    bytes_per_s = read_bytes_per_s(device, (2048 if device.type == "cuda" else 64) << 20)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine has processes of its own, which want the memory
    begun_s = time.monotonic()
    with Engine(config) as engine:
        ready_s = time.monotonic() - begun_s
        worker = engine.info.worker
        vocab_size = engine.resolved.spec.vocab_size
        context = min(options.context, engine.resolved.max_model_len - options.tokens)
        engine.generate([[1, 2, 3]], sampling_of(options.tokens))
        leave_imports_alone()  # a pause of this process is none of the engine's
        rows = []
        for batch in options.batches:
            prompts = [[rng.randrange(vocab_size) for _ in range(context)] for _ in range(batch)]
            row = measure(engine, prompts, options.tokens, bytes_per_s)
            rows.append(row)
        idle = CpuMeter(engine.pids)
        time.sleep(options.idle)
        idle_shares = {name: spent / options.idle for name, spent in idle.read().items()} if options.idle else {}
        stats = engine.stats()
    about = machine(worker.device) | {
        "attention": worker.attention,
        "compiled": str(worker.compiled),
        "read TB/s": f"{bytes_per_s / 1e12:.3f}",
    }
    show("Inter-token latency of decodes that run together", rows, about)
    phases = [{"phase": phase.name, "seconds": phase.seconds} for phase in worker.phases]
    show("Time to ready", [*phases, {"phase": "all, processes and imports included", "seconds": ready_s}], about)
    if worker.step_times is not None:
        times = (f"{one.bucket} {one.milliseconds:.2f}" for one in worker.step_times.times)
        print(f"ms of a step of each bucket (prompt + decode rows), as timed before it was ready: {', '.join(times)}")
    print(f"steps {stats.steps}, graph replays {stats.graph_replays}, eager {stats.eager_steps}, ", end="")
    print(f"recompilations {stats.recompilations}, padding {stats.padding_share:.1%}")
    for name, share in idle_shares.items():
        print(f"{name} without requests: {share:.2%} of a core")
    write_json(options.json, rows, about | {"ready_s": f"{ready_s:.2f}"})


if __name__ == "__main__":
    run_script(main)
