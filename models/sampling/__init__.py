"""Sampling inside the step: every request by its own rules, any mix in one batch, one graph.

Owns the choice of implementation: Triton kernels on CUDA, torch elsewhere; both draw the same tokens from equal
logits. Called by the worker, once to make a Sampler and then within every step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphgen.models.sampling import logprobs, reference
from graphgen.models.sampling.tables import (
    BIAS_WIDTH,
    NO_TOKEN,
    ROW_WIDTH,
    SamplerTables,
    allocate,
    asked_for,
    mask_words,
    pack_biases,
    pack_slot,
)

__all__ = [
    "BIAS_WIDTH",
    "NO_TOKEN",
    "ROW_WIDTH",
    "Sampler",
    "SamplerTables",
    "allocate",
    "asked_for",
    "make_sampler",
    "mask_words",
    "pack_biases",
    "pack_slot",
]


@dataclass(frozen=True)
class Sampler:
    """The tables and the operations on them that a step consists of, in this order; the last three precede a step that
    needs them.

    All but those three have fixed shapes and may be captured in a graph when the tables are on CUDA. None waits for the
    device.
    Shapes: `C` chunks, `T` token rows, `N` drawing rows, `V` vocabulary.
    """

    tables: SamplerTables
    _write_slots: Callable[[SamplerTables, Tensor, Tensor, Tensor], None]
    _count_inputs: Callable[[SamplerTables, Tensor, Tensor, Tensor], None]
    _sample: Callable[[SamplerTables, Tensor, Tensor, Tensor], Tensor]
    _write_logprobs: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    _write_masks: Callable[[SamplerTables, Tensor, int], None]

    def write_slots(self, rows: Tensor, slots: Tensor, inits: Tensor) -> None:
        """Gives slots new owners and forgets what the old ones saw.

        rows: `pack_slot` rows, int32, [C, ROW_WIDTH] or flat. slots, inits: [C]; where inits is 0 nothing changes
        and the row may hold anything. No slot is given twice in one call.
        """
        self._write_slots(self.tables, rows.view(-1, ROW_WIDTH), slots, inits)

    def count_inputs(self, token_ids: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Enters the step's input tokens, [T] each, into what their slots have seen.

        Of a request with penalties every position is an input once between two owners of its slot, or is forgotten
        before it is one again (`forget_inputs`). So counts are exact when a token is drawn, also after a preempted
        request was computed again. Of others, of which nobody reads them, they may count what a grammar has refused.
        """
        self._count_inputs(self.tables, token_ids, slots, positions)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """The next tokens, [N] int32: in [0, V), or NO_TOKEN where every logit is NaN or -inf.

        logits: [N, V], or more columns, of which those from V on are never drawn; any float type, left as they are.
        slots: [N]. positions: [N], of the tokens being drawn.
        """
        return self._sample(self.tables, logits[:, : self.tables.vocab_size], slots, positions)

    def write_logprobs(self, logits: Tensor, token_ids: Tensor, slots: Tensor, rings: Tensor, ring_row: Tensor) -> None:
        """What the slots' owners ask to know of the tokens that were drawn, [N], into a row of a ring of outputs.

        logits: [N, columns], all of them: the softmax is over all that the model has. The others: see
        `logprobs.write_logprobs`.
        """
        self._write_logprobs(logits, token_ids, self.tables.logprobs, slots, rings, ring_row)

    def write_scores(
        self, logits: Tensor, token_ids: Tensor, asked: Tensor, places: Tensor, rings: Tensor, ring_row: Tensor
    ) -> None:
        """The same of tokens that are known. asked, places: see `logprobs.write_logprobs`."""
        self._write_logprobs(logits, token_ids, asked, places, rings, ring_row)

    def write_masks(self, block: Tensor, num_masks: int) -> None:
        """block: int32, of so many masks the slots, the positions, and the words, mask_words(V) of each; on CUDA in
        pinned memory, or on the device. A mask is for the draw of its slot's token at its position. No part of a
        captured step: few steps need it.

        Before a step, or beside one: a draw that is under way sees such a mask or not, or in parts. So what it draws is
        the best of tokens among which all are that the mask allows, and, if the mask allows it, the right one. A mask
        must not be written while its slot may draw under the one before it."""
        self._write_masks(self.tables, block, num_masks)

    def lift_masks(self, slots: Tensor) -> None:
        """Before a step that gives slots, [n] int32, new owners: what masks they have are not for those."""
        reference.lift_masks(self.tables, slots)

    def write_biases(self, slots: Tensor, rows: Tensor) -> None:
        """Before a step that gives slots, [n] int32, new owners with biases: their `pack_biases` rows, [n, BIAS_WIDTH]
        int32. They count once `write_slots` has given them these owners."""
        reference.write_biases(self.tables, slots, rows)

    def forget_inputs(self, slots: Tensor, token_ids: Tensor) -> None:
        """Before a step that computes a token of the output of these slots once more, [n] int32 each: `count_inputs`
        will enter it again."""
        reference.forget_inputs(self.tables, slots, token_ids)


def make_sampler(num_slots: int, vocab_size: int, device: torch.device) -> Sampler:
    """A Sampler with fresh tables on `device`. vocab_size: of the tokens that may be drawn."""
    tables = allocate(num_slots, vocab_size, device)
    if device.type != "cuda":
        return Sampler(
            tables,
            reference.write_slots,
            reference.count_inputs,
            reference.sample,
            logprobs.write_logprobs,
            reference.write_masks,
        )
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.sampling import kernels, logprob_kernels

    return Sampler(
        tables,
        kernels.write_slots,
        kernels.count_inputs,
        kernels.sample,
        logprob_kernels.write_logprobs,
        kernels.write_masks,
    )
