"""Checkpoints whose numbers are not numbers: an error for whoever they reach, tokens for everyone else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphgen import Engine, NumericalError, RequestOutput, SamplingParams
from tests.models import tiny

BAD_TOKEN = 50
GOOD, BAD = [3, 17, 40, 41, 42, 60, 70, 71, 72, 80] * 4, [9, 17, 40, BAD_TOKEN] * 10
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def spoil(folder: Path, name: str, row: int | None) -> None:
    """Makes a weight NaN, or one row of it."""
    weights = load_file(folder / "model.safetensors")
    weights[name][slice(None) if row is None else row] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_of_nan_end_every_request_with_an_error_that_says_what_to_check(
    temperature: float, tmp_path: Path
) -> None:
    tiny.save("llama", tmp_path)
    spoil(tmp_path, "model.norm.weight", None)
    with Engine(str(tmp_path), device="cpu", num_pages=64) as engine:
        with pytest.raises(NumericalError, match="NaN or -inf: look for NaN in the checkpoint's weights"):
            engine.generate([GOOD], SamplingParams(max_tokens=4, temperature=temperature))
        stats = engine.stats()
    assert (stats.numerical_errors, stats.running, stats.waiting) == (1, 0, 0)
    assert (stats.pages_free, stats.pages_cached) == (stats.pages_total, 0)


def greedy(model: tiny.HuggingFaceModel, prompt: list[int]) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens: list[int] = ids[0, len(prompt) :].tolist()
    return tokens


def test_requests_beside_and_after_one_without_numbers_get_their_own_tokens(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    alike = [*BAD[:3], *GOOD]  # NaN goes backwards too: a masked position weighs 0, and 0 * NaN is NaN
    want, want_alike = greedy(model, GOOD), greedy(model, alike)
    assert BAD_TOKEN not in want + want_alike
    spoil(tmp_path, "model.embed_tokens.weight", BAD_TOKEN)
    with Engine(str(tmp_path), device="cpu", num_pages=64, page_size=4) as engine:
        for _ in range(3):  # pages that held NaN are used again
            streams = [engine.stream(prompt, GREEDY) for prompt in (BAD, GOOD, BAD[:4])]
            with pytest.raises(NumericalError):
                list(streams[0])
            assert [token for piece in streams[1] for token in piece.token_ids] == want
            with pytest.raises(NumericalError):
                list(streams[2])
            (after,) = engine.generate([alike], GREEDY)
            assert isinstance(after, RequestOutput)
            assert list(after.token_ids) == want_alike
        stats = engine.stats()
    assert stats.numerical_errors == 6
    assert stats.pages_free == stats.pages_total
