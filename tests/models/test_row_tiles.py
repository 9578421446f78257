"""The kernels of row tiles in Triton's interpreter against the formula written out, in float64.

See test_split_kv.py; tests/gpu/test_latent_gpu.py and test_row_tiles_gpu.py run the compiled ones.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.step_schema import StepBounds
from graphgen.ipc.worker_messages import Bucket
from tests.models import tiny
from tests.models.attention_cases import Rules, by_hand, rules
from tests.models.driver import Driver
from tests.models.kept import FORMATS, kept_as, read_back
from tests.models.splits import reference_logits, run_mixed, tokens

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_latent_gpu.py runs the compiled kernels", allow_module_level=True)

from graphgen.models.attention import latent_tiles, row_tiles
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.row_tiles import Rows, TileShape, attend_in_tiles, open_workspace
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.worker.backend import open_backend
from tests.worker.local_engine import launch_config

PAGE_SIZE, NUM_PAGES = 16, 60
WINDOW, SEGMENT = 21, 24  # over a page's edge
GROUPED, LATENT = TileShape(6, 2, 16, 0), TileShape(5, 1, 32, 16)
# (rows, positions that the last sees): around the edges of a page, a window, a segment and a tile; a whole prompt; one
# row behind a long past; rows behind a past that no page's edge divides.
CHUNKS = ((1, 1), (16, 16), (17, 17), (3, WINDOW + 2), (1, 130), (30, 2 * SEGMENT + 1), (2, 16), (41, 99))


class Step(NamedTuple):
    """Rows of requests whose pages hold their positions, and NaN behind them."""

    q: Tensor
    pages: LayerPages
    rows: Rows
    lengths: list[int]
    histories: list[tuple[Tensor, Tensor]]  # of each request: keys and values [positions, Hkv, D]


def make_step(
    shape: TileShape, chunks: Sequence[tuple[int, int]], padding: int = 0, unused: int = 0, one_row: bool = False
) -> Step:
    """padding: rows behind the last chunk. unused: entries of the tables that no chunk has."""
    torch.manual_seed(0)
    lengths, kv_lens = [length for length, _ in chunks], [kv_len for _, kv_len in chunks]
    key_dim = shape.value_dim + shape.rest_dim
    q = torch.randn(sum(lengths) + padding, shape.num_heads, key_dim)
    pages = torch.full((2, NUM_PAGES + 1, PAGE_SIZE, shape.num_kv_heads, key_dim), float("nan"))
    free = torch.randperm(NUM_PAGES).tolist()
    width = -(-max(kv_lens) // PAGE_SIZE) + 1
    tables = torch.full((len(chunks) + unused, width), NUM_PAGES, dtype=torch.int32)
    histories = []
    for request, kv_len in enumerate(kv_lens):
        table = [free.pop() for _ in range(-(-kv_len // PAGE_SIZE))]
        tables[request, : len(table)] = torch.tensor(table)
        both = torch.randn(2, kv_len, shape.num_kv_heads, key_dim)
        places = [table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(kv_len)]
        pages.flatten(1, 2)[:, places] = both
        histories.append((both[0], both[0][..., : shape.value_dim] if shape.rest_dim else both[1]))
    starts = None
    if not one_row:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        starts = torch.cat((ends, ends[-1:].expand(unused))).int()
    lens = torch.tensor(kv_lens + [0] * unused, dtype=torch.int32)
    of_both = LayerPages(pages[0], pages[0] if shape.rest_dim else pages[1])
    return Step(q, of_both, Rows(starts, lens, tables), lengths, histories)


def run(step: Step, shape: TileShape, rule: Rules) -> Tensor:
    num_rows, num_requests = step.q.shape[0], step.rows.kv_lens.shape[0]
    workspace = open_workspace(shape, num_rows, num_requests, step.rows.starts is None, step.q.device)
    workspace = row_tiles.TileTensors(*(torch.full_like(tensor, float("nan")) for tensor in workspace))
    out = torch.full((num_rows, shape.num_heads, shape.value_dim), float("nan"))
    scoring = rule.scoring(shape.value_dim)
    attend_in_tiles(step.q, out, step.pages, step.rows, shape, workspace, scoring)
    return out


def check(out: Tensor, step: Step, rule: Rules, value_dim: int) -> None:
    rule = rule._replace(scale=value_dim**-0.5) if rule.scale is None else rule
    first = 0
    for length, (k, v) in zip(step.lengths, step.histories, strict=True):
        for row in range(length):
            sees = len(k) - length + row + 1
            want = by_hand(step.q[first + row], k[:sees], v[:sees], rule)
            torch.testing.assert_close(out[first + row], want, rtol=2e-5, atol=2e-5)
        first += length
    assert not out[first:].any(), "padded rows are zero"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the interpreter milliseconds."""
    monkeypatch.setattr(row_tiles, "_MOST_SPLITS", 2)
    monkeypatch.setattr(row_tiles, "num_splits", lambda num_tiles, num_kv_heads: (4, 1))


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As steps of many tiles run: no position is split."""
    monkeypatch.setattr(row_tiles, "_ENOUGH_PROGRAMS", 1)


RULES = rules(GROUPED.num_heads, WINDOW, SEGMENT)


@pytest.mark.parametrize("name", RULES)
def test_chunks_score_by_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(monkeypatch)
    step = make_step(GROUPED, CHUNKS, padding=7, unused=2)
    check(run(step, GROUPED, RULES[name]), step, RULES[name], GROUPED.value_dim)


@pytest.mark.parametrize("name", ["plain", "window of one", "all"])
def test_positions_of_few_tiles_are_split_and_added_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tiles, "_LEAST_POSITIONS", 1)
    step = make_step(GROUPED, CHUNKS[2:5], padding=3, unused=1)
    check(run(step, GROUPED, RULES[name]), step, RULES[name], GROUPED.value_dim)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_chunks_over_quantised_pages(name: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not split:
        whole(monkeypatch)
    monkeypatch.setattr(row_tiles, "_LEAST_POSITIONS", 1)
    step = make_step(GROUPED, CHUNKS[2:6], padding=3, unused=1)
    histories = [read_back(name, *history) for history in step.histories]
    step = step._replace(pages=kept_as(name, step.pages), histories=histories)
    for rule in ("plain", "all"):
        check(run(step, GROUPED, RULES[rule]), step, RULES[rule], GROUPED.value_dim)


@pytest.mark.parametrize("heads", [5, 70])
def test_chunks_of_latent_attention_whose_values_are_parts_of_keys(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more heads than a tile has pairs."""
    whole(monkeypatch)
    shape = LATENT._replace(num_heads=heads)
    step = make_step(shape, CHUNKS[:6], padding=5, unused=3)
    check(run(step, shape, Rules()), step, Rules(), shape.value_dim)


