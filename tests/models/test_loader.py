"""Checkpoints: every way they are laid out, every way they are broken, and random weights in their place."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint import FolderCheckpoint
from graphgen.models.checkpoint_config import resolve_model
from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.loader import LoadFormat, load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.edits import WEIGHTS, edit, edit_config

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = [5, 9, 3, 77, 8]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, load_spec(folder), dtype, CPU)


def logits(decoder: Decoder) -> Tensor:
    driver = Driver(decoder)
    return driver.step([(driver.request(TOKENS), len(TOKENS))])[0]


def reference_logits(folder: Path) -> Tensor:
    """What transformers makes of the same files, [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        whole: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return whole


def test_a_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    tiny.save("qwen2_window", one)
    tiny.save("qwen2_window", many, max_shard_size="40KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(many)), logits(load(one)), rtol=0, atol=0)


def test_a_single_file_of_any_name_is_found(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    expected = logits(load(tmp_path))
    (tmp_path / WEIGHTS).rename(tmp_path / "weights.safetensors")
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)


def test_tied_embeddings_are_held_once_and_an_equal_head_is_dropped(tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path)
    expected = logits(load(tmp_path))
    edit(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    decoder = load(tmp_path)
    assert decoder.spec.head.tied
    assert sum(weight.numel() for weight in decoder.parameters()) == decoder.spec.num_parameters
    torch.testing.assert_close(logits(decoder), expected, rtol=0, atol=0)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_a_head_of_its_own_is_used_though_the_config_ties_it(
    max_shard_size: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save("llama", tmp_path, max_shard_size=max_shard_size)
    edit_config(tmp_path, tie_word_embeddings=True)
    decoder = load(tmp_path)
    assert not decoder.spec.head.tied
    assert sum(weight.numel() for weight in decoder.parameters()) == decoder.spec.num_parameters
    torch.testing.assert_close(logits(decoder), reference_logits(tmp_path), rtol=1e-4, atol=1e-4)
    assert f"the checkpoint has a {HEAD} of its own: that is used" in caplog.text


def test_a_head_that_differs_in_its_last_value_is_its_own(tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path)

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1.0

    edit(tmp_path, add_head)
    torch.testing.assert_close(logits(load(tmp_path)), reference_logits(tmp_path), rtol=1e-4, atol=1e-4)
    assert not load_spec(tmp_path).head.tied


def test_a_tied_weight_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path)
    expected = logits(load(tmp_path))
    edit(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)
    torch.testing.assert_close(reference_logits(tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_a_whole_file_wins_over_an_index(tmp_path: Path) -> None:
    """As with transformers. People save a whole file beside old shards, or delete the shards and forget the index."""
    tiny.save("llama", tmp_path, max_shard_size="40KB")
    tiny.save("llama", tmp_path / "whole", seed=1)
    (tmp_path / "whole" / WEIGHTS).rename(tmp_path / WEIGHTS)
    assert (tmp_path / INDEX).exists()
    expected = logits(load(tmp_path))
    torch.testing.assert_close(reference_logits(tmp_path), expected, rtol=1e-4, atol=1e-4)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)


def test_a_tensor_of_two_shards_must_be_the_same_in_both(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    expected = logits(load(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    norm = "model.norm.weight"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", norm: "b.safetensors"}}))
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({norm: tensors[norm]}, tmp_path / "b.safetensors")
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)
    save_file({norm: tensors[norm] + 1}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' .* differs from the one of that name in another"):
        load(tmp_path)


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    load(tmp_path)
    assert "adapter_config.json is not applied" in caplog.text
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has only an adapter"):
        load(tmp_path)


def test_weights_are_converted_to_the_asked_dtype(tmp_path: Path) -> None:
    reference = tiny.save("llama", tmp_path)
    decoder = load(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in decoder.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(decoder.embedding.weight, reference.model.embed_tokens.weight.to(torch.bfloat16))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_progress_ends_at_the_bytes_of_the_weights(load_format: LoadFormat, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    spec = load_spec(tmp_path)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    load_decoder(tmp_path, spec, torch.float32, CPU, load_format, progress=progress)
    total = spec.weight_bytes("float32")
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_dummy_weights_need_no_file_and_follow_the_seed(tmp_path: Path) -> None:
    tiny.save("llama_biases_wide_heads", tmp_path)
    spec = load_spec(tmp_path)

    def dummy(seed: int) -> Decoder:
        return load_decoder(Path("/nowhere"), spec, torch.float32, CPU, "dummy", seed)

    first, again, other = dummy(1), dummy(1), dummy(2)
    torch.testing.assert_close(logits(first), logits(again), rtol=0, atol=0)
    assert not torch.allclose(logits(first), logits(other))
    weights = dict(first.named_parameters())
    assert weights["layers.0.mlp.gate_up.weight"].std().item() == pytest.approx(spec.initializer_std, rel=0.05)
    assert (weights["layers.0.input_norm.weight"] == 1).all()
    assert (weights["layers.0.attention.qkv.bias"] == 0).all()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny.save("qwen3", tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.k_norm.weight' of shape \[16\] is missing"):
        load(tmp_path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(79, 48)}))
    with pytest.raises(CheckpointError, match=r"up_proj.weight' .* shape \[79, 48\], the config asks for \[80, 48\]"):
        load(tmp_path)


EXPERT = "model.layers.0.mlp.experts.3.down_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("case", "name", "change", "said"),
    [
        ("qwen3_moe", EXPERT, None, "is missing"),
        ("qwen3_moe", EXPERT.replace(".3.", ".99."), torch.zeros(2, 2), "has no place"),
        ("qwen3_moe", EXPERT, torch.zeros(3, 5), r"has shape \[3, 5\], the config asks for"),
        ("qwen3_moe", ROUTER, None, "is missing"),
        ("qwen3_moe", ROUTER, torch.zeros(3, 48), r"has shape \[3, 48\], the config asks for"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", None, "is missing"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", torch.zeros(9, 48), r"has shape \[9, 48\]"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.bias", torch.zeros(9), "has no place"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", torch.zeros(48, 160), r"has shape \[48, 160\]"),
    ],
)
def test_tensors_of_experts_and_fused_ones_are_named(
    case: str, name: str, change: Tensor | None, said: str, tmp_path: Path
) -> None:
    tiny.save(case, tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(name) if change is None else tensors.update({name: change}))
    with pytest.raises(CheckpointError, match=f"{re.escape(repr(name))} .*{said}"):
        load(tmp_path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=r"q_proj.bias' .* has no place in a LlamaForCausalLM"):
        load(tmp_path)


def test_what_does_not_fit_is_refused_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them may take minutes."""
    monkeypatch.setattr(FolderCheckpoint, "tensors", None)
    for number, change in enumerate(
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}),
            lambda tensors: tensors.update({"model.norm.bias": torch.zeros(48)}),
        )
    ):
        folder = tmp_path / str(number)
        tiny.save("llama", folder)
        edit(folder, change)
        with pytest.raises(CheckpointError, match=r"model\.norm\."):
            load(folder)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    expected = logits(load(tmp_path))
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' .* has dtype torch\.(int8|float8)"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\)"):
        load(tmp_path)


def test_the_command_in_the_refusal_of_pickled_weights_converts_them(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    expected = logits(load(tmp_path))
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path)
    found = re.search(r'`python -c "(.*)"`', str(refused.value))
    assert found is not None
    exec(found[1], {})
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=0)


def test_files_in_a_publishers_own_format_are_refused_with_what_to_take(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"only consolidated\.safetensors.*convert_mistral_weights_to_hf\.py"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"params\.json.*take Hugging Face's files"):
        load_spec(tmp_path)


def test_broken_layouts_are_refused(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    spec = load_spec(tmp_path)
    index, whole = tmp_path / INDEX, tmp_path / "whole"
    (tmp_path / WEIGHTS).rename(whole)

    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_decoder(tmp_path, spec, torch.float32, CPU)

    index.write_text("{}")
    fails("is not a checkpoint index")
    for outside in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
        fails("shards are safetensors files beside the index")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    fails(r"shard model-2.safetensors .* is missing")
    index.unlink()
    (tmp_path / WEIGHTS).write_bytes(whole.read_bytes()[:1000])
    fails("not a readable safetensors file")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / WEIGHTS).unlink()
    fails("2 safetensors files and no model.safetensors.index.json")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).unlink()
    fails("has no safetensors file")


def test_a_model_is_a_folder_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"neither a local folder nor a hub id"):
        resolve_model(str(tmp_path / "absent"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' at revision 'v2' is no local folder"):
        resolve_model("nobody/nothing", "v2")
