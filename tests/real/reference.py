"""transformers on the same GGUF files, in float32: its dequantisation and the published configurations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import gguf
import torch
from torch import Tensor

CLOSE = 1e-4
"""Between the two best logits of the reference: the order of additions decides such a step."""

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
GEMMA3: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


class Reference:
    """A model of transformers."""

    def __init__(self, model: Any) -> None:  # transformers publishes no types
        self._model = model.eval()

    @classmethod
    def of_smollm2(cls, file: Path) -> Self:
        from transformers import LlamaConfig, LlamaForCausalLM

        return cls(_filled(LlamaForCausalLM(LlamaConfig(**SMOLLM2)), file, gguf.MODEL_ARCH.LLAMA, _halves))

    @classmethod
    def of_gemma3(cls, file: Path) -> Self:
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        model = Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3))
        return cls(_filled(model, file, gguf.MODEL_ARCH.GEMMA3, _less_one))

    def round_weights(self, rounded: Callable[[Tensor], Tensor]) -> None:
        """Of all linear layers but the head's, [N, K] each, for good."""
        for name, module in self._model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = rounded(module.weight.data)

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """Of each token of the output, [len(output), V]."""
        ids = torch.tensor([[*prompt, *output[:-1]]])
        whole: Tensor = self._model(ids, logits_to_keep=len(output)).logits[0]
        return whole

    def check_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Each token of the output is the best of the reference, given those before it. False: up to a step at which
        two of the reference's are equally good."""
        logits = self.logits(prompt, output)
        best = logits.topk(2)
        for place, (token, ids, values) in enumerate(zip(output, best.indices, best.values, strict=True)):
            if token != int(ids[0]):
                assert float(values[0] - logits[place, token]) < CLOSE, (place, list(output), int(ids[0]))
                return False
        return True


def mean_divergence(expected: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence of rows of logits, in nats."""
    first, second = expected.float().log_softmax(1), found.float().log_softmax(1)
    return float((first.exp() * (first - second)).sum(1).mean())


def _filled(model: Any, file: Path, arch: gguf.MODEL_ARCH, undone: Callable[[str, Tensor], Tensor]) -> Any:
    """undone: what llama.cpp's converter did to a tensor of that name is undone."""
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        own = f"{names.get_name(stem)}.{suffix}"
        values = _dequantised(stored[own].data, stored[own].tensor_type)
        parameter.data.copy_(undone(stem, values.view(parameter.shape)))
    return model


def _dequantised(data: Any, kind: gguf.GGMLQuantizationType) -> Tensor:
    """data: an array of numpy. By transformers, or by the package gguf where it has no such type."""
    from transformers.integrations.gguf import dequant

    if kind in dequant.GGML_BLOCK:
        values: Tensor = dequant.dequantize(torch.from_numpy(data.copy()), int(kind))
        return values
    return torch.from_numpy(gguf.dequantize(data, kind).copy())


def _halves(stem: str, weight: Tensor) -> Tensor:
    """llama.cpp turns neighbours, transformers halves of a head."""
    heads = {"q_proj": 9, "k_proj": 3}.get(stem.rpartition(".")[2])
    return weight if heads is None else weight.view(heads, 32, 2, -1).permute(0, 2, 1, 3).reshape(weight.shape)


def _less_one(stem: str, weight: Tensor) -> Tensor:
    return weight - 1 if stem.endswith("norm") else weight
