"""Masks on their way to the device: which draws they are for, and that none is left for a slot's next owner."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from graphgen.capture.buffers import Words
from graphgen.capture.stream import HostStream
from graphgen.ipc.messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.models.sampling import Sampler, make_sampler, mask_words
from graphgen.worker.grammars import Draw, GrammarSlots, LateMask, SlotGrammar
from graphgen.worker.mask_copies import MaskCopies

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
    for position in range(3, 8):  # more than there are blocks
        copies.send_late([LateMask(1, position, words(40 + position)), LateMask(2, 5, words(66))])
        stream.synchronize()
        assert [drawn(sampler, 1, at) for at in (position - 1, position, position + 1)] == [9, 40 + position, 9]
    assert drawn(sampler, 2, 5) == 66
    copies.send(new_owner(1), [])
    stream.synchronize()
    assert drawn(sampler, 1, 7) == 9
    assert drawn(sampler, 2, 5) == 66


class _Compiler:
    """Its masks are made when they may be."""

    def __init__(self, may_make: threading.Event) -> None:
        self._may_make = may_make

    def matcher(self, text: str) -> object:
        return object()

    def masks_after(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        assert self._may_make.wait(10)
        return [words(20) for _ in rows]


@pytest.mark.parametrize("is_owner", [True, False])
def test_a_mask_that_is_made_late_is_sent_unless_its_slot_has_another_owner(is_owner: bool) -> None:
    may_make = threading.Event()
    sent: list[tuple[int, int, list[int]]] = []

    def send(masks: Sequence[LateMask]) -> None:
        sent.extend((mask.slot, mask.position, mask.words.tolist()) for mask in masks)

    grammars = GrammarSlots(_Compiler(may_make), send)  # type: ignore[arg-type]  # what it asks of one
    (draw,) = grammars.open(new_owner(2, "x"))
    assert draw.mask is None
    if not is_owner:
        grammars.open(new_owner(2))
    may_make.set()
    grammars.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grammar-"):
            thread.join(10)
    assert sent == ([(2, 3, words(20).tolist())] if is_owner else [])
