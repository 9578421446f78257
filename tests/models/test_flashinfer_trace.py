"""What is traced of a layer with the operators for CUDA, which need Triton to be imported but no GPU to be traced."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from graphgen.models.attention.tables import RowTables
from graphgen.models.compilation import CompiledHalves
from graphgen.models.layers import DecoderLayer
from graphgen.models.spec import Latent
from tests.models.kept import FORMATS
from tests.models.kept import kept_as as quantised
from tests.models.test_few_rows_layers import HIDDEN, SPEC, with_mixer

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.flashinfer import FlashInferStep
from graphgen.models.attention.kernels import Kernel
from graphgen.models.attention.latent_tiles import LatentStep
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.planned import PlannedTensors, no_requests
from graphgen.models.attention.row_tiles import TileTensors
from graphgen.models.attention.split_kv import SplitKvTensors

WINDOWS = (0, 8, 4096)
HEAD_DIM = 64
CHUNKS, PAGES_EACH = 5, 7
BUCKETS = ((30, 6), (0, 70), (30, 0), (0, 1))


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def tables_of(prefill_rows: int, decode_rows: int) -> RowTables:
    """Of a bucket, in the shapes that the worker gives them."""
    return RowTables(
        torch.zeros(prefill_rows + decode_rows, dtype=torch.int64),
        int32(CHUNKS + 1),
        int32(CHUNKS),
        int32(CHUNKS, PAGES_EACH),
        int32(decode_rows),
        int32(decode_rows, PAGES_EACH),
    )


def angles_of(num_rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.zeros(num_rows, head_dim, dtype=torch.bfloat16) for _ in range(2))
    return cos, sin


class Steps:
    """Steps of buckets, in the shapes that `prepare` gives their tensors; what all buckets share is one tensor."""

    def __init__(self, num_plain: int = 0) -> None:
        """num_plain: pages that quantised ones are read to."""
        self._plain = torch.zeros(2, num_plain, 16, 2, HEAD_DIM, dtype=torch.bfloat16)
        self._kernels = torch.tensor([Kernel.FA3, Kernel.SPLIT_KV])
        self._workspace = torch.zeros(64, dtype=torch.uint8)
        self._work_lists = torch.zeros(len(WINDOWS), 4096, dtype=torch.uint8)
        self._windows = torch.tensor(WINDOWS)
        self._decode = SplitKvTensors(torch.zeros(300), torch.zeros(200), int32(100), int32(1))

    def of(self, prefill_rows: int, decode_rows: int) -> StepTensors:
        tables = tables_of(prefill_rows, decode_rows)
        starts, page_starts, pages, last_lens, constants = no_requests(len(WINDOWS), torch.device("cpu"))
        if prefill_rows:
            starts, page_starts, last_lens = int32(CHUNKS + 1), int32(CHUNKS + 1), int32(CHUNKS)
            pages = int32(CHUNKS * PAGES_EACH + 256)
            constants = torch.zeros(len(WINDOWS), 9, dtype=torch.int64)
        places = int32(len(pages) if self._plain.shape[1] else 0)
        of_all = self._workspace, self._work_lists, self._windows
        prefill = PlannedTensors(starts, page_starts, pages, last_lens, *of_all, constants, self._plain, places)
        step = FlashInferStep(tables, self._kernels, prefill, self._decode)
        return StepTensors(*angles_of(prefill_rows + decode_rows, HEAD_DIM), step)


class TileSteps:
    """The same where chunks run in row tiles."""

    def __init__(self) -> None:
        self._kernels = torch.tensor([Kernel.TILES, Kernel.SPLIT_KV])
        self._prefill = TileTensors(torch.zeros(300), torch.zeros(200))
        self._decode = SplitKvTensors(torch.zeros(300), torch.zeros(200), int32(100), int32(1))

    def of(self, prefill_rows: int, decode_rows: int) -> StepTensors:
        step = FlashInferStep(tables_of(prefill_rows, decode_rows), self._kernels, self._prefill, self._decode)
        return StepTensors(*angles_of(prefill_rows + decode_rows, HEAD_DIM), step)


class LatentSteps:
    """The same of latent attention."""

    def __init__(self) -> None:
        self._workspaces = [TileTensors(torch.zeros(300), torch.zeros(200)) for _ in range(2)]

    def of(self, prefill_rows: int, decode_rows: int) -> StepTensors:
        step = LatentStep(tables_of(prefill_rows, decode_rows), *self._workspaces)
        return StepTensors(*angles_of(prefill_rows + decode_rows, LATENT.rope_dim), step)


LATENT = Latent(num_heads=4, latent_size=32, plain_dim=10, rope_dim=16, value_dim=14)


def traced(
    layers: Sequence[DecoderLayer],
    steps: Any,
    kept: tuple[int, ...],
    patch: pytest.MonkeyPatch,
    kept_as: str | None = None,
) -> list[str]:
    """The attention operators in all graphs that are made of the layers in every bucket, of which there must be two:
    one of each half. No operator is run: of each graph a result of the right shape is made."""
    graphs: list[torch.fx.GraphModule] = []
    num_rows = 0

    def trace(_: CompiledHalves, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        (results,) = next(node.args for node in graph.graph.nodes if node.op == "output")
        widths = [result.meta["example_value"].shape[1] for result in results]
        return lambda *arguments: tuple(torch.zeros(num_rows, width, dtype=torch.bfloat16) for width in widths)

    patch.setattr(CompiledHalves, "_compile", trace)
    torch._dynamo.reset()
    halves = CompiledHalves()
    plain = (torch.zeros(2, 11, 16, *kept, dtype=torch.bfloat16) for _ in layers)
    of_layers = [LayerPages(*pages) if kept_as is None else quantised(kept_as, LayerPages(*pages)) for pages in plain]
    for bucket in BUCKETS:
        num_rows = sum(bucket)
        residual, update = (torch.zeros(num_rows, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
        for number, layer in enumerate(layers):
            of_layer = of_layers[number]
            residual, gathered = halves.attend(layer, residual, update, of_layer, steps.of(*bucket))
            residual, update = halves.feed_forward(layer, residual, gathered, None)
    torch._dynamo.reset()
    assert len(graphs) == 2
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    ours = [target for target in targets if target.startswith("graphgen.")]
    return [target for target in ours if "attention" in target or "by_head" in target]


@pytest.mark.parametrize("steps", [Steps, TileSteps])
def test_layers_of_any_window_and_scale_in_any_bucket_share_their_graphs(
    steps: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixers = [with_mixer(window=window or None, scale=0.1 * (index + 1)) for index, window in enumerate(WINDOWS)]
    layers = [DecoderLayer(layer, SPEC.ropes, HIDDEN, torch.bfloat16) for layer in mixers]
    calls = traced(layers, steps(), (2, HEAD_DIM), monkeypatch)
    assert calls == ["graphgen.paged_attention_flashinfer.default"]


@pytest.mark.parametrize("kept_as", FORMATS)
def test_layers_over_quantised_pages_share_their_graphs(kept_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [DecoderLayer(SPEC.layers[0], SPEC.ropes, HIDDEN, torch.bfloat16) for _ in range(3)]
    calls = traced(layers, Steps(num_plain=40), (2, HEAD_DIM), monkeypatch, kept_as)
    assert calls == ["graphgen.paged_attention_flashinfer.default"]


def test_layers_of_latent_attention_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = msgspec.structs.replace(SPEC.layers[0], mixer=LATENT)
    layers = [DecoderLayer(latent, SPEC.ropes, HIDDEN, torch.bfloat16) for _ in range(2)]
    calls = traced(layers, LatentSteps(), (1, LATENT.row_size), monkeypatch)
    by_head = "graphgen.product_by_head.default"  # into the latent's space, and back out of it
    assert calls == [by_head, "graphgen.latent_attention_tiles.default", by_head]
