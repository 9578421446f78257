"""What is a shared prompt worth? Time to the first token with and without the prefix cache, and of n samples.

    python -m benchmarks.prefix --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384

Each case is served alone, --pairs times, with prompts that nothing before had: the first prompt of a pair, a second one
that begins with the same --shared tokens (a system prompt), the conversation's next turn (the first prompt, its answer
and --own tokens more), the first prompt once more under another salt, and --samples of one prompt at once. *Cached* are
the prompt's tokens that were not computed. *Equal* says how many outputs of an equal prompt were token for token those
of the first; with random weights, whose logits are flat, even a sum in another order draws another token.
"""

import random
from collections.abc import Sequence

from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.calls.outputs import RequestOutput

ANSWER_TOKENS = 40


def sampling_of(salt: str, num_samples: int = 1) -> SamplingParams:
    """Greedy, so that equal prompts have equal outputs."""
    return SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, cache_salt=salt, n=num_samples)


class Prompts:
    """Random prompts of one length."""

    def __init__(self, rng: random.Random, vocab_size: int, shared_len: int, own_len: int) -> None:
        self._rng = rng
        self._vocab_size = vocab_size
        self._own_len = own_len
        self._shared = self.draw(shared_len)

    def draw(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocab_size) for _ in range(count)]

    def next(self) -> list[int]:
        """The shared tokens, and others."""
        return self._shared + self.draw(self._own_len)

    def next_turn(self, before: RequestOutput) -> list[int]:
        """What was said before, and more."""
        return [*before.prompt_token_ids, *before.token_ids, *self.draw(self._own_len)]


def serve_pair(engine: Engine, prompts: Prompts, number: int, num_samples: int) -> dict[str, list[RequestOutput]]:
    """The outputs of every case."""
    salt = str(number)
    prompt = prompts.next()
    first = engine.generate([prompt], sampling_of(salt))
    return {
        "first": first,
        "same beginning": engine.generate([prompts.next()], sampling_of(salt)),
        "next turn": engine.generate([prompts.next_turn(first[0])], sampling_of(salt)),
        "other salt": engine.generate([prompt], sampling_of(f"{salt}, another")),
        f"{num_samples} samples": engine.generate([prompt], sampling_of(f"{salt}, samples", num_samples)),
    }


def table(pairs: Sequence[dict[str, list[RequestOutput]]]) -> list[Row]:
    """One row a case. The TTFT of samples is that of the last of them."""
    rows: list[Row] = []
    for case in pairs[0]:
        ttft_ms = [max(output.timing.first_token_s for output in pair[case]) * 1000.0 for pair in pairs]
        outputs = [output for pair in pairs for output in pair[case]]
        comparable = [
            output.token_ids == pair["first"][0].token_ids
            for pair in pairs
            for output in pair[case]
            if output.prompt_token_ids == pair["first"][0].prompt_token_ids
        ]
        rows.append(
            {
                "case": case,
                "prompt": len(outputs[0].prompt_token_ids),
                "cached p50": round(percentile([output.cached_tokens for output in outputs], 50)),
                "TTFT p50 ms": percentile(ttft_ms, 50),
                "TTFT max ms": max(ttft_ms),
                "equal": f"{sum(comparable)} of {len(comparable)}" if comparable else "-",
            }
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser)
    parser.add_argument("--shared", type=int, default=2000, help="tokens that two prompts have in common")
    parser.add_argument("--own", type=int, default=50, help="tokens of each prompt behind them")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8, help="outputs of one prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    with Engine(EngineConfig(**engine_settings(options))) as engine:
        worker, config = engine.info.worker, engine.resolved
        rng = random.Random(options.seed)
        own = min(options.own, config.max_model_len // 4)
        shared = min(options.shared, config.max_model_len - 2 * own - 2 * ANSWER_TOKENS)
        engine.generate([[1, 2, 3]], sampling_of("warm-up"))
        pairs = [
            serve_pair(engine, Prompts(rng, config.spec.vocab_size, shared, own), number, options.samples)
            for number in range(options.pairs)
        ]
    about = machine(worker.device) | {"attention": worker.attention, "page_size": str(config.page_size)}
    rows = table(pairs)
    show(f"Prompts that share {shared} tokens", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
