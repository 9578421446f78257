"""Logits that are not numbers, in captured graphs: an error for whoever they reach, tokens for everyone else."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphgen import Engine, NumericalError, SamplingParams
from graphgen.demo import model_folder

BAD_TOKEN = 5
GOOD = [[7 + number, 40, 41, 42, 60 + number, 70, 71, 72, 80] * 12 for number in range(3)]
BAD = [[200 + number, 40, BAD_TOKEN, 41] * 30 for number in range(3)]
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, top_k=40, seed=1, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(("attention", "dtype"), [("flashinfer", "bfloat16"), ("torch", "float32")])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_requests_beside_one_without_numbers_and_in_its_pages_get_their_own_tokens(
    attention: str, dtype: str, sampling: SamplingParams, tmp_path: Path
) -> None:
    """In bfloat16 a close draw depends on what is computed beside it; there it must end well, as NaN would not."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (name for name in weights if "embed_tokens" in name)
    weights[embedding][BAD_TOKEN] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    # So few pages that those of the failed requests are used again at once.
    engine = Engine(
        model=str(folder),
        device="cuda",
        attention=attention,  # type: ignore[arg-type]  # a parameter of the test
        dtype=dtype,  # type: ignore[arg-type]
        token_budget=256,
        max_num_seqs=16,
        num_pages=48,
    )
    with engine:
        want = [list(output.token_ids) for output in engine.generate(GOOD, sampling)]
        for _ in range(4):
            streams = [engine.stream(prompt, sampling) for pair in zip(BAD, GOOD, strict=True) for prompt in pair]
            for number, stream in enumerate(streams):
                if number % 2 == 0:
                    with pytest.raises(NumericalError):
                        list(stream)
                else:
                    tokens = [token for piece in stream for token in piece.token_ids]
                    assert len(tokens) == 12
                    assert dtype != "float32" or tokens == want[number // 2]
        stats = engine.stats()
    assert stats.numerical_errors == 4 * len(BAD)
    assert stats.eager_steps == 0
    assert stats.pages_free == stats.pages_total