@pytest.mark.parametrize("heads", [1, 20, 70])
def test_decode_rows_of_latent_attention(heads: int) -> None:
    shape = LATENT._replace(num_heads=heads)
    step = make_step(shape, [(1, kv_len) for kv_len in (1, 16, 17, 130, 64)], one_row=True)
    check(run(step, shape, Rules(0.3)), step, Rules(0.3), shape.value_dim)


def test_a_step_without_a_live_row_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(LATENT, [(1, 1)], padding=40)
    rows = step.rows._replace(starts=torch.zeros(2, dtype=torch.int32), kv_lens=torch.zeros(1, dtype=torch.int32))
    assert not run(step._replace(rows=rows), LATENT, Rules()).any()
    whole(monkeypatch)
    assert not run(step._replace(rows=rows), LATENT, Rules()).any()


def test_the_published_size_of_latents() -> None:
    shape = TileShape(16, 1, 512, 64)
    step = make_step(shape, [(1, 40)], one_row=True)
    check(run(step, shape, Rules()), step, Rules(), 512)
    step = make_step(shape, [(5, 40), (2, 20)], padding=2)
    check(run(step, shape, Rules()), step, Rules(), 512)


def test_a_model_gives_the_logits_of_hugging_face_at_every_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(monkeypatch)
    monkeypatch.setattr(latent_tiles, "run_beside", lambda chunks, decodes: (decodes(), chunks()))
    library = torch.library.Library("graphgen", "IMPL")
    library.impl("latent_attention_tiles", latent_tiles.latent_attention, "CPU")
    sizes: dict[str, Any] = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "num_hidden_layers": 2}
    model = tiny.save("deepseek_v3", tmp_path, **sizes)
    decoder = load_decoder(tmp_path, load_spec(tmp_path), torch.float32, torch.device("cpu"))
    shape = TileShape(decoder.spec.layers[0].mixer.num_heads, 1, 32, 16)
    workspaces = (open_workspace(shape, 128, 16, one_row, torch.device("cpu")) for one_row in (False, True))
    chunks, decodes = workspaces
    driver = Driver(decoder, PAGE_SIZE, attention=lambda tables: latent_tiles.LatentStep(tables, chunks, decodes))
    prompt = tokens(40)
    want = reference_logits(model, prompt)
    got = run_mixed(driver, [driver.request(prompt), driver.request(prompt[:9])], seed=0)
    for logits in got:
        torch.testing.assert_close(logits, want[: len(logits)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "sizes", "served"),
    [
        ("bfloat16", {}, "row tiles of latent attention"),
        ("float32", {}, "torch .*dtype is torch.float32"),
        ("bfloat16", {"kv_lora_rank": 48}, "torch .*latents have 48 elements"),
    ],
)
def test_a_gpu_serves_latent_layers_with_the_kernel_where_it_can(
    dtype: str, sizes: dict[str, int], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_cpu(shape: TileShape, rows: int, requests: int, one_row: bool, device: torch.device) -> object:
        return open_workspace(shape, rows, requests, one_row, torch.device("cpu"))

    monkeypatch.setattr(latent_tiles, "open_workspace", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    values: dict[str, Any] = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, **sizes}
    tiny.save("deepseek_v2", tmp_path, **values)
    config = launch_config(tmp_path, 64, device="cpu", token_budget=16, num_pages=8, page_size=16)
    bounds = StepBounds(max_chunks=4, trash_slot=4, num_groups=1, most_pages=4, params_width=1)
    opened = open_backend(config, torch.device("cuda"), getattr(torch, dtype), (Bucket(12, 4), Bucket(0, 4)), bounds)
    assert re.match(served, opened.description)
    named = msgspec.structs.replace(config, attention="flashinfer")
    arguments = named, torch.device("cuda"), getattr(torch, dtype), (Bucket(12, 4),), bounds
    if served.startswith("torch"):
        with pytest.raises(GraphgenError, match="use attention='torch'"):
            open_backend(*arguments)
    else:
        assert re.match(served, open_backend(*arguments).description)
