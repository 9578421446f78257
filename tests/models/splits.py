"""Logits of whole prompts, by Hugging Face and by a decoder that gets them in pieces."""

import random

import torch
from torch import Tensor

from tests.models import tiny
from tests.models.driver import Driver, Request


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 97), k=count)


def reference_logits(reference: tiny.HuggingFaceModel, token_ids: list[int]) -> Tensor:
    """[length, V]"""
    with torch.no_grad():
        logits: Tensor = reference(torch.tensor([token_ids])).logits[0]
    return logits.float()


def run_mixed(driver: Driver, requests: list[Request], seed: int) -> list[Tensor]:
    """Computes all requests, each step a random mix of chunks and decodes; logits [length, V] of each
    request."""
    order = random.Random(seed)
    logits: list[list[Tensor]] = [[] for _ in requests]
    while any(r.num_computed < len(r.token_ids) for r in requests):
        open_requests = [i for i, r in enumerate(requests) if r.num_computed < len(r.token_ids)]
        chosen = order.sample(open_requests, order.randint(1, len(open_requests)))
        is_chunk = {i: order.random() < 0.5 for i in chosen}
        chunks = []
        for i in chosen:
            left = len(requests[i].token_ids) - requests[i].num_computed
            if is_chunk[i]:
                chunks.append((requests[i], min(left, order.choice((1, 3, 7, 16, 40)))))
        results = driver.step(chunks, [requests[i] for i in chosen if not is_chunk[i]])
        assert driver.last_logits.isfinite().all(), "a padded row read what nobody wrote"
        for i, result in zip(sorted(chosen, key=lambda i: not is_chunk[i]), results, strict=True):
            logits[i].append(result)
    return [torch.cat(parts) for parts in logits]


def assert_equal_at_every_split(reference: tiny.HuggingFaceModel, driver: Driver, seed: int = 0) -> None:
    """Within 1e-4: one prompt at once, then several in random pieces, mixed with each other."""
    prompts = [tokens(length, seed=length) for length in (70, 33, 1, 16)]
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    whole = driver.step([(driver.request(prompts[0]), len(prompts[0]))])
    mixed = run_mixed(driver, [driver.request(prompt) for prompt in prompts], seed)
    for got, wanted in zip(whole + mixed, expected[:1] + expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
