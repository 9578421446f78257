"""What do requests with a grammar cost, themselves and their neighbours? And what do log-probabilities?

    python -m benchmarks.constrained --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 8192

STREAMS requests decode together: none, a fifth, and all of them follow a JSON schema, and then all of them ask for the
log-probabilities of five tokens. Gaps count while all of them decode; those of requests with a grammar and of the
others stand side by side, beside the gaps of the run in which there is none. One schema is that of a tool call, of
which a model of random weights knows nothing: nearly all its draws are refused and drawn again. The other one is a long
text in a string, where nearly every draw is allowed, as are those of a model that knows its format. A model that has no
tokenizer gets one of as many tokens, made of pairs of shorter ones.
"""

import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from benchmarks.latency import gaps_ms
from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, JsonSchema, SamplingParams
from graphgen.base.garbage import leave_imports_alone
from graphgen.calls.outputs import RequestOutput
from graphgen.models.families import load_spec

STREAMS = 64
SHARES = (0.2, 1.0)
LOGPROBS = 5
ITEM = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "unit", "days", "exact"],
    "additionalProperties": False,
}
TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 100_000}},
    "required": ["text"],
    "additionalProperties": False,
}
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {"type": "array", "items": ITEM, "minItems": 500},
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
SCHEMAS = {"call": CALL, "text": TEXT}
"""Both are longer than any output here, so that every request decodes to its last token."""


def write_tokenizer(folder: Path, num_tokens: int, ends: Sequence[int] = (), seed: int = 0) -> None:
    """A tokenizer of bytes and of pairs of tokens, as long as words at most, with as many tokens as the model has.

    ends: the model's end-of-sequence tokens, which are no text.
    """
    special = {number: f"<|end {number}|>" for number in (*ends, num_tokens - 1)} | {num_tokens - 2: "<|begin|>"}
    chance = random.Random(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["Ġ" + chr(code) for code in range(97, 123)]
    tokens, merges, longest = dict.fromkeys(letters), [], 10
    printable = [chr(code) for code in range(33, 127)]
    pairs = itertools.chain((("Ġ", letter) for letter in printable), itertools.product(printable, printable))
    while len(tokens) < num_tokens - len(special):
        first, second = next(pairs, None) or (chance.choice(common), chance.choice(common))
        pair = first + second
        if len(pair) > longest or pair in tokens or "Ġ" in second:
            continue
        tokens[pair] = None
        merges.append((first, second))
        if second.isalpha() and chance.random() < 0.5:
            common.append(pair)
    free = (number for number in range(num_tokens) if number not in special)
    vocab = dict(zip(tokens, free, strict=True)) | {token: number for number, token in special.items()}
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": special[num_tokens - 1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    share: float,
    schema: str = "call",
    logprobs: int | None = None,
) -> tuple[list[float], list[float]]:
    """Gaps in milliseconds: of the requests that follow the schema, and of the others."""
    plain = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)
    bound = SamplingParams(temperature=0.0, max_tokens=num_tokens, structured=JsonSchema(SCHEMAS[schema]))
    step = round(1.0 / share) if share else len(prompts) + 1
    is_bound = [number % step == 0 if share else False for number in range(len(prompts))]
    outputs = engine.generate(list(prompts), [bound if one else plain for one in is_bound])
    for output in outputs:
        if len(output.token_ids) != num_tokens:
            why = f"{output.finish_reason} after {len(output.token_ids)} of {num_tokens} tokens: {output.text!r}"
            raise SystemExit(f"a request ended before the others ({why}), so gaps cannot be compared")
    kinds: tuple[list[RequestOutput], list[RequestOutput]] = [], []
    for output, one in zip(outputs, is_bound, strict=True):
        kinds[not one].append(output)
    bound_outputs, free_outputs = kinds
    return (gaps_ms(bound_outputs) if bound_outputs else []), (gaps_ms(free_outputs) if free_outputs else [])


def figures(gaps: Sequence[float], before: Sequence[float], name: str) -> Row:
    if not gaps:
        return {}
    p50, p99 = percentile(gaps, 50), percentile(gaps, 99)
    against = {f"{name} p50 x": p50 / percentile(before, 50), f"{name} p99 x": p99 / percentile(before, 99)}
    return {f"{name} p50 ms": p50, f"{name} p99 ms": p99, **against}


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser, without=("tokenizer",))
    parser.add_argument("--tokenizer", help="folder [default: the model's, or one that is made]")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each output")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer
        if options.model is not None and tokenizer is None and not (Path(options.model) / "tokenizer.json").exists():
            spec = load_spec(options.model)
            write_tokenizer(Path(folder), spec.vocab_size, spec.eos_token_ids)
            tokenizer = folder
        with Engine(EngineConfig(**engine_settings(options, tokenizer=tokenizer))) as engine:
            chance = random.Random(0)
            vocab_size = engine.resolved.spec.vocab_size
            prompts = [
                [chance.randrange(300, vocab_size // 2) for _ in range(options.prompt)] for _ in range(options.streams)
            ]
            for schema in SCHEMAS:  # grammars are made, first uses are over
                measure(engine, prompts, options.tokens, 0.2, schema)
            leave_imports_alone()  # a pause of this process is none of the engine's
            _, before = measure(engine, prompts, options.tokens, 0.0)
            rows.append({"with a grammar": "0%", "of": "", "logprobs": "none", **figures(before, before, "free")})
            for schema, share in itertools.product(SCHEMAS, SHARES):
                bound, free = measure(engine, prompts, options.tokens, share, schema)
                both = {**figures(free, before, "free"), **figures(bound, before, "bound")}
                rows.append({"with a grammar": f"{share:.0%}", "of": schema, "logprobs": "none", **both})
            for logprobs in (LOGPROBS, None):
                _, free = measure(engine, prompts, options.tokens, 0.0, logprobs=logprobs)
                asked = {"with a grammar": "0%", "of": "", "logprobs": logprobs or "none"}
                rows.append({**asked, **figures(free, before, "free")})
            device, stats = engine.info.worker.device, engine.stats()
    about = machine(device)
    show(f"{options.streams} streams, {options.tokens} tokens each", rows, about)
    print(f"steps {stats.steps}, eager {stats.eager_steps}, recompilations {stats.recompilations}")
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
