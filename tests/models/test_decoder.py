"""The decoder's logits, however a prompt is cut and whatever else is in the step.

That they equal Hugging Face's for every family is in tests/worker/test_parity.py.
"""

from pathlib import Path

import msgspec
import pytest
import torch

from graphgen.models.decoder import Decoder, num_unlike
from graphgen.models.families import load_spec
from graphgen.models.layers import DecoderLayer
from graphgen.models.loader import load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.quick_compiler import quick_compiler
from tests.models.splits import reference_logits, tokens

CPU = torch.device("cpu")


def load(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[tiny.HuggingFaceModel, Decoder]:
    reference = tiny.save(case, folder)
    return reference, load_decoder(folder, load_spec(folder), dtype, CPU)


@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_a_prompt_in_equal_chunks_gives_the_logits_of_the_whole(size: int, tmp_path: Path) -> None:
    _, decoder = load("qwen3_window", tmp_path)
    prompt = tokens(50)
    driver = Driver(decoder)
    whole = driver.step([(driver.request(prompt), len(prompt))])[0]
    request = driver.request(prompt)
    parts = []
    while request.num_computed < len(prompt):
        parts += driver.step([(request, min(size, len(prompt) - request.num_computed))])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt_len", [25, 39, 40, 41, 60])
def test_dynamic_rope_follows_a_growing_sequence_as_hugging_face_does(prompt_len: int, tmp_path: Path) -> None:
    """The base changes with every token past the original maximum (40); keys keep the rotation they were
    given."""
    reference, decoder = load("llama_dynamic", tmp_path)
    prompt = tokens(prompt_len)
    generated = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    driver = Driver(decoder)
    request = driver.request(generated.sequences[0].tolist()[:-1], prompt_len)
    logits = [driver.step([(request, prompt_len)])[0][-1:]]
    logits += [driver.step(decodes=[request])[0] for _ in range(23)]
    torch.testing.assert_close(torch.cat(logits), torch.cat(generated.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_hugging_face_is(case: str, tmp_path: Path) -> None:
    reference, decoder = load(case, tmp_path, torch.bfloat16)
    prompt = tokens(60)
    exact = reference_logits(reference, prompt)
    theirs = reference_logits(reference.to(torch.bfloat16), prompt)
    driver = Driver(decoder)
    ours = driver.step([(driver.request(prompt), len(prompt))])[0]
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_one_request_never_changes_the_logits_of_another(tmp_path: Path) -> None:
    _, decoder = load("mistral_window", tmp_path)
    prompt = tokens(30)
    alone = Driver(decoder, seed=3)
    expected = alone.step([(alone.request(prompt), 30)])[0]
    shared = Driver(decoder, seed=4)
    neighbours = [shared.request(tokens(length, seed=length)) for length in (9, 20)]
    shared.step([(neighbours[1], 19)])
    got = shared.step([(neighbours[0], 9), (shared.request(prompt), 30)], [neighbours[1]])[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_nobody_reads_are_left_out_and_leave_their_keys_and_values(compiled: bool, tmp_path: Path) -> None:
    _, decoder = load("qwen3_window", tmp_path)
    if compiled:
        decoder.compile_layers()
    prompt, other = tokens(30), tokens(12, seed=5)
    logits = []
    for wanted in (None, [19, 0, 23]):  # the chunk's last row, its first, and the decode row behind 3 padded ones
        driver = Driver(decoder)
        request, decode = driver.request(prompt), driver.request(other)
        with quick_compiler():
            driver.step([(decode, 11)])
            step = driver.step([(request, 20)], [decode], wanted)
        chosen = step if wanted else [step[0][19:20], step[0][:1], step[1]]
        logits.append(torch.cat([*chosen, *driver.step([(request, 10)])]))
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_a_shortened_step_runs_the_first_layers_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels are launched, and the layers behind them come back."""
    tiny.save("qwen3_window", tmp_path)
    spec = load_spec(tmp_path)
    plain, windowed = (
        next(layer for layer in spec.layers if bool(layer.mixer.reach) == is_windowed) for is_windowed in (False, True)
    )
    layers = (plain, plain, windowed, plain, windowed, plain)
    assert [num_unlike(layers[:count]) for count in (1, 2, 3, 6)] == [1, 2, 3, 3]
    spec = msgspec.structs.replace(spec, layers=layers)
    decoder = load_decoder(tmp_path, spec, torch.float32, CPU, load_format="dummy")
    attend, ran = decoder._attend, []

    def count(layer: DecoderLayer, *rest: object) -> object:
        ran.append(layer)
        return attend(layer, *rest)  # type: ignore[arg-type]  # what it was given

    monkeypatch.setattr(decoder, "_attend", count)
    driver = Driver(decoder)
    with decoder.shortened():
        driver.step([(driver.request(tokens(5)), 5)])
    assert ran == list(decoder.decoder_layers[:3])
    ran.clear()
    driver.step([(driver.request(tokens(5)), 5)])
    assert ran == list(decoder.decoder_layers)


@pytest.mark.parametrize(
    "case",
    [
        "llama_biases_wide_heads",
        "gpt2",
        "neox",
        "gptj",
        "phi",
        "qwen3",
        "olmo2",
        "glm4",
        "bigcode_fused_by_head",
        "opt",
    ],
)
def test_padded_heads_change_nothing(case: str, tmp_path: Path) -> None:
    """As on CUDA, whose kernels have heads of 64 at least."""
    tiny.save(case, tmp_path)
    spec = load_spec(tmp_path)
    padded = spec.padded()
    assert (spec.attention.width, padded.attention.width) == (spec.attention.head_dim, 64)
    logits = []
    for built in (spec, padded):
        driver = Driver(load_decoder(tmp_path, built, torch.float32, CPU))
        request = driver.request(tokens(30))
        logits.append(torch.cat([*driver.step([(request, 20)]), *driver.step([(request, 10)])]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_heads_that_a_mean_is_taken_of_are_not_padded() -> None:
    spec = tiny.spec_of(tiny.build("stablelm_parallel"))
    assert spec.padded() == spec
