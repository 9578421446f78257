"""What does a layer cost in a step of a few decode rows: compiled, and in the fused kernels of few rows?

    python -m benchmarks.layers --json layers.json
    python -m benchmarks.layers --model benchmarks/shapes/llama-3.1-8b --rows 1 8 64 --quantization none fp8 int4

Needs CUDA. Only a model's config is read; weights are random, so rows choose their experts at random. A step of some of
the model's last layers is captured, once with two of them and once with more; a layer is the difference for each of
those between, so that what stands before and behind the layers falls out. `kernels` are the launches of a layer,
counted by the profiler. The floor is the time to read a layer's weights (of experts those that rows chose, as many as
are likely), and the keys and values of the context, once, at the bandwidth that is measured first. `fused` is what an
engine runs where the kernels serve that many rows; elsewhere it is the compiled layer again.
"""

import argparse
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.attention import PAGE_SIZE, decode_tables
from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, show, write_json
from benchmarks.timing import median_s, read_bytes_per_s
from graphgen.models.attention.backend import AttentionBackend
from graphgen.models.attention.kernels import AttentionShape
from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.few_rows_layers import most_rows, serves_model
from graphgen.models.kv_cache import KVCache
from graphgen.models.spec import Embedding, Experts, Head, Layer, ModelSpec
from graphgen.models.spec.formats import Quantization, format_at_load

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
FEWEST_LAYERS = 2
KINDS: dict[str, Quantization | None] = {"none": None, "fp8": "fp8", "int8": "int8", "int4": "int4"}
VOCABULARY = 4096
"""Tokens; the embedding and the head are no part of a layer."""


