"""How fast are products with quantised weights? The linear layers of a model in each format, beside bfloat16.

    python -m benchmarks.formats --model benchmarks/shapes/llama-3.1-8b --json formats.json
    python -m benchmarks.formats --model benchmarks/shapes/llama-3.1-8b --cuts

Up to 64 rows in the fused kernels of few rows, beyond in the products of many; CUDA only. There fp8 and int4 have an
input in e4m3, and int4 becomes e4m3 first, which its times contain. The time to round the input is a row of its own:
the compiled layer makes it part of a norm or an activation. Every call of a timed run uses another copy of the weight,
so that none is found in a cache. The weights are random codes. TB/s counts the weights as they lie in memory, "x bf16"
how many times as fast as bfloat16 the layers are together.

--cuts times every way in CUTS to cut a product of the kernels of few rows, and the ways to make bfloat16 of a code;
the fastest belong into models/few_rows_tiles.py.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from msgspec import Struct
from msgspec.structs import replace
from torch import Tensor

from benchmarks.linear import Shape, shapes_of
from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, show, write_json
from benchmarks.timing import median_s
from graphgen.demo import model_folder
from graphgen.models.families import load_spec
from graphgen.models.formats.layout import CODE_DTYPES, codes_shape, scale_shape
from graphgen.models.formats.products import Weight, product, quantise_blocks, quantise_rows
from graphgen.models.normed import Normed
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import Norm
from graphgen.models.spec.formats import LinearFormat

if TYPE_CHECKING:  # needs Triton
    from graphgen.models import few_rows_tiles as tiles

E4M3 = LinearFormat(storage="e4m3", activation="e4m3")
BLOCK = replace(E4M3, group=128, rows=128)
INT4 = LinearFormat(storage="int4", group=128, scale_dtype="bfloat16")
FORMATS: dict[str, LinearFormat | None] = {
    "bf16": None,
    "fp8": E4M3,
    "fp8-block": BLOCK,
    "int8": LinearFormat(storage="int8"),
    "int4": INT4,
    "int4-zeros": replace(INT4, zeros=True),
}
FEW_ROWS = 64
"""Rows up to which the kernels of few rows are used."""
COMPILING_THREADS = 16

Key = TypeVar("Key", bound=Hashable)
Stored = Tensor | Weight
Layer = Callable[[Stored], object]
"""One linear layer, of a number of rows, over a weight."""


def random_stored(form: LinearFormat | None, shape: Shape) -> Stored:
    """A weight of random codes."""
    size = shape.out_size, shape.in_size
    if form is None:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02
    codes = torch.randint(256, codes_shape(form.storage, *size), device="cuda", dtype=torch.uint8)
    if form.storage == "e4m3":
        codes &= 0xF7  # a code of ones is not a number
    scales = scale_shape(form, *size)
    scale = (torch.rand(scales, device="cuda") * 0.01 + 1e-3).to(getattr(torch, form.scale_dtype))
    zeros = torch.randint(16, scales, device="cuda", dtype=torch.uint8) if form.zeros else None
    return Weight(form, codes.view(CODE_DTYPES[form.storage]), scale, zeros, None)


def stored_bytes(stored: Stored) -> int:
    if isinstance(stored, Tensor):
        return stored.nbytes
    return sum(tensor.nbytes for tensor in stored if isinstance(tensor, Tensor))


def copies_of(form: LinearFormat | None, shape: Shape, rotate_bytes: int) -> list[Stored]:
    """More bytes together than a cache holds."""
    first = random_stored(form, shape)
    count = max(2, math.ceil(rotate_bytes / stored_bytes(first)))
    return [first, *(random_stored(form, shape) for _ in range(count - 1))]


def layer(shape: Shape, num_rows: int, cut: "tiles.Shape | None" = None) -> Layer:
    """As a step of so many rows runs it, but for the rounding of its input. cut: of few rows; None: the table's."""
    x = torch.randn(num_rows, shape.in_size, device="cuda", dtype=torch.bfloat16)
    if num_rows <= FEW_ROWS:
        return _few_rows(shape, x, cut)
    of_rows, of_blocks = quantise_rows(x), quantise_blocks(x)

    def run(stored: Stored) -> object:
        if isinstance(stored, Tensor):
            return F.linear(x, stored)
        form = stored.format
        if form.storage == "int4":
            shared = form.group or 0, form.rows
            by_int4 = torch.ops.graphgen.product_of_int4.default
            return by_int4(*of_rows, stored.codes, stored.scale, stored.zeros, *shared, None, x.dtype)
        if form == E4M3:
            codes, scale = stored.codes, stored.scale
            return torch._scaled_mm(
                of_rows[0], codes.t(), of_rows[1], scale.t(), out_dtype=x.dtype, use_fast_accum=True
            )
        if form == BLOCK:
            multiply = torch.ops.graphgen.product_by_blocks.default
            return multiply(of_blocks[0], of_blocks[1], stored.codes, stored.scale, x.dtype)
        return product(x, stored, None)

    return run


