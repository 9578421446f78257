"""What does a mixture of experts cost, by rows and by how its products are computed?

    python -m benchmarks.experts --json experts.json
    python -m benchmarks.experts --model benchmarks/shapes/qwen3-30b-a3b --rows 1 16 64 512 2048
    python -m benchmarks.experts --model benchmarks/shapes/qwen3-30b-a3b --rows 1 8 --cut gate_up
    python -m benchmarks.experts --model benchmarks/shapes/qwen3-30b-a3b --format fp8

Only a model's config is read; weights are random. Rows choose their experts at random, all of them alike. `operator` is
what a step calls: Triton tiles on CUDA, one expert after the other on the CPU. `grouped_mm` is torch's. `batched`
multiplies each pair of a row and an expert with a copy of the expert's weights; both know no quantised weights.
`few rows` are the fused kernels of a step of few decode rows on SM90: router, both products and the norms around them.
The floor is the time to read the weights of the experts that rows chose, once, at the bandwidth that is measured first.
Without --model: two small shapes on the CPU, those of Qwen3-30B-A3B, gpt-oss-20b and Mixtral-8x7B on a GPU.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor, nn

from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, show, write_json
from benchmarks.timing import median_s, read_bytes_per_s
from graphgen.launch.devices import find_device
from graphgen.models.chaining import can_chain
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.experts.operator import gated, run_experts
from graphgen.models.families import load_spec
from graphgen.models.few_rows_layers import MOST_PAIRS
from graphgen.models.formats.linear import LinearStack
from graphgen.models.formats.quantise import quantised
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import WHOLE, Experts, Norm, Quantization, Router, format_at_load

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

    gate_up: LinearStack
    down: LinearStack

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return (self.gate_up.num_bytes + self.down.num_bytes) // self.down.count

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Of a layer that is not quantised."""
        gate_up, down = self.gate_up.stored, self.down.stored
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        return gate_up, down


Product = Callable[[Layer, Tensor, Tensor], Tensor]
"""(layer, x [T, H], experts [T, K]) -> [T, K, H]; the fused one chooses experts itself and adds up, [T, H]."""


