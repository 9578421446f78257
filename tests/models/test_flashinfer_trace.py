"""What is traced of a layer with FlashInfer's operator, which needs Triton to be imported but no GPU to be traced."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from graphgen.models.attention.tables import RowTables
from graphgen.models.compilation import CompiledHalves
from graphgen.models.layers import DecoderLayer
from tests.models.test_few_rows_layers import HIDDEN, SPEC, with_mixer

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.flashinfer import FlashInferStep
from graphgen.models.attention.kernels import Kernel
from graphgen.models.attention.planned import PlannedTensors, no_requests
from graphgen.models.attention.split_kv import SplitKvTensors

WINDOWS = (0, 8, 4096)
HEAD_DIM = 64
CHUNKS, PAGES_EACH = 5, 7
BUCKETS = ((30, 6), (0, 70), (30, 0), (0, 1))


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


class Steps:
    """Steps of buckets, in the shapes that `prepare` gives their tensors; what all buckets share is one tensor."""

    def __init__(self) -> None:
        self._kernels = torch.tensor([Kernel.FA3, Kernel.SPLIT_KV])
        self._workspace = torch.zeros(64, dtype=torch.uint8)
        self._work_lists = torch.zeros(len(WINDOWS), 4096, dtype=torch.uint8)
        self._windows = torch.tensor(WINDOWS)
        self._decode = SplitKvTensors(torch.zeros(300), torch.zeros(200), int32(100))

    def of(self, prefill_rows: int, decode_rows: int) -> StepTensors:
        num_rows = prefill_rows + decode_rows
        tables = RowTables(
            torch.zeros(num_rows, dtype=torch.int64),
            int32(CHUNKS + 1),
            int32(CHUNKS),
            int32(CHUNKS, PAGES_EACH),
            int32(decode_rows),
            int32(decode_rows, PAGES_EACH),
        )
        starts, page_starts, pages, last_lens, constants = no_requests(len(WINDOWS), torch.device("cpu"))
        if prefill_rows:
            starts, page_starts, last_lens = int32(CHUNKS + 1), int32(CHUNKS + 1), int32(CHUNKS)
            pages = int32(CHUNKS * PAGES_EACH + 256)
            constants = torch.zeros(len(WINDOWS), 9, dtype=torch.int64)
        of_all = self._workspace, self._work_lists, self._windows
        prefill = PlannedTensors(starts, page_starts, pages, last_lens, *of_all, constants)
        cos, sin = (torch.zeros(num_rows, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
        return StepTensors(cos, sin, FlashInferStep(tables, self._kernels, prefill, self._decode))


def test_layers_of_any_window_and_scale_in_any_bucket_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is not run: of each graph a result of the right shape is made."""
    graphs: list[torch.fx.GraphModule] = []
    num_rows = 0

    def trace(_: CompiledHalves, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        (results,) = next(node.args for node in graph.graph.nodes if node.op == "output")
        widths = [result.meta["example_value"].shape[1] for result in results]
        return lambda *arguments: tuple(torch.zeros(num_rows, width, dtype=torch.bfloat16) for width in widths)

    monkeypatch.setattr(CompiledHalves, "_compile", trace)
    torch._dynamo.reset()
    halves, steps = CompiledHalves(), Steps()
    mixers = [with_mixer(window=window or None, scale=0.1 * (index + 1)) for index, window in enumerate(WINDOWS)]
    layers = [DecoderLayer(layer, SPEC.ropes, HIDDEN, torch.bfloat16) for layer in mixers]
    pages = [torch.zeros(11, 16, 2, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2 * len(layers))]
    for bucket in BUCKETS:
        num_rows = sum(bucket)
        residual, update = (torch.zeros(num_rows, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
        for number, layer in enumerate(layers):
            k_pages, v_pages = pages[2 * number : 2 * number + 2]
            residual, gathered = halves.attend(layer, residual, update, k_pages, v_pages, steps.of(*bucket))
            residual, update = halves.feed_forward(layer, residual, gathered, None)
    torch._dynamo.reset()
    assert len(graphs) == 2
    calls = [node for graph in graphs for node in graph.graph.nodes if "paged_attention" in str(node.target)]
    assert len(calls) == 1
