"""What does a mixture of experts cost, by rows and by how its products are computed?

    python -m benchmarks.experts --json experts.json
    python -m benchmarks.experts --model benchmarks/shapes/qwen3-30b-a3b --rows 1 16 64 512 2048

Only a model's config is read; weights are random. Rows choose their experts at random, all of them alike. `operator` is
what a step calls: Triton tiles on CUDA, one expert after the other on the CPU. `grouped_mm` is torch's. `batched`
multiplies each pair of a row and an expert with a copy of the expert's weights. The floor is the time to read the
weights of the experts that rows chose, once, at the bandwidth that is measured first. Without --model: two small shapes
on the CPU, those of Qwen3-30B-A3B, gpt-oss-20b and Mixtral-8x7B on a GPU.
"""

import argparse
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor

from benchmarks.report import Row, machine, show, write_json
from benchmarks.timing import median_s, read_bytes_per_s
from graphgen.launch.config import find_device
from graphgen.models.experts.operator import gated, run_experts
from graphgen.models.families import load_spec
from graphgen.models.spec import Experts

MOST_BATCHED_PAIRS = 256
"""Beyond, copies of weights for each pair would fill the memory."""


class Shape(Struct, frozen=True):
    """Of one layer."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    size: int


SMALL = (Shape("8 experts", 8, 2, 256, 512), Shape("64 experts", 64, 8, 256, 128))
LARGE = (
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Shape("gpt-oss-20b", 32, 4, 2880, 2880),
    Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
)


class Layer(Struct, frozen=True):
    """Weights of one layer: [E, 2 I, H] and [E, H, I]."""

    gate_up: Tensor
    down: Tensor


Product = Callable[[Layer, Tensor, Tensor], Tensor]
"""(layer, x [T, H], experts [T, K]) -> [T, K, H]"""


def by_operator(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    return run_experts(x, experts, layer.gate_up, None, layer.down, None, "silu", None, False)


def by_grouped_mm(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    pairs = experts.flatten()
    ordered, order = pairs.sort()
    numbers = torch.arange(layer.down.shape[0], device=x.device)
    ends = torch.searchsorted(ordered, numbers, right=True).int()
    inner = F.grouped_mm(x[order // experts.shape[1]], layer.gate_up.mT, offs=ends)
    made = F.grouped_mm(gated(inner, "silu", None, False), layer.down.mT, offs=ends)
    return torch.empty_like(made).index_copy_(0, order, made).view(*experts.shape, -1)


def by_batched_mm(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    pairs = experts.flatten()
    own = x.repeat_interleave(experts.shape[1], 0).unsqueeze(-1)
    inner = gated(torch.bmm(layer.gate_up[pairs], own).squeeze(-1), "silu", None, False)
    return torch.bmm(layer.down[pairs], inner.unsqueeze(-1)).view(*experts.shape, -1)


PRODUCTS: Mapping[str, Product] = {"operator": by_operator, "grouped_mm": by_grouped_mm, "batched": by_batched_mm}


def shape_of(model: str) -> Shape:
    """The first mixture of experts of a model."""
    spec = load_spec(model)
    for layer in spec.layers:
        if isinstance(ff := layer.feed_forward, Experts):
            return Shape(spec.architecture, ff.num_experts, ff.top_k, spec.hidden_size, ff.size)
    raise SystemExit(f"{model} has no mixture of experts: choose a model that is one")


def make_layers(shape: Shape, device: torch.device, dtype: torch.dtype, rotate_bytes: int) -> list[Layer]:
    """Layers whose weights are more bytes together than a cache holds, at least two."""
    each = 3 * shape.num_experts * shape.hidden * shape.size * dtype.itemsize
    sizes = (shape.num_experts, 2 * shape.size, shape.hidden), (shape.num_experts, shape.hidden, shape.size)

    def random(size: tuple[int, int, int]) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, 0.02)

    return [Layer(*map(random, sizes)) for _ in range(max(2, math.ceil(rotate_bytes / each)))]


def rows_of(shape: Shape, layers: list[Layer], sizes: list[int], bytes_per_s: float, repeats: int) -> list[Row]:
    """Every product at every number of rows."""
    device, dtype = layers[0].down.device, layers[0].down.dtype
    found: list[Row] = []
    for num_rows in sizes:
        x = torch.randn(num_rows, shape.hidden, device=device, dtype=dtype)
        experts = torch.rand(num_rows, shape.num_experts, device=device).topk(shape.top_k).indices
        read = 3 * len(experts.unique()) * shape.hidden * shape.size * dtype.itemsize
        for name, product in PRODUCTS.items():
            if name == "batched" and experts.numel() > MOST_BATCHED_PAIRS:
                continue

            def once_each(product: Product = product, x: Tensor = x, experts: Tensor = experts) -> None:
                for layer in layers:
                    product(layer, x, experts)

            seconds = median_s(once_each, device, repeats) / len(layers)
            floor_s = read / bytes_per_s
            row = {"shape": shape.name, "rows": num_rows, "product": name, "us": seconds * 1e6}
            found.append({**row, "floor us": floor_s * 1e6, "times the floor": seconds / floor_s})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; only its config is read")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 to 2048 on CUDA, 1 to 64 on the CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rotate-mb", type=int, help="MiB of layers; default 512 on CUDA, 16 on the CPU")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    device = torch.device(find_device() if options.device == "auto" else options.device)
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    sizes = options.rows or ([1, 4, 8, 16, 64, 256, 512, 1024, 2048] if on_cuda else [1, 8, 64])
    bytes_per_s = read_bytes_per_s(device, (2048 if on_cuda else 256) << 20)
    rows: list[Row] = []
    for shape in (shape_of(options.model),) if options.model else LARGE if on_cuda else SMALL:
        layers = make_layers(shape, device, dtype, (options.rotate_mb or (512 if on_cuda else 16)) << 20)
        rows += rows_of(shape, layers, sizes, bytes_per_s, options.repeats)
    about = machine(torch.cuda.get_device_name(device) if on_cuda else "cpu") | {
        "dtype": str(dtype).removeprefix("torch."),
        "read TB/s": f"{bytes_per_s / 1e12:.3f}",
    }
    show("Mixture of experts", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    main()
