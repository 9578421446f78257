"""How fast are the linear layers of a model? Each of its shapes at M token rows, against what the device can do.

    python -m benchmarks.linear --model benchmarks/shapes/llama-3.1-8b --json linear.json
    python -m benchmarks.linear --model benchmarks/shapes/llama-3.1-8b --kernels default cublaslt inductor

Shapes come from the model's config; no weights are read. Every call of a timed run uses another copy of the weight,
so that none is found in a cache. The floor is the time to read weight and input and write the output at the read
bandwidth that is measured first, and the peak the rate of a large square product: at few rows a layer should come
near the floor, at many rows near the peak. The rows named "all" are the sum over the layers of one decoder block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor

from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, show, write_json
from benchmarks.timing import matmul_flops_per_s, median_s, read_bytes_per_s
from graphgen.demo import model_folder
from graphgen.ipc.errors import ConfigError
from graphgen.launch.devices import find_device
from graphgen.models.families import load_spec
from graphgen.models.normed import Normed
from graphgen.models.spec import DTYPE_BYTES, Experts, ModelSpec

KERNELS = ("default", "few_rows", "cublaslt", "inductor")
"""default: F.linear as torch dispatches it; few_rows: the chained Triton kernel of steps of at most 64 rows, SM90 on;
cublaslt: F.linear by that library; inductor: the fastest it finds."""

FEW_ROWS = 64
"""Rows that the kernel of few rows is written for."""

Linear = Callable[[Tensor, Tensor], Tensor]


class Shape(Struct, frozen=True):
    """A weight [out_size, in_size]."""

    name: str
    out_size: int
    in_size: int
    in_block: bool  # a layer of the decoder block; the LM head is not

    def flops(self, num_rows: int) -> float:
        return 2.0 * num_rows * self.out_size * self.in_size

    def moved_bytes(self, num_rows: int, item_bytes: int) -> int:
        """Weight and input read, output written, once each."""
        return item_bytes * (self.out_size * self.in_size + num_rows * (self.in_size + self.out_size))


class Limits(Struct, frozen=True):
    """What the device can do at most, as measured."""

    bytes_per_s: float
    flops_per_s: float


def shapes_of(spec: ModelSpec) -> list[Shape]:
    """The linear layers of the first decoder block, fused as graphgen runs them, and the LM head."""
    hidden_size, attention, ff = spec.hidden_size, spec.attention, spec.layers[0].feed_forward
    if isinstance(ff, Experts):  # benchmarks/experts.py times those
        raise ConfigError(f"{spec.architecture} is a mixture of experts: choose a dense model")
    return [
        Shape("qkv", attention.q_size + 2 * attention.kv_size, hidden_size, True),
        Shape("o", hidden_size, attention.q_size, True),
        Shape("gate_up", (1 + ff.gated) * ff.size, hidden_size, True),
        Shape("down", hidden_size, ff.size, True),
        Shape("head", spec.vocab_size, hidden_size, False),
    ]


@contextmanager
def kernel(name: str) -> Iterator[Linear]:
    """The way to run a layer, while the block lasts."""
    if name == "inductor":
        torch.compiler.reset()  # what it tuned for other shapes would count against its limit of recompilations
        yield torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
    elif name == "few_rows":
        from graphgen.models import few_rows

        squares = torch.ones((FEW_ROWS, 1), dtype=torch.float32, device="cuda")

        def run(x: Tensor, weight: Tensor) -> Tensor:
            return few_rows.normed_linear(Normed(x, squares[: len(x)]), 0.0, weight, None, chained=True)

        yield run
    elif name == "cublaslt":
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            yield F.linear
        finally:
            torch.backends.cuda.preferred_blas_library(before)
    else:
        yield F.linear


class Weights:
    """Copies of one weight, more bytes together than a cache holds."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, rotate_bytes: int) -> None:
        weight_bytes = shape.out_size * shape.in_size * dtype.itemsize
        self.num_copies = max(2, math.ceil(rotate_bytes / weight_bytes))
        self._shape, self._device, self._dtype = shape, device, dtype
        self._copies = [
            torch.randn(shape.out_size, shape.in_size, device=device, dtype=dtype) * 0.02
            for _ in range(self.num_copies)
        ]

    def seconds(self, linear: Linear, num_rows: int, repeats: int) -> float:
        """Median time of one call."""
        x = torch.randn(num_rows, self._shape.in_size, device=self._device, dtype=self._dtype)

        def once_each() -> None:
            for weight in self._copies:
                linear(x, weight)

        return median_s(once_each, self._device, repeats) / self.num_copies


