"""Latent attention: what it keeps, what it loads, and what of it is refused.

That its logits and tokens equal Hugging Face's is in tests/worker/test_parity.py, that two ranks add up in
test_shards.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphgen.commands.prebuild import launch_of, shapes_of
from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.launch.config import EngineConfig
from graphgen.models.attention import reference
from graphgen.models.attention.variant import AttentionVariant
from graphgen.models.families import load_spec
from graphgen.models.kv_cache import KVCache, bytes_per_page
from graphgen.models.loader import load_decoder
from graphgen.models.page_layout import page_layout
from tests import ROOT
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.splits import assert_equal_at_every_split

CPU = torch.device("cpu")
_SHAPES = ROOT / "benchmarks" / "shapes"

_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
V2_LITE: dict[str, Any] = json.loads((_SHAPES / "deepseek-v2-lite" / "config.json").read_text())
V3: dict[str, Any] = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280},
    **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3},
    **{"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "norm_topk_prob": True},
    **{"routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1},
    **{"rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "ep_size": 1},
}
MOONLIGHT = {
    **V3,
    **{"vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408},
    **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "rope_theta": 50000, "rope_scaling": None},
    **{"num_nextn_predict_layers": 0, "max_position_embeddings": 8192},
}
PUBLISHED = {"V2-Lite": (V2_LITE, 15.7, 27), "V3": (V3, 671.0, 61), "Moonlight": (MOONLIGHT, 16.0, 27)}
"""config.json, billions of parameters and layers."""


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_their_parameters_and_keep_576_values_a_position(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, billions, num_layers = PUBLISHED[name]
    spec = load_spec(write(tmp_path, config))
    assert spec.num_parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert spec.kv_bytes_per_token("bfloat16") == num_layers * 576 * 2
    assert spec.padded() == spec
    assert "does not know" not in caplog.text


def test_a_layer_has_one_tensor_of_pages_and_copies_it_once() -> None:
    spec = tiny.spec_of(tiny.build("deepseek_v3"))
    cache = KVCache(spec, num_pages=5, page_size=4, dtype=torch.float32, device=CPU)
    page_bytes = bytes_per_page(spec, page_layout(spec.layers, 512), 4, "float32")
    assert page_bytes == 4 * spec.num_layers * (22 + 6) * 4
    assert cache.num_bytes == 6 * page_bytes
    assert all(k is v for k, v in zip(cache.k_pages, cache.v_pages, strict=True))
    for pages in cache.k_pages:
        pages.normal_()
    before = [pages.clone() for pages in cache.k_pages]
    cache.copy_pages(torch.tensor([(0, 3), (4, 1)], dtype=torch.int32))
    for pages, old in zip(cache.k_pages, before, strict=True):
        assert torch.equal(pages, old[[0, 4, 2, 0, 4, 5]])


def test_the_path_of_devices_with_graphs_gives_the_logits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend_latent(
        step: reference.TorchStep, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        return reference.latent_of_all_rows(q, row, pages, step.tables, variant.numbers, value_size)

    monkeypatch.setattr(reference.TorchStep, "attend_latent", attend_latent)
    model = tiny.save("deepseek_v3", tmp_path)
    assert_equal_at_every_split(model, Driver(load_decoder(tmp_path, load_spec(tmp_path), torch.float32, CPU)))


@pytest.mark.parametrize(("case", "number"), [("deepseek_v3", 61), ("glm4_moe_lite", 47)])
def test_the_layer_that_drafts_is_left_out_and_no_other(case: str, number: int, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    spec, file = load_spec(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = torch.zeros(4, 4)
    save_file({**tensors, f"model.layers.{number}.eh_proj.weight": extra}, file, {"format": "pt"})
    load_decoder(tmp_path, spec, torch.float32, CPU)
    save_file({**tensors, f"model.layers.{number + 1}.eh_proj.weight": extra}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="has no place"):
        load_decoder(tmp_path, spec, torch.float32, CPU)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            V3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            r"_block_size = \[128\]",
        ),
        (V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (V3, {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (V3, {"qk_rope_head_dim": 63}, r"v_head_dim \(512, 128, 63, 128\)"),
        (V3, {"kv_lora_rank": 0}, r"v_head_dim \(0, 128, 64, 128\)"),
        (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob = True"),
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method in .'greedy'"),
        (V2_LITE, {"rope_interleave": True}, "rope_interleave = True"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_spec(write(tmp_path, {**config, **changes}))


def test_prebuild_builds_no_attention_library(tmp_path: Path) -> None:
    """Its kernels are all Triton's."""
    folder = write(tmp_path, V2_LITE)
    assert shapes_of(launch_of(EngineConfig(model=str(folder)), str(folder))) == []
