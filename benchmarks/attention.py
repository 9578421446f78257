"""Which attention kernel is fastest? Those of both regions, alone, in CUDA graphs, a different KV tensor per call.

    python -m benchmarks.attention --json attention.json

Needs CUDA and FlashInfer. Decode: rows that attend to one context length, by the split-KV kernel, by XQA and by FA2
planned with one row per request; then the same bucket with one row in four live, since padding is not free. Prefill:
one chunk behind a context, by FA3 and FA2. The floor is the time to read the keys and values once at the copy
bandwidth that is measured first.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import machine, show, write_json
from benchmarks.timing import median_s, read_bytes_per_s
from graphgen.models.attention.kernels import AttentionShape, Kernel
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers

DEVICE = torch.device("cuda")
PAGE_SIZE = 64
NUM_LAYERS = 8
"""KV tensors a graph goes through, so that no call finds its keys in the L2 cache of the last one."""
TABLE_PAGES = 256
"""Pages of a block table, as of an engine that serves 16k positions."""


def decode_tables(num_rows: int, num_live: int, context: int, pages_wide: int) -> RowTables:
    """Live rows at one context length, pages dealt at random; the others see one position, as padded rows do."""
    pages_each = -(-context // PAGE_SIZE)
    order = np.random.default_rng(0).permutation(num_rows * pages_each).astype(np.int32)
    pages = np.zeros((num_rows, max(pages_wide, pages_each)), np.int32)
    pages[:, :pages_each] = order.reshape(num_rows, pages_each)
    empty = torch.zeros(0, dtype=torch.int32, device="cuda")
    locations = torch.from_numpy(pages[:, pages_each - 1].astype(np.int64)).cuda() * PAGE_SIZE
    kv_lens = torch.full((num_rows,), context, dtype=torch.int32, device="cuda")
    kv_lens[num_live:] = 1
    starts = torch.zeros(1, dtype=torch.int32, device="cuda")
    return RowTables(locations, starts, empty, empty.view(0, 1), kv_lens, torch.from_numpy(pages).cuda())


def chunk_tables(length: int, context: int) -> RowTables:
    """One chunk of `length` rows that ends at position `context`, and no decode rows."""
    count = -(-context // PAGE_SIZE)
    pages = torch.arange(count, dtype=torch.int32, device="cuda").view(1, count)
    positions = torch.arange(context - length, context, device="cuda")
    empty = torch.zeros(0, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    return RowTables(
        positions,
        starts,
        torch.tensor([context], dtype=torch.int32, device="cuda"),
        pages,
        empty,
        torch.zeros(0, count, dtype=torch.int32, device="cuda"),
    )


class Case:
    """Rows, layers of KV and one backend."""

    def __init__(self, shape: AttentionShape, tables: RowTables, kernels: tuple[Kernel, Kernel]) -> None:
        num_rows = tables.kv_locations.shape[0]
        num_pages = int(max(tables.decode_pages.max() if tables.decode_pages.numel() else 0, 0)) + 1
        num_pages = max(num_pages, tables.chunk_pages.shape[1] if tables.chunk_pages.numel() else 0)
        pool = (num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        self._layers = [
            tuple(torch.randn(pool, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(NUM_LAYERS)
        ]

        def rows(heads: int) -> Tensor:
            return torch.randn(num_rows, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)

        self._rows = rows(shape.num_heads), rows(shape.num_kv_heads), rows(shape.num_kv_heads)
        self._angles = rows(1)[:, 0], rows(1)[:, 0]
        from graphgen.models.attention.flashinfer import FlashInferAttention  # imports Triton, which needs a GPU

        self._backend = FlashInferAttention(shape, 1, num_rows, num_rows, kernels=kernels)
        starts, chunk_lens, decode_lens = (
            tensor.cpu().numpy().astype(np.int32)
            for tensor in (tables.chunk_starts, tables.chunk_kv_lens, tables.decode_kv_lens)
        )
        self._backend.plan(num_rows - len(decode_lens), starts, chunk_lens, decode_lens)
        self._variant = AttentionVariant(Numbers(shape.head_dim**-0.5).packed())
        self._attention = self._backend.prepare(tables)

    def run(self) -> None:
        for k_pages, v_pages in self._layers:
            self._attention.attend(*self._rows, *self._angles, LayerPages(k_pages, v_pages), self._variant)

    def microseconds_per_layer(self, repeats: int) -> float:
        return median_s(self.run, DEVICE, repeats) * 1e6 / NUM_LAYERS


DECODE_KERNELS = (Kernel.SPLIT_KV, Kernel.XQA, Kernel.FA2)


def decode_rows(
    shape: AttentionShape, batches: Sequence[int], contexts: Sequence[int], bandwidth: float
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for context in contexts:
        for batch in batches:
            if _kv_bytes(shape, batch, context) * NUM_LAYERS > 40 << 30:
                continue
            for live in sorted({batch, -(-batch // 4)}, reverse=True):
                floor_us = _kv_bytes(shape, live, context) / bandwidth * 1e6
                row: dict[str, object] = {"rows": batch, "live": live, "context": context, "floor us": floor_us}
                for kernel in DECODE_KERNELS:
                    case = Case(shape, decode_tables(batch, live, context, TABLE_PAGES), (Kernel.FA3, kernel))
                    row[f"{kernel.name} us"] = case.microseconds_per_layer(20)
                rows.append(row)
    return rows


def _kv_bytes(shape: AttentionShape, num_rows: int, context: int) -> int:
    return 2 * num_rows * context * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize


def prefill_rows(shape: AttentionShape, lengths: Sequence[int]) -> list[dict[str, object]]:
    rows = []
    for length in lengths:
        row: dict[str, object] = {"chunk": length, "context": length + 512}
        for kernel in (Kernel.FA3, Kernel.FA2):
            case = Case(shape, chunk_tables(length, length + 512), (kernel, Kernel.SPLIT_KV))
            row[f"{kernel.name} us"] = case.microseconds_per_layer(20)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[192, 448, 960, 1984])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures CUDA kernels and no GPU is here: run it on a machine with one")
    num_heads, num_kv_heads, head_dim = options.heads
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, PAGE_SIZE, torch.bfloat16, (0,))
    bandwidth = read_bytes_per_s(DEVICE, 2 << 30)
    about = machine(torch.cuda.get_device_name()) | {"read TB/s": f"{bandwidth / 1e12:.2f}"}
    decode = decode_rows(shape, options.batches, options.contexts, bandwidth)
    prefill = prefill_rows(shape, options.chunks)
    show("Decode rows, KV write included, us a layer", decode, about)
    show("One prompt chunk, KV write included, us a layer", prefill, about)
    write_json(options.json, [*decode, *prefill], about)


if __name__ == "__main__":
    main()
