"""Masks on their way to the device: which draws they are for, and that none is left for a slot's next owner."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from graphgen.capture.buffers import Words
from graphgen.capture.stream import HostStream
from graphgen.ipc.worker_messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.models.sampling import Sampler, make_sampler, mask_words
from graphgen.worker.grammars import Draw, LateMask, SlotGrammar
from graphgen.worker.mask_copies import LATE_BLOCKS, MaskCopies

VOCAB_SIZE = 70


def words(token_id: int) -> Words:
    """The mask that allows one token."""
    found = np.zeros(mask_words(VOCAB_SIZE), np.uint32)
    found[token_id // 32] = np.uint32(1) << np.uint32(token_id % 32)
    return found.view(np.int32)


def new_owner(slot: int, grammar: str = "") -> StepPlan:
    """A step in which the slot's owner draws its first token, at position 3."""
    init = SlotInit(3, 0, (), SamplerParams(), grammar=grammar)
    chunk = Chunk(slot=slot, start=0, length=3, draws=True, init=init)
    return StepPlan(step_id=1, bucket=Bucket(8, 0), chunks=(chunk,), chunk_token_ids=bytes(12), planned_s=0.0)


@pytest.fixture
def stream() -> Iterator[HostStream]:
    opened = HostStream()
    yield opened
    opened.close()


def drawn(sampler: Sampler, slot: int, position: int) -> int:
    """Of logits whose best token is 9."""
    logits = torch.zeros(1, VOCAB_SIZE).index_fill(1, torch.tensor([9]), 1.0)
    return int(sampler.sample(logits, torch.tensor([slot]), torch.tensor([position])))


def test_a_late_mask_counts_at_its_position_and_for_its_owner(stream: HostStream) -> None:
    sampler = make_sampler(4, VOCAB_SIZE, torch.device("cpu"))
    copies = MaskCopies(sampler, stream, num_blocks=2)
    plan = new_owner(1, "x")
    assert plan.chunks[0].init is not None
    copies.send(plan, [Draw(0, 1, 3, SlotGrammar(1, plan.chunks[0].init))])
    for position in range(3, 5 + LATE_BLOCKS):  # more than there are blocks
        copies.send_late([LateMask(1, position, words(10 + position)), LateMask(2, 5, words(66))])
        stream.synchronize()
        assert [drawn(sampler, 1, at) for at in (position - 1, position, position + 1)] == [9, 10 + position, 9]
    assert drawn(sampler, 2, 5) == 66
    copies.send(new_owner(1), [])
    stream.synchronize()
    assert drawn(sampler, 1, 4 + LATE_BLOCKS) == 9
    assert drawn(sampler, 2, 5) == 66