def _few_rows(shape: Shape, x: Tensor, cut: "tiles.Shape | None") -> Layer:
    from graphgen.models import few_rows

    num_rows = len(x)
    normed = Normed(x, torch.ones(num_rows, 64, device="cuda"))
    if shape.name == "gate_up":
        return lambda stored: few_rows.gated_linear(normed, 1e-5, stored, None, "silu", True, cut)
    if shape.name in ("o", "down"):
        norm = RMSNorm(shape.out_size, Norm(eps=1e-5), torch.bfloat16).cuda()
        residual = torch.randn(num_rows, shape.out_size, device="cuda", dtype=torch.bfloat16)
        return lambda stored: few_rows.adding_linear(x, stored, None, residual, norm, True, cut)
    return lambda stored: few_rows.normed_linear(normed, 1e-5, stored, None, True, cut)


def compile_all(calls: Mapping[Key, Callable[[], object]]) -> set[Key]:
    """Runs each once: Triton compiles in several threads at a time. Returns those that the device cannot run, mostly
    for want of shared memory."""

    from triton.runtime.errors import OutOfResources

    def fails(call: Callable[[], object]) -> bool:
        try:
            with torch.inference_mode():
                call()
        except (RuntimeError, OutOfResources):
            return True
        return False

    # cuBLAS wants a thread to have named its device.
    with ThreadPoolExecutor(COMPILING_THREADS, initializer=partial(torch.cuda.set_device, 0)) as threads:
        failed = list(threads.map(fails, calls.values()))
    torch.cuda.synchronize()
    return {key for key, fails in zip(calls, failed, strict=True) if fails}


def seconds(call: Layer, copies: Sequence[Stored], repeats: int) -> float:
    """Median time of one call."""

    def once_each() -> None:
        for stored in copies:
            call(stored)

    return median_s(once_each, torch.device("cuda"), repeats) / len(copies)


def rows_of_formats(
    names: Sequence[str], shapes: Sequence[Shape], sizes: Sequence[int], rotate_bytes: int, repeats: int
) -> Iterator[Row]:
    """Every format at every number of rows."""
    copies = {(name, shape.name): copies_of(FORMATS[name], shape, rotate_bytes) for name in names for shape in shapes}
    layers = {(shape.name, size): layer(shape, size) for shape in shapes for size in sizes}
    failed = compile_all(
        {(name, *key): partial(call, copies[name, key[0]][0]) for name in names for key, call in layers.items()}
    )
    if failed:
        raise SystemExit(f"the device cannot run these: {sorted(failed)}")
    for size in sizes:
        of_bf16 = 0.0
        for name in names:
            times = {
                shape.name: seconds(layers[shape.name, size], copies[name, shape.name], repeats) for shape in shapes
            }
            total = sum(times.values())
            of_bf16 = total if name == "bf16" else of_bf16
            num_bytes = sum(stored_bytes(copies[name, shape.name][0]) for shape in shapes)
            yield {
                "M": size,
                "format": name,
                **{f"{of} us": round(time_s * 1e6, 1) for of, time_s in times.items()},
                "all us": round(total * 1e6, 1),
                "x bf16": round(of_bf16 / total, 2),
                "TB/s": round(num_bytes / total / 1e12, 2),
                "TFLOP/s": round(sum(shape.flops(size) for shape in shapes) / total / 1e12),
            }
        if size > FEW_ROWS:
            yield _rounding(shapes, size, repeats)


