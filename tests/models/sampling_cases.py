"""Shared by the sampling tests: slots with every kind of rule, logits with every kind of trouble."""

from collections.abc import Mapping

import torch
from torch import Tensor

from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.worker_messages import MAX_LOGIT_BIASES, SamplerParams, SlotInit
from graphgen.models.sampling import Sampler, pack_biases, pack_slot

STOP_TOKENS = (1, 2, 7)


def biases(of: Mapping[int, float]) -> bytes:
    return SamplingParams(logit_bias=of).resolve_sampler(SamplingDefaults(), 0).biases


MANY_BIASES = {3 * place: (-100.0, 0.7, 2.5)[place % 3] for place in range(MAX_LOGIT_BIASES)}
"""As many as there may be. In a small vocabulary most are of no token."""

MIXED = (
    SamplerParams(),
    SamplerParams(temperature=1.0, seed=5),
    SamplerParams(temperature=0.7, top_k=20, seed=6),
    SamplerParams(temperature=1.3, top_p=0.9, seed=7),
    SamplerParams(temperature=1.0, top_k=50, top_p=0.8, seed=2**62 + 8),
    SamplerParams(temperature=0.8, min_p=0.05, seed=9),
    SamplerParams(
        temperature=0.9,
        top_k=100,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        seed=10,
    ),
    SamplerParams(repetition_penalty=1.5, frequency_penalty=0.7),
    SamplerParams(temperature=2.0, top_p=0.999, presence_penalty=1.0, seed=11),
    SamplerParams(temperature=0.01, top_k=1, seed=12),
    SamplerParams(temperature=1.0, top_p=1e-6, seed=13),
    SamplerParams(temperature=50.0, top_k=200, min_p=1.0, seed=14),
    SamplerParams(temperature=1e-37, seed=15),
    SamplerParams(temperature=1e-40, top_k=30, top_p=0.9, min_p=0.1, seed=16),
    SamplerParams(temperature=1e-9, top_p=0.9, seed=17),
    SamplerParams(biases=biases({0: -3.0, 9: 100.0, 256: 100.0, 10**6: 100.0})),
    SamplerParams(
        temperature=1.0, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=18, biases=biases({4: 5.5, 77: -100.0})
    ),
    SamplerParams(temperature=1.2, seed=19, biases=biases(MANY_BIASES)),
)


def own(sampler: Sampler, params: list[SamplerParams], prompt_len: int = 3, min_length: int = 0) -> None:
    """Gives slots 0, 1, ... owners with these parameters."""
    device = sampler.tables.settings.device
    inits = [SlotInit(prompt_len, min_length, STOP_TOKENS, each) for each in params]
    rows = torch.stack([torch.from_numpy(pack_slot(init, sampler.tables.vocab_size)) for init in inits])
    slots = torch.arange(len(params), device=device)
    biased = torch.stack([torch.from_numpy(pack_biases(each)) for each in params])
    sampler.write_biases(slots.int(), biased.to(device))
    sampler.write_slots(rows.to(device), slots, torch.ones(len(params), dtype=torch.int32, device=device))


def give_masks(sampler: Sampler, allowed: Tensor, positions: Tensor) -> None:
    """Slots 0, 1, ... draw only tokens of their row of `allowed`, [n, V] bool, at these positions, [n]; -1: nowhere."""
    width = sampler.tables.masks.shape[1] * 32
    padded = torch.nn.functional.pad(allowed.long(), (0, width - allowed.shape[1]))
    words = (padded.view(len(allowed), -1, 32) << torch.arange(32)).sum(2)
    signed = torch.where(words >= 2**31, words - 2**32, words).int()
    device = sampler.tables.masks.device
    slots = torch.arange(len(allowed), dtype=torch.int32)
    block = torch.cat((slots, positions.int().cpu(), signed.flatten(), torch.zeros(5, dtype=torch.int32)))
    sampler.write_masks(block.pin_memory() if device.type == "cuda" else block, len(allowed))
    if device.type == "cuda":
        torch.cuda.synchronize()  # pinned memory is another tensor's as soon as nobody holds it


def random_masks(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """[num_rows, vocab_size] bool: of few tokens, of many, of one, of none, by row in turn."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.02, 0.5, 0.0, 0.9])[torch.arange(num_rows) % 4].unsqueeze(1)
    allowed = torch.rand(num_rows, vocab_size, generator=generator) < shares
    allowed[2::8, vocab_size // 3] = True
    return allowed


def troubled_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Random logits; some rows flat, tied, peaked, with NaN or infinities, or nothing else. At least 12 rows."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    logits[1] = 0.0
    logits[2] = logits[2].round()
    logits[3] = float("nan")
    logits[4] = float("-inf")
    logits[5, : vocab_size // 2] = float("nan")
    logits[6, vocab_size // 3] = float("inf")
    logits[7, vocab_size // 3 :] = float("-inf")
    logits[8] *= 30
    logits[9] = torch.where(logits[9] > 0, 0.0, -0.0)
    logits[10] *= 1e-3
    return logits