def measure(
    shape: Shape, weights: Weights, kernel_name: str, device: torch.device, sizes: Sequence[int], repeats: int
) -> dict[int, float]:
    """Seconds of one call at each number of rows."""
    seconds = {}
    for num_rows in sizes:
        with kernel(kernel_name) as linear:
            seconds[num_rows] = weights.seconds(linear, num_rows, repeats)
    return seconds


def figures(name: str, shapes: Sequence[Shape], num_rows: int, seconds: float, limits: Limits, item_bytes: int) -> Row:
    """One row of the table, for one layer or the sum of several."""
    flops = sum(shape.flops(num_rows) for shape in shapes)
    moved = sum(shape.moved_bytes(num_rows, item_bytes) for shape in shapes)
    floor_s = moved / limits.bytes_per_s
    return {
        "layer": name,
        "shape": f"{shapes[0].out_size}x{shapes[0].in_size}" if len(shapes) == 1 else "",
        "M": num_rows,
        "us": seconds * 1e6,
        "floor us": floor_s * 1e6,
        "of the floor": floor_s / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "of the peak": flops / seconds / limits.flops_per_s,
    }


def rows_of_kernel(
    kernel_name: str,
    shapes: Sequence[Shape],
    sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    rotate_bytes: int,
    repeats: int,
) -> list[Row]:
    """Every layer at every M, then their sum over the decoder block."""
    rows: list[Row] = []
    block_seconds = dict.fromkeys(sizes, 0.0)
    for shape in shapes:
        weights = Weights(shape, device, dtype, rotate_bytes)
        for num_rows, seconds in measure(shape, weights, kernel_name, device, sizes, repeats).items():
            rows.append(figures(shape.name, [shape], num_rows, seconds, limits, dtype.itemsize))
            block_seconds[num_rows] += seconds if shape.in_block else 0.0
    block = [shape for shape in shapes if shape.in_block]
    rows += [figures("all", block, size, block_seconds[size], limits, dtype.itemsize) for size in sizes]
    return [{"kernel": kernel_name, **row} for row in rows]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(model_folder()), help="folder or hub id; only its config is read")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES), help="default: the checkpoint's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256, 512, 1024, 2048], help="M")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["default"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rotate-mb", type=int, help="MiB of weight copies; default 1024 on CUDA, 64 on the CPU")
    parser.add_argument("--read-mb", type=int, help="MiB read for the bandwidth; default 2048 on CUDA, 256 on the CPU")
    parser.add_argument("--peak-size", type=int, help="of the square product; default 8192 on CUDA, 1024 on the CPU")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    spec = load_spec(options.model)
    device = torch.device(find_device() if options.device == "auto" else options.device)
    on_cuda = device.type == "cuda"
    for name in ("cublaslt", "few_rows"):
        if name in options.kernels and not on_cuda:
            raise SystemExit(f"--kernels {name} needs CUDA, the device is {device}: leave it out")
    dtype: torch.dtype = getattr(torch, options.dtype or spec.dtype)
    limits = Limits(
        read_bytes_per_s(device, (options.read_mb or (2048 if on_cuda else 256)) << 20),
        matmul_flops_per_s(device, dtype, options.peak_size or (8192 if on_cuda else 1024)),
    )
    rotate_bytes = (options.rotate_mb or (1024 if on_cuda else 64)) << 20
    about = machine(torch.cuda.get_device_name(device) if on_cuda else "cpu") | {
        "dtype": str(dtype).removeprefix("torch."),
        "read TB/s": f"{limits.bytes_per_s / 1e12:.3f}",
        "peak TFLOP/s": f"{limits.flops_per_s / 1e12:.2f}",
    }
    rows: list[Row] = []
    with torch.inference_mode():
        for name in options.kernels:
            sizes = [size for size in options.rows if name != "few_rows" or size <= FEW_ROWS]
            rows += rows_of_kernel(name, shapes_of(spec), sizes, device, dtype, limits, rotate_bytes, options.repeats)
    show(f"Linear layers of {options.model}", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