def _rounding(shapes: Sequence[Shape], num_rows: int, repeats: int) -> Row:
    """Time to round the inputs of the layers to e4m3, in kernels of their own."""
    compiled = torch.compile(quantise_rows, dynamic=True)
    times = {}
    for shape in shapes:
        inputs = [torch.randn(num_rows, shape.in_size, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        compiled(inputs[0])
        times[shape.name] = median_s(lambda: [compiled(x) for x in inputs], torch.device("cuda"), repeats) / 8  # noqa: B023
    total = sum(times.values())
    named = {f"{of} us": round(time_s * 1e6, 1) for of, time_s in times.items()}
    return {"M": num_rows, "format": "(rounding)", **named, "all us": round(total * 1e6, 1)}


class Cuts(Struct, frozen=True):
    """Ways to cut a product, all combinations."""

    columns: Sequence[int]
    turns: Sequence[int]
    slices: Sequence[int]
    stages: Sequence[int]
    early: Sequence[bool]
    conversions: Sequence[int]


CUTS = {
    1: Cuts((16, 32), (128,), (4, 8), (4, 6), (True, False), (1, 2)),
    16: Cuts((16, 32, 64), (128,), (0, 4), (4, 6), (True,), (1,)),
    64: Cuts((32, 64), (128,), (0, 4), (3, 5), (False,), (1,)),
}
"""By number of rows."""
KEPT = 3
"""Of the fastest, how many are shown."""


def rows_of_cuts(
    names: Sequence[str], shapes: Sequence[Shape], sizes: Sequence[int], rotate_bytes: int, repeats: int
) -> Iterator[Row]:
    """The fastest cuts of each layer, format and number of rows."""
    for name in names:
        form = FORMATS[name]
        if form is None:
            continue
        copies = {shape.name: copies_of(form, shape, rotate_bytes) for shape in shapes}
        for size in (size for size in sizes if size in CUTS):
            calls = {(shape, cut): layer(shape, size, cut) for shape in shapes for cut in _candidates(form, size)}
            failed = compile_all({key: partial(call, copies[key[0].name][0]) for key, call in calls.items()})
            for shape in shapes:
                times = [
                    (seconds(call, copies[shape.name], repeats), cut)
                    for (own, cut), call in calls.items()
                    if own is shape and (own, cut) not in failed
                ]
                for time_s, cut in sorted(times)[:KEPT]:
                    fields = {field: getattr(cut, field) for field in cut._fields if field != "warps"}
                    yield {"format": name, "M": size, "layer": shape.name, "us": round(time_s * 1e6, 2), **fields}


def _candidates(form: LinearFormat, num_rows: int) -> "list[tiles.Shape]":
    from graphgen.models import few_rows_tiles as tiles

    cuts = CUTS[num_rows]
    return [
        tiles.Shape(columns, turn, slices, warps=4, stages=stages, early=early, conversion=conversion)
        for columns in cuts.columns
        for turn in cuts.turns
        for slices in cuts.slices
        for stages in cuts.stages
        for early in cuts.early
        for conversion in (cuts.conversions if form.storage == "e4m3" else cuts.conversions[:1])
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(model_folder()), help="folder or hub id; only its config is read")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "fp8", "fp8-block", "int4-zeros"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 512, 1024], help="M")
    parser.add_argument("--cuts", action="store_true", help="time ways to cut the products of few rows instead")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rotate-mb", type=int, default=512, help="MiB of copies of each weight")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.formats needs CUDA, and this machine has no such device: see benchmarks.linear")
    shapes = [shape for shape in shapes_of(load_spec(options.model)) if shape.in_block]
    timed = rows_of_cuts if options.cuts else rows_of_formats
    about = machine(torch.cuda.get_device_name())
    with torch.inference_mode():
        rows = list(timed(options.formats, shapes, options.rows, options.rotate_mb << 20, options.repeats))
    show(f"Products of {options.model}", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