class Step(NamedTuple):
    """A step of decode rows, all at one context length."""

    decoder: Decoder
    cache: KVCache
    backend: AttentionBackend
    rows: int
    context: int

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Token ids and positions."""
        positions = torch.full((self.rows,), self.context - 1, device=DEVICE)
        return torch.arange(self.rows, device=DEVICE), positions

    def seconds_and_kernels(self, repeats: int) -> tuple[float, int]:
        """Of one step."""
        token_ids, positions = self.inputs()
        attention = self.backend.prepare(decode_tables(self.rows, self.rows, self.context, 1))

        def run() -> Tensor:
            return self.decoder.forward(token_ids, positions, positions + 1, self.cache, [attention])

        seconds = median_s(run, DEVICE, repeats)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
        return seconds, sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def last_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """The model without the layers before."""
    return replace(
        spec,
        layers=spec.layers[-count:],
        vocab_size=VOCABULARY,
        num_tokens=None,
        embedding=Embedding(),
        head=Head(),
    )


def open_backend(spec: ModelSpec, most_decode_rows: int) -> AttentionBackend:
    """Kernels for decode rows that need no library."""
    from graphgen.models.attention.flashinfer import FlashInferAttention  # imports Triton, which needs a GPU
    from graphgen.models.attention.latent_tiles import LatentTiles
    from graphgen.models.attention.row_tiles import TileShape

    if (latent := spec.latent) is not None:
        tile = TileShape(latent.num_heads, 1, latent.latent_size, latent.rope_dim)
        return LatentTiles(tile, PAGE_SIZE, DTYPE, 1, 16, most_decode_rows, DEVICE)
    mixer, windows = spec.attention, tuple(sorted({window or 0 for window in spec.windows}))
    shape = AttentionShape(mixer.num_heads, mixer.num_kv_heads, mixer.width, PAGE_SIZE, DTYPE, windows, None)
    return FlashInferAttention(shape, 1, 16, most_decode_rows)


def make_decoder(spec: ModelSpec, fused: bool) -> Decoder:
    """With random weights, compiled."""
    decoder = Decoder(spec, DTYPE, DEVICE, fused=fused)
    for parameter in decoder.parameters():
        if parameter.dtype.itemsize > 1:
            parameter.data.normal_(0.0, 0.02)
        else:  # codes, of which one of e4m3 is not a number
            parameter.data.view(torch.uint8).random_(0, 127)
    decoder.compile_layers()
    return decoder


def quantised(spec: ModelSpec, kind: Quantization | None) -> ModelSpec:
    """The model with its linear layers quantised as `--quantization` would."""
    if kind is None:
        return spec
    return spec.with_formats(lambda _, place: format_at_load(kind, place.num_columns))


def layer_bytes(layer: Layer, hidden_size: int, rows: int, context: int) -> float:
    """That a step must read of a layer, once. An expert is read where a row chose it; rows choose alike."""
    mixer, feed_forward = layer.mixer, layer.feed_forward
    size = DTYPE.itemsize
    seen = min(context, mixer.window or context)
    saved = sum(
        size * place.num_rows * place.num_columns - place.num_bytes(size) for place in layer.linears(hidden_size)
    )
    num_bytes = mixer.num_parameters(hidden_size) * size - saved + rows * seen * mixer.keeps("bfloat16").bytes
    if not isinstance(feed_forward, Experts):
        return float(num_bytes + feed_forward.num_parameters(hidden_size) * size)
    chosen = 1.0 - (1.0 - feed_forward.top_k / feed_forward.num_experts) ** rows
    each = 3 * hidden_size * feed_forward.size * size
    shared = 0 if feed_forward.shared is None else feed_forward.shared.num_parameters(hidden_size) * size
    router = feed_forward.num_experts * hidden_size * 4
    return num_bytes + router + shared + chosen * feed_forward.num_experts * each


def rows_of(spec: ModelSpec, kind: str, options: argparse.Namespace, bytes_per_s: float) -> list[Row]:
    """Both paths at each number of rows. kind: of quantisation."""
    found: list[Row] = []
    served = most_rows(spec) if serves_model(spec, DTYPE) else 0
    num_pages = max(options.rows) * -(-options.context // PAGE_SIZE)
    for fused in (name == "fused" for name in options.paths):
        specs = [last_layers(spec, count) for count in (FEWEST_LAYERS, options.layers)]
        parts = [
            (make_decoder(part, fused), KVCache(part, num_pages, PAGE_SIZE, DTYPE, DEVICE), open_backend(part, 64))
            for part in specs
        ]
        for rows in options.rows:
            taken = [Step(*part, rows, options.context).seconds_and_kernels(options.repeats) for part in parts]
            (less_s, less_kernels), (more_s, more_kernels) = taken
            between = options.layers - FEWEST_LAYERS
            seconds = (more_s - less_s) / between
            floor_s = layer_bytes(spec.layers[-1], spec.hidden_size, rows, options.context) / bytes_per_s
            row = {"model": spec.architecture, "rows": rows, "layers": "fused" if fused else "compiled"}
            row |= {"quantization": kind}
            row |= {"kernels": (more_kernels - less_kernels) / between, "us": seconds * 1e6, "floor us": floor_s * 1e6}
            found.append({**row, "times the floor": seconds / floor_s, "served": rows <= served})
        del parts
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return sorted(found, key=lambda row: (row["rows"], row["layers"]))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="benchmarks/shapes/qwen3-30b-a3b", help="folder or hub id; only its config")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=1024, help="positions that each row sees")
    parser.add_argument("--paths", nargs="+", choices=("compiled", "fused"), default=["compiled", "fused"])
    parser.add_argument("--layers", type=int, default=6, help=f"of the longer step, more than {FEWEST_LAYERS}")
    parser.add_argument("--quantization", nargs="+", choices=KINDS, default=["none"], help="of the linear layers")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.layers times kernels for CUDA, and there is no CUDA device: run it where one is")
    if options.layers <= FEWEST_LAYERS:
        raise SystemExit(f"--layers is {options.layers}: give more than {FEWEST_LAYERS}")
    spec = load_spec(options.model).padded()
    bytes_per_s = read_bytes_per_s(DEVICE, 2048 << 20)
    with torch.inference_mode():
        rows = [
            row
            for kind in options.quantization
            for row in rows_of(quantised(spec, KINDS[kind]), kind, options, bytes_per_s)
        ]
    about = machine(torch.cuda.get_device_name(DEVICE)) | {
        "context": str(options.context),
        "read TB/s": f"{bytes_per_s / 1e12:.3f}",
    }
    show("Layers of a step of few decode rows", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
