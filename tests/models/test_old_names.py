"""Checkpoints whose tensors have the names of other ages: the logits are those of the file that transformers writes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphgen.ipc.errors import CheckpointError
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.splits import reference_logits, tokens

Rewrite = Callable[[str], str]
FILE = "model.safetensors"
MASK = torch.ones(1, 1, 8, 8)


def without(prefix: str) -> Rewrite:
    return lambda name: name.removeprefix(prefix)


def replacing(*pairs: tuple[str, str]) -> Rewrite:
    def rewrite(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rewrite


UNCHANGED = without("")

AGES: dict[str, tuple[str, Rewrite, Mapping[str, Tensor]]] = {
    "GPT-2 of the hub": (
        "gpt2",
        without("transformer."),
        {"h.0.attn.bias": MASK, "h.2.attn.masked_bias": torch.tensor(-1e4)},
    ),
    "GPT-2 with masks": ("gpt2", UNCHANGED, {"transformer.h.1.attn.bias": MASK.to(torch.uint8)}),
    "GPT-Neo with masks": (
        "gpt_neo",
        UNCHANGED,
        {"transformer.h.0.attn.attention.bias": MASK, "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)},
    ),
    "GPT-J with masks": ("gptj", UNCHANGED, {"transformer.h.0.attn.bias": MASK}),
    "NeoX with masks and a table": (
        "neox",
        UNCHANGED,
        {
            "gpt_neox.layers.0.attention.bias": MASK,
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        },
    ),
    "OPT without model": ("opt", without("model."), {}),
    "BLOOM of the hub": ("bloom", without("transformer."), {}),
    "Gemma 3, the newer prefix": (
        "gemma3_tower",
        replacing(("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")),
        {},
    ),
    "Mistral 3, the newer prefix": (
        "mistral3_tower",
        replacing(("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")),
        {},
    ),
}


@pytest.mark.parametrize("age", AGES)
def test_a_checkpoint_of_another_age_gives_the_same_logits(age: str, tmp_path: Path) -> None:
    case, rewrite, more = AGES[age]
    model, prompt = tiny.save(case, tmp_path), tokens(30)
    stored = load_file(tmp_path / FILE)
    renamed = {rewrite(name): tensor for name, tensor in stored.items()}
    save_file({**renamed, **more}, tmp_path / FILE, metadata={"format": "pt"})
    driver = Driver(load_decoder(tmp_path, load_spec(tmp_path), torch.float32, torch.device("cpu")))
    (got,) = driver.step([(driver.request(prompt), len(prompt))])
    torch.testing.assert_close(got, reference_logits(model, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.scale"),
        ("neox", "gpt_neox.layers.0.attention.scale"),
        ("gemma3_tower", "language_model.model.layers.0.self_attn.sinks"),
    ],
)
def test_a_tensor_that_only_resembles_them_is_refused(case: str, name: str, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    save_file({**load_file(tmp_path / FILE), name: torch.ones(6)}, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has no place in a"):
        load_decoder(tmp_path, load_spec(tmp_path), torch.float32, torch.device("cpu"))