def by_operator(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    return run_experts(x, experts, layer.gate_up.stored, None, layer.down.stored, None, "silu", None, False)


def by_grouped_mm(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    pairs, (gate_up, down) = experts.flatten(), layer.matrices
    ordered, order = pairs.sort()
    numbers = torch.arange(layer.down.count, device=x.device)
    ends = torch.searchsorted(ordered, numbers, right=True).int()
    inner = F.grouped_mm(x[order // experts.shape[1]], gate_up.mT, offs=ends)
    made = F.grouped_mm(gated(inner, "silu", None, False), down.mT, offs=ends)
    return torch.empty_like(made).index_copy_(0, order, made).view(*experts.shape, -1)


def by_batched_mm(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    pairs, (gate_up, down) = experts.flatten(), layer.matrices
    own = x.repeat_interleave(experts.shape[1], 0).unsqueeze(-1)
    inner = gated(torch.bmm(gate_up[pairs], own).squeeze(-1), "silu", None, False)
    return torch.bmm(down[pairs], inner.unsqueeze(-1)).view(*experts.shape, -1)


def fused(shape: Shape, layers: list[Layer], blocks: tuple[Any, Any] | None) -> Product:
    """The kernels of few rows. They choose experts themselves, as many as were given, by a random router. blocks: of
    experts/few_rows.py; None: its own."""
    from graphgen.models.experts.few_rows import run_experts as run_fused  # imports Triton, which needs a GPU
    from graphgen.models.normed import Normed

    dtype, device = torch.bfloat16, layers[0].down.weight.device
    spec = Experts(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        size=shape.size,
        activation="silu",
        router=Router(renormalise=True),
    )
    norm = RMSNorm(shape.hidden, Norm(), dtype).to(device)
    for weight in norm.parameters():
        weight.data.fill_(1.0)
    squares = torch.full((MOST_PAIRS, 1), float(shape.hidden), device=device)
    found = {}
    for layer in layers:
        with torch.device("meta"):
            block = MixtureOfExperts(spec, shape.hidden, dtype, WHOLE)
        block.router = nn.Parameter(torch.randn(shape.num_experts, shape.hidden, device=device), requires_grad=False)
        block.gate_up, block.down = layer.gate_up, layer.down
        found[id(layer)] = block

    def run(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
        return run_fused(found[id(layer)], x, Normed(x, squares[: len(x)]), 1e-6, norm, None, True, blocks)[0]

    return run


def cuts(which: str) -> list[tuple[Any, Any]]:
    """Other ways to cut one of the two products of the fused kernels, "gate_up" or "down"."""
    from graphgen.models.experts.few_rows import DOWN, GATE_UP, Blocks

    if which == "gate_up":
        tried = [(16, 256, 4, 2), (16, 256, 8, 3), (32, 256, 8, 2), (8, 256, 4, 3), (32, 128, 4, 3), (16, 512, 8, 2)]
        return [(Blocks(*cut), DOWN) for cut in tried]
    tried = [(16, 256, 4, 4), (16, 256, 8, 7), (8, 256, 4, 7), (8, 256, 2, 7), (16, 128, 4, 12), (32, 256, 8, 5)]
    return [(GATE_UP, Blocks(*cut)) for cut in tried]


PRODUCTS: Mapping[str, Product] = {"operator": by_operator, "grouped_mm": by_grouped_mm, "batched": by_batched_mm}


def shape_of(model: str) -> Shape:
    """The first mixture of experts of a model."""
    spec = load_spec(model)
    for layer in spec.layers:
        if isinstance(ff := layer.feed_forward, Experts):
            return Shape(spec.architecture, ff.num_experts, ff.top_k, spec.hidden_size, ff.size)
    raise SystemExit(f"{model} has no mixture of experts: choose a model that is one")


def make_layers(
    shape: Shape, device: torch.device, dtype: torch.dtype, rotate_bytes: int, kind: Quantization | None
) -> list[Layer]:
    """Layers whose weights are more bytes together than a cache holds, at least two."""

    def random(in_size: int, out_size: int) -> LinearStack:
        form = None if kind is None else format_at_load(kind, in_size)
        with device:
            stack = LinearStack(shape.num_experts, in_size, out_size, dtype, form)
            for first in range(0, stack.out_features, out_size):
                drawn = torch.empty((out_size, in_size), dtype=dtype).normal_(0.0, 0.02)
                if form is None:
                    stack.weight.data[first : first + out_size] = drawn
                else:
                    stack.fill(first, quantised(drawn, form))
        return stack

    def layer() -> Layer:
        return Layer(random(shape.hidden, 2 * shape.size), random(shape.size, shape.hidden))

    layers = [layer(), layer()]
    count = math.ceil(rotate_bytes / (shape.num_experts * layers[0].expert_bytes))
    return [*layers, *(layer() for _ in range(count - 2))]


def products(
    shape: Shape, layers: list[Layer], num_rows: int, cut: str | None, names: list[str]
) -> Mapping[str, Product]:
    """Those that serve so many rows."""
    device, num_pairs = layers[0].down.weight.device, num_rows * shape.top_k
    found = {name: PRODUCTS[name] for name in names if name != "batched" or num_pairs <= MOST_BATCHED_PAIRS}
    if layers[0].down.format is not None:
        found = {"operator": by_operator}
    if device.type == "cuda" and can_chain() and num_pairs <= MOST_PAIRS:
        found["few rows"] = fused(shape, layers, None)
        for blocks in () if cut is None else cuts(cut):
            found["few rows " + " ".join(",".join(map(str, part)) for part in blocks)] = fused(shape, layers, blocks)
    return found


def rows_of(
    shape: Shape,
    layers: list[Layer],
    dtype: torch.dtype,
    sizes: list[int],
    bytes_per_s: float,
    repeats: int,
    cut: str | None,
    names: list[str],
) -> list[Row]:
    """Every product at every number of rows."""
    device = layers[0].down.weight.device
    found: list[Row] = []
    for num_rows in sizes:
        x = torch.randn(num_rows, shape.hidden, device=device, dtype=dtype)
        experts = torch.rand(num_rows, shape.num_experts, device=device).topk(shape.top_k).indices
        read = len(experts.unique()) * layers[0].expert_bytes
        for name, product in products(shape, layers, num_rows, cut, names).items():

            def once_each(product: Product = product, x: Tensor = x, experts: Tensor = experts) -> None:
                for layer in layers:
                    product(layer, x, experts)

            seconds = median_s(once_each, device, repeats) / len(layers)
            floor_s = read / bytes_per_s
            row = {"shape": shape.name, "rows": num_rows, "product": name, "us": seconds * 1e6}
            found.append({**row, "floor us": floor_s * 1e6, "times the floor": seconds / floor_s})
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder or hub id; only its config is read")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 to 2048 on CUDA, 1 to 64 on the CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rotate-mb", type=int, help="MiB of layers; default 512 on CUDA, 16 on the CPU")
    parser.add_argument("--cut", choices=("gate_up", "down"), help="try other ways to cut this product of few rows")
    parser.add_argument(
        "--products", nargs="+", choices=tuple(PRODUCTS), default=list(PRODUCTS), help="beside few rows"
    )
    parser.add_argument("--format", choices=get_args(Quantization), help="quantise the weights")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    device = torch.device(find_device() if options.device == "auto" else options.device)
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    sizes = options.rows or ([1, 4, 8, 16, 64, 256, 512, 1024, 2048] if on_cuda else [1, 8, 64])
    bytes_per_s = read_bytes_per_s(device, (2048 if on_cuda else 256) << 20)
    rows: list[Row] = []
    for shape in (shape_of(options.model),) if options.model else LARGE if on_cuda else SMALL:
        rotate_bytes = (options.rotate_mb or (512 if on_cuda else 16)) << 20
        layers = make_layers(shape, device, dtype, rotate_bytes, options.format)
        rows += rows_of(shape, layers, dtype, sizes, bytes_per_s, options.repeats, options.cut, options.products)
    about = machine(torch.cuda.get_device_name(device) if on_cuda else "cpu") | {
        "dtype": options.format or str(dtype).removeprefix("torch."),
        "read TB/s": f"{bytes_per_s / 1e12:.3f}",
    }
    show("Mixture of experts", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
