"""Structured output on a GPU: a mask reaches the captured step of the token it is for, and no other row notices."""

import json
import re

from graphgen import Choice, Engine, JsonSchema, Regex, SamplingParams
from graphgen.calls.structured import Structured

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
KINDS: list[Structured] = [JsonSchema(SCHEMA), Regex("[a-f]{3}-[0-9]{4}"), Choice(["yes", "no", "perhaps"])]


def free(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True)


def test_constrained_rows_follow_their_grammar_and_their_neighbours_draw_what_they_did() -> None:
    prompts = [f"{number} green bottles hanging on the wall: " for number in range(48)]
    plain = [free(number) for number in range(48)]
    mixed = list(plain)
    for number in range(0, 48, 4):
        mixed[number] = SamplingParams(
            temperature=1.0, seed=number, max_tokens=60, structured=KINDS[number // 4 % len(KINDS)]
        )
    with Engine(device="cuda", token_budget=256, max_num_seqs=64, dtype="float32", attention="torch") as engine:
        before = engine.generate(prompts, plain)
        outputs = engine.generate(prompts, mixed)
        stats = engine.stats()
    assert (stats.eager_steps, stats.recompilations) == (0, 0)
    ended = 0
    for number, (output, alone) in enumerate(zip(outputs, before, strict=True)):
        if number % 4:
            assert output.token_ids == alone.token_ids
        elif output.finish_reason == "stop":
            ended += 1
            match mixed[number].structured:
                case JsonSchema():
                    value = json.loads(output.text)
                    assert set(value) == {"name", "old"}
                    assert isinstance(value["old"], bool)
                case Regex():
                    assert re.fullmatch("[a-f]{3}-[0-9]{4}", output.text)
                case _:
                    assert output.text in ("yes", "no", "perhaps")
    assert ended >= 8
