"""Attention of decode rows: one row a request, its KV read in parallel by several programs. A Triton kernel, CUDA only.

The positions of a row are split over programs, each of which makes an online softmax over its part; the last program
of a row and KV head to finish combines the parts (flash decoding, https://pytorch.org/blog/flash-decoding). The query
heads of one KV head share a program, so keys and values are read once.

In a step without chunks the kernel also norms and rotates the row's query and key and writes its key and value into
their page, which saves launches: the program that reads a row's newest position writes it first.

Block tables and lengths are read on the device, so a step needs no plan. The split adapts to each row's length: a
captured grid serves short and long contexts, and a padded row costs one page.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.quantised import product_dtype, reads_pairs
from graphgen.models.attention.split_kv_kernel import share_kernel, split_kv_kernel
from graphgen.models.attention.variant import Scoring
from graphgen.models.chaining import launch_options

_LEAST_PROGRAMS = 512
"""Programs that keep an H200's memory busy: about four on each multiprocessor."""

_PROGRAMS_AT_ONCE = 528
"""Programs that an H200 runs at once, all of them with room to spare: four on each multiprocessor."""
_MOST_PAIRS_AT_ONCE = 128
"""Of a row and a KV head, up to which that is best: us of 16 rows of 2600 positions, and of 1300 to 3900, 8 KV heads:
49 and 50 with so many programs, 54 and 54 with any number of them, in fp8 32 and 33, 37 and 38. More pairs have few
parts each, of lengths that differ, and end sooner together with twice as many: 32 rows of 1300 to 3900 98 and 85."""

_EVEN_PROGRAMS = 1024
"""Programs of unequal rows that end at about the same time: two times as many, shared out as they end."""

_MOST_SPLITS = 32
_LEAST_SPLITS = 8  # also beside many rows: one long context among short ones must not be read by one program alone
_WHOLE_BLOCKS = 16  # blocks that are not worth a split beside _EVEN_PROGRAMS others
_BLOCK = 64
_ROWS_READ = 1024  # lengths that share_kernel reads at a time
_STAGES = 2
_STAGES_OF_BYTES = 3
"""Blocks on their way or multiplied at a time, where keys and values have one byte: a third costs no program its place
then. Where they have two it takes the place of two programs in five, which costs 64 rows 3 % and gains 256 rows 2 %."""
_COMBINED_ALONE = 8
"""Parts of a row that are read at a time when they are combined, in a step of one row."""


class HeadNorms(NamedTuple):
    """RMSNorm of each head of queries and keys."""

    q: Tensor
    """[D]: the weight."""
    k: Tensor
    """[D]"""
    eps: float


class FreshRows(NamedTuple):
    """What decode rows bring whose keys and values are not in their pages yet."""

    k: Tensor
    """[R, Hkv, D], before its rotation; any strides but 1 in the last dimension."""
    v: Tensor
    """[R, Hkv, D], the same."""
    cos: Tensor
    """[R, D] contiguous, of the row's position."""
    sin: Tensor
    """[R, D] contiguous."""
    temperatures: Tensor | None
    """[R] float32, by which the rotated queries are multiplied."""
    head_norms: HeadNorms | None = None
    """Of q and k, which come before it then; None: they need none, or have it behind them."""


class SplitKvTensors(NamedTuple):
    """What the programs of one row tell each other. Steps and layers run one after another, so they share it."""

    parts: Tensor
    """float32: the sums of each part of a row."""
    peaks_and_sums: Tensor
    """float32: the largest score and the sum of weights of each part."""
    finished: Tensor
    """int32: parts that are done, of each row and KV head. Zero before the first use; the kernel leaves it so."""
    part_blocks: Tensor
    """[1] int32: blocks of a part, as `share_out` left it."""


