# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions take Triton's own types, for which there is no type information.)
"""Sampling on CUDA: what reference.py does, in Triton launches a graph may capture.

Owns the launches, their scratch, and the kernels that keep the tables. Never waits for the device and allocates
nothing but scratch. Called through `Sampler` (package module) by the worker's step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.sampling.device import IN_PROMPT, PROMPT_LEN, ROW_WIDTH
from graphgen.models.sampling.draw import (
    LEVELS,
    MOST_PARTS,
    best_kernel,
    collect_kernel,
    finish_kernel,
    outline_kernel,
)
from graphgen.models.sampling.tables import SamplerTables

CANDIDATES = 8192
"""Candidates gathered per row; a row with more is searched in place."""

_TILE = 1024
_FINISH_TILE = 2048
_PROGRAMS = 4096
"""Programs a launch over all rows aims at: some waves over any device of today."""
_COUNT_TILE = 256
_CLEAR_TILE = 8192


@triton.jit
def _write_slots_kernel(settings, occurrences, rows, slots, inits, vocab_size, WIDTH: tl.constexpr, TILE: tl.constexpr):
    chunk = tl.program_id(0)
    if tl.load(inits + chunk) == 0:
        return
    slot = tl.load(slots + chunk).to(tl.int64)
    if tl.program_id(1) == 0:
        columns = tl.arange(0, WIDTH)
        row = tl.load(rows + chunk * ROW_WIDTH + columns, mask=columns < ROW_WIDTH)
        tl.store(settings + slot * ROW_WIDTH + columns, row, mask=columns < ROW_WIDTH)
    token_ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    nothing = tl.zeros([TILE], tl.int32)
    tl.store(occurrences + slot * vocab_size + token_ids, nothing, mask=token_ids < vocab_size)


@triton.jit(do_not_specialize=["num_rows", "trash_slot"])
def _count_kernel(
    settings, occurrences, token_ids, slots, positions, num_rows, trash_slot, vocab_size, TILE: tl.constexpr
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=trash_slot).to(tl.int64)
    token_id = tl.load(token_ids + rows, mask=slot != trash_slot, other=0)
    live = (slot != trash_slot) & (token_id < vocab_size)
    position = tl.load(positions + rows, mask=live, other=0)
    in_prompt = position < tl.load(settings + slot * ROW_WIDTH + PROMPT_LEN, mask=live, other=0)
    entry = occurrences + slot * vocab_size + token_id
    tl.atomic_or(entry, tl.full([TILE], IN_PROMPT, tl.int32), mask=live & in_prompt, sem="relaxed")
    tl.atomic_add(entry, tl.full([TILE], 1, tl.int32), mask=live & (position >= 0) & ~in_prompt, sem="relaxed")


@triton.jit(do_not_specialize=["num_masks"])
def _write_masks_kernel(masks, masked, block, num_masks, num_words, TILE: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(block + row).to(tl.int64)
    position = tl.load(block + num_masks + row)
    places = tl.arange(0, TILE)
    words = tl.load(block + 2 * num_masks + row * num_words + places, mask=places < num_words)
    tl.store(masks + slot * num_words + places, words, mask=places < num_words)
    tl.debug_barrier()  # the words of all threads come before the position, for every program that reads both
    tl.atomic_xchg(masked + slot, position + 1, sem="release")


def write_slots(tables: SamplerTables, rows: Tensor, slots: Tensor, inits: Tensor) -> None:
    """As reference.write_slots."""
    if not len(slots):
        return
    grid = (len(slots), triton.cdiv(tables.vocab_size, _CLEAR_TILE))
    _write_slots_kernel[grid](
        tables.settings,
        tables.occurrences,
        rows,
        slots,
        inits,
        tables.vocab_size,
        WIDTH=triton.next_power_of_2(rows.shape[1]),
        TILE=_CLEAR_TILE,
    )


def write_masks(tables: SamplerTables, block: Tensor, num_masks: int) -> None:
    """As reference.write_masks, in one launch. block: on the device, or in pinned memory, which it is read from."""
    num_words = tables.masks.shape[1]
    _write_masks_kernel[(num_masks,)](
        tables.masks, tables.masked, block, num_masks, num_words, TILE=triton.next_power_of_2(num_words), num_warps=8
    )


def count_inputs(tables: SamplerTables, token_ids: Tensor, slots: Tensor, positions: Tensor) -> None:
    """As reference.count_inputs."""
    _count_kernel[(triton.cdiv(len(slots), _COUNT_TILE),)](
        tables.settings,
        tables.occurrences,
        token_ids,
        slots,
        positions,
        len(slots),
        tables.trash_slot,
        tables.vocab_size,
        TILE=_COUNT_TILE,
    )


def sample(
    tables: SamplerTables, logits: Tensor, slots: Tensor, positions: Tensor, candidates: int = CANDIDATES
) -> Tensor:
    """As reference.sample. `candidates` bounds the scratch of a row; it decides speed, never the token."""
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _TILE)
    num_tiles_each = triton.cdiv(num_tiles, min(MOST_PARTS.value, triton.cdiv(_PROGRAMS, num_rows)))
    num_parts = triton.cdiv(num_tiles, num_tiles_each)
    scratch = _Scratch(num_rows, num_parts, candidates, logits.device)
    inputs = (logits, logits.stride(0), tables.settings, tables.occurrences, tables.biases, slots, positions)
    masks = (tables.masks, tables.masked)
    best = (scratch.part_scores, scratch.part_ids)
    outline = (scratch.part_levels, scratch.part_masses)
    gathered = (scratch.candidate_scores, scratch.candidate_ids, scratch.num_candidates)
    sizes = (vocab_size, num_parts, num_tiles_each)
    tiles = {"TILE": _TILE, "enable_fp_fusion": False}
    grid = (num_rows, num_parts)
    best_kernel[grid](*inputs, *masks, *best, scratch.num_candidates, *sizes, **tiles)
    outline_kernel[grid](*inputs, scratch.part_scores, *outline, *sizes, **tiles)
    collect_kernel[grid](*inputs, scratch.part_scores, *outline, *gathered, *sizes, CAPACITY=candidates, **tiles)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    finish_kernel[(num_rows,)](
        *inputs,
        *masks,
        *best,
        *outline,
        *gathered,
        tokens,
        vocab_size,
        num_parts,
        CAPACITY=candidates,
        TILE=_FINISH_TILE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return tokens


class _Scratch:
    """What the launches of one draw hand to each other; never read before it is written."""

    def __init__(self, num_rows: int, num_parts: int, candidates: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(num_rows, *shape, dtype=dtype, device=device)

        self.part_scores = empty(num_parts, dtype=torch.float32)
        self.part_ids = empty(num_parts, dtype=torch.int32)
        self.part_levels = empty(num_parts, LEVELS.value, dtype=torch.float32)
        self.part_masses = empty(num_parts, dtype=torch.int64)
        self.candidate_scores = empty(candidates, dtype=torch.float32)
        self.candidate_ids = empty(candidates, dtype=torch.int32)
        self.num_candidates = empty(dtype=torch.int32)
