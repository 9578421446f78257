"""Which attention kernel is fastest? Those of both regions, alone, in CUDA graphs, a different KV tensor per call.

    python -m benchmarks.attention --json attention.json

Needs CUDA and FlashInfer. Decode: rows that attend to one context length, by the split-KV kernel, by XQA and by FA2
planned with one row per request; then the same bucket with one row in four live, since padding is not free. Prefill:
one chunk behind a context, by FA3 and FA2. The floor is the time to read the keys and values once at the copy
bandwidth that is measured first.

    python -m benchmarks.attention --formats bfloat16 fp8 int8

What do quantised keys and values gain? Decode rows by the split-KV kernel and one chunk by FA3, at each KV format and
context, and how much a thousand positions more take.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import make_parser, run_script
from benchmarks.report import machine, show, write_json
from benchmarks.timing import median_s, read_bytes_per_s
from graphgen.models.attention.kernels import AttentionShape, Kernel
from graphgen.models.attention.pages import STORED_DTYPES, LayerPages
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers
from graphgen.models.spec import kv_format

DEVICE = torch.device("cuda")
PAGE_SIZE = 64
NUM_LAYERS = 8
"""KV tensors a graph goes through, so that no call finds its keys in the L2 cache of the last one."""
TABLE_PAGES = 256
"""Pages of a block table, as of an engine that serves 16k positions."""
CHUNK = 512
"""Rows of the chunk at which KV formats are compared."""
COLD_BYTES = 192 << 20
"""Of all KV tensors at which KV formats are compared, at least: several times an L2 cache."""
MOST_BYTES = 18 << 30
"""Of all KV tensors at which KV formats are compared: of large ones, fewer are cold as well."""


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

    def __init__(
        self,
        shape: AttentionShape,
        tables: RowTables,
        kernels: tuple[Kernel, Kernel],
        kept_as: str = "bfloat16",
        num_layers: int = NUM_LAYERS,
    ) -> None:
        num_rows = tables.kv_locations.shape[0]
        num_pages = int(max(tables.decode_pages.max() if tables.decode_pages.numel() else 0, 0)) + 1
        num_pages = max(num_pages, tables.chunk_pages.shape[1] if tables.chunk_pages.numel() else 0)
        pool = (num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        self._layers = random_layers(pool, kept_as, num_layers)

        def rows(heads: int) -> Tensor:
            return torch.randn(num_rows, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)

        self._rows = rows(shape.num_heads), rows(shape.num_kv_heads), rows(shape.num_kv_heads)
        self._angles = rows(1)[:, 0], rows(1)[:, 0]
        from graphgen.models.attention.flashinfer import FlashInferAttention  # imports Triton, which needs a GPU

        quantised = tables.chunk_pages.numel() if kv_format(kept_as).quantised else 0
        self._backend = FlashInferAttention(shape, 1, num_rows, num_rows, kernels, quantised)
        starts, chunk_lens, decode_lens = (
            tensor.cpu().numpy().astype(np.int32)
            for tensor in (tables.chunk_starts, tables.chunk_kv_lens, tables.decode_kv_lens)
        )
        self._backend.plan(num_rows - len(decode_lens), starts, chunk_lens, decode_lens)
        self._variant = AttentionVariant(Numbers(shape.head_dim**-0.5).packed())
        self._attention = self._backend.prepare(tables)

    def run(self) -> None:
        for pages in self._layers:
            self._attention.attend(*self._rows, *self._angles, pages, self._variant)

    def microseconds_per_layer(self, repeats: int) -> float:
        return median_s(self.run, DEVICE, repeats) * 1e6 / len(self._layers)


def random_layers(pool: tuple[int, ...], kept_as: str, num_layers: int) -> list[LayerPages]:
    """Pages of each layer. pool: [P, page_size, Hkv, D]. All layers have the same numbers: making others would take
    longer than reading them."""
    numbers = torch.randn(pool, device="cuda", dtype=torch.bfloat16)
    if not kv_format(kept_as).quantised:
        return [LayerPages(numbers.clone(), numbers.clone()) for _ in range(num_layers)]
    scales = torch.ones(pool[2], device="cuda")
    if kv_format(kept_as).scale_bytes:
        numbers, scales = numbers * 32, torch.full(pool[:3], 1 / 32, device="cuda")
    stored = numbers.to(STORED_DTYPES[kept_as])
    return [LayerPages(stored.clone(), stored.clone(), scales, scales.clone()) for _ in range(num_layers)]


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


def kv_formats(
    shape: AttentionShape, formats: Sequence[str], batches: Sequence[int], contexts: Sequence[int], bandwidth: float
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(decode rows with their floors, one chunk) at every context, and last what 1000 positions more take."""
    decodes: list[dict[str, object]] = []
    for batch in batches:
        times: dict[tuple[str, int], float] = {}
        for context in contexts:
            row: dict[str, object] = {"rows": batch, "context": context}
            for kept_as in formats:
                kv_bytes = 2 * batch * context * kv_format(kept_as).position_bytes(shape.num_kv_heads, shape.head_dim)
                num_layers = max(1, min(max(NUM_LAYERS, COLD_BYTES // kv_bytes), MOST_BYTES // kv_bytes))
                tables = decode_tables(batch, batch, context, TABLE_PAGES)
                case = Case(shape, tables, (Kernel.FA3, Kernel.SPLIT_KV), kept_as, num_layers)
                times[kept_as, context] = case.microseconds_per_layer(20)
                row[f"{kept_as} us"] = times[kept_as, context]
                row[f"{kept_as} floor"] = kv_bytes / bandwidth * 1e6
            decodes.append(row)
        decodes.append({"rows": batch, "context": "+1000"} | _slopes(times, formats, contexts))
    chunks: list[dict[str, object]] = []
    for context in contexts:
        chunk: dict[str, object] = {"chunk": CHUNK, "context": context}
        for kept_as in formats:
            case = Case(shape, chunk_tables(CHUNK, context), (Kernel.FA3, Kernel.SPLIT_KV), kept_as)
            chunk[f"{kept_as} us"] = case.microseconds_per_layer(20)
        chunks.append(chunk)
    return decodes, chunks


def _slopes(times: dict[tuple[str, int], float], formats: Sequence[str], contexts: Sequence[int]) -> dict[str, object]:
    """Of the first format, and those of the others as shares of it."""
    near, far = min(contexts), max(contexts)
    slopes = [(times[kept_as, far] - times[kept_as, near]) / (far - near) * 1000 for kept_as in formats]
    return {f"{formats[0]} us": slopes[0]} | {
        f"{kept_as} us": f"{slope:.2f} (x {slope / slopes[0]:.2f})"
        for kept_as, slope in zip(formats[1:], slopes[1:], strict=True)
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[192, 448, 960, 1984])
    parser.add_argument("--formats", nargs="+", help="KV formats that are compared, instead of kernels")
    parser.add_argument("--format-batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--format-contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures CUDA kernels and no GPU is here: run it on a machine with one")
    num_heads, num_kv_heads, head_dim = options.heads
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, PAGE_SIZE, torch.bfloat16, (0,))
    bandwidth = read_bytes_per_s(DEVICE, 2 << 30)
    about = machine(torch.cuda.get_device_name()) | {"read TB/s": f"{bandwidth / 1e12:.2f}"}
    if options.formats:
        sizes = options.format_batches, options.format_contexts
        by_format, chunks = kv_formats(shape, options.formats, *sizes, bandwidth)
        show("Decode rows by KV format, KV write included, us a layer", by_format, about)
        show("One prompt chunk by KV format, KV write and plain pages included, us a layer", chunks, about)
        write_json(options.json, [*by_format, *chunks], about)
        return
    decode = decode_rows(shape, options.batches, options.contexts, bandwidth)
    prefill = prefill_rows(shape, options.chunks)
    show("Decode rows, KV write included, us a layer", decode, about)
    show("One prompt chunk, KV write included, us a layer", prefill, about)
    write_json(options.json, [*decode, *prefill], about)


if __name__ == "__main__":
    run_script(main)