def open_workspace(
    most_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> SplitKvTensors:
    """For steps of at most so many rows."""
    most_parts = max(rows * num_splits(rows, num_kv_heads)[0] for rows in range(1, most_rows + 1))
    return SplitKvTensors(
        parts=torch.empty(most_parts * num_heads * head_dim, dtype=torch.float32, device=device),
        peaks_and_sums=torch.empty(most_parts * num_heads * 2, dtype=torch.float32, device=device),
        finished=torch.zeros(most_rows * num_kv_heads, dtype=torch.int32, device=device),
        part_blocks=torch.ones(1, dtype=torch.int32, device=device),
    )


def share_out(kv_lens: Tensor, num_kv_heads: int, page_size: int, workspace: SplitKvTensors) -> None:
    """Says how long a part is in a step of these rows, for layers whose rows see all of their positions: so long that
    the parts of all rows together are what the device runs at once, or twice that, and none is left to run alone behind
    the others.

    kv_lens: [R] int32. One row is split by its own length.
    """
    num_rows = len(kv_lens)
    if num_rows > 1:
        at_once = _PROGRAMS_AT_ONCE * (1 if num_rows * num_kv_heads <= _MOST_PAIRS_AT_ONCE else 2)
        num_programs = max(1, at_once // num_kv_heads)
        share_kernel[(1,)](
            kv_lens, workspace.part_blocks, num_rows, num_programs, min(page_size, _BLOCK), _WHOLE_BLOCKS, _ROWS_READ
        )


@functools.cache
def num_splits(num_rows: int, num_kv_heads: int) -> tuple[int, int]:
    """(parts that a row is split into at most, blocks that make a row worth another part) for a step of so many rows.

    Equal parts, so the last may be shorter than the others by less than a block for each of them.
    """
    needed, even = (-(-programs // (num_rows * num_kv_heads)) for programs in (_LEAST_PROGRAMS, _EVEN_PROGRAMS))
    splits = min(max(1 << (needed - 1).bit_length(), _LEAST_SPLITS), _MOST_SPLITS)
    return splits, max(1, _WHOLE_BLOCKS // even)


def split_kv_attention(
    q: Tensor,
    out: Tensor,
    pages: LayerPages,
    block_tables: Tensor,
    kv_lens: Tensor,
    workspace: SplitKvTensors,
    scoring: Scoring,
    fresh: FreshRows | None,
    chained: bool,
) -> None:
    """Writes out [R, Hq, D], the attention of R rows over the first kv_lens positions of their block tables.

    q: [R, Hq, D], any strides but 1 in the last dimension. fresh: the newest position of every row is not in its page
    yet; norms and rotates q and k and writes k and v there. None: q is rotated and all is in the pages. out:
    contiguous. pages: k and v of one layout, page_size a power of two from 16. block_tables: [R, M] int32. kv_lens:
    [R] int32, at least 1. workspace: for at least R rows, and of this step, see share_out. chained: launch before the
    kernel ahead is done, and wait inside (programmatic dependent launch; SM90 on).
    """
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = pages.k.shape[1:3]
    splits, least_blocks = num_splits(num_rows, num_kv_heads)
    group = num_heads // num_kv_heads
    # Without fresh rows nothing reads them.
    k, v, cos, sin, temperatures, head_norms = fresh or (q, q, q, q, None, None)
    numbers = scoring.numbers
    scale, softcap = math.log2(math.e) * numbers.scale, None
    if numbers.softcap:
        scale, softcap = 2.0 * scale / numbers.softcap, math.log2(math.e) * numbers.softcap
    split_kv_kernel[(splits, num_kv_heads, num_rows)](
        q,
        pages.k,
        pages.v,
        block_tables,
        kv_lens,
        out,
        workspace.parts,
        workspace.peaks_and_sums,
        workspace.finished,
        workspace.part_blocks if num_rows > 1 and not numbers.window and not numbers.segment else None,
        k,
        v,
        cos,
        sin,
        scale,
        numbers.window,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        block_tables.stride(0),
        pages.k.stride(0),
        pages.k.stride(1),
        pages.k.stride(2),
        least_blocks,
        softcap,
        numbers.segment or None,
        scoring.sinks,
        scoring.alibi_slopes,
        temperatures,
        pages.k_scales,
        pages.v_scales,
        *(head_norms or (None, None, 0.0)),
        group,
        triton.next_power_of_2(group),
        head_dim,
        page_size,
        min(page_size, _BLOCK),
        splits,
        fresh is not None,
        chained,
        product_dtype(q.dtype, pages.k.dtype),
        reads_pairs(q.dtype, pages.v.dtype),
        _COMBINED_ALONE if num_rows == 1 else 1,
        num_warps=4,
        num_stages=_STAGES_OF_BYTES if pages.k.itemsize == 1 else _STAGES,
        **launch_options(chained),
    )
