"""From a checkpoint to a Decoder with its weights in place.

Owns how tensors reach the fused weights. Reads safetensors only: other formats can run code when they are read.
Never holds a second copy of the weights. Called by the worker at its start.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint_files import stored_tensors, weight_files
from graphgen.models.decoder import Decoder
from graphgen.models.families import FAMILIES
from graphgen.models.layers import DecoderLayer
from graphgen.models.spec import ModelSpec

LoadFormat = Literal["auto", "safetensors", "dummy"]
ProgressCallback = Callable[[int, int], None]
"""(bytes in place, bytes of all weights)."""

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""


def load_decoder(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: ProgressCallback | None = None,
    fused: bool = False,
) -> Decoder:
    """A decoder on `device` with the weights of `folder`, shard by shard, or random ones.

    spec: load_spec's of the same folder, which knows whether a stored head is the embedding again.
    load_format: "auto" and "safetensors" read the folder; "dummy" reads nothing and draws weights of the real
    shapes on the device itself from `seed`. fused: see Decoder. Raises CheckpointError for a checkpoint that is not
    safetensors, lacks a tensor, has one too many, or one of another shape.
    """
    decoder = Decoder(spec, dtype, device, fused)
    report = progress or (lambda done, total: None)
    if load_format == "dummy":
        _fill_randomly(decoder, spec, seed, report)
    else:
        _fill_from_folder(decoder, spec, folder, report)
    return decoder


def checkpoint_targets(decoder: Decoder, spec: ModelSpec) -> dict[str, Tensor]:
    """Every tensor a checkpoint must have -> the weight, or the rows of a fused weight, that it fills."""
    names = FAMILIES[spec.architecture].names
    targets = {
        names.embedding: decoder.embedding.weight.data,
        names.final_norm: decoder.final_norm.weight.data,
    }
    if decoder.head is not None:
        targets[names.head] = decoder.head.weight.data
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        attention, mlp, prefix = layer.attention, layer.mlp, names.layer.format(layer=number)
        norms = {names.input_norm: layer.input_norm, names.post_attention_norm: layer.post_attention_norm}
        if attention.q_norm is not None and attention.k_norm is not None:
            norms |= {names.q_norm: attention.q_norm, names.k_norm: attention.k_norm}
        for name, norm in norms.items():
            targets[f"{prefix}{name}.weight"] = norm.weight.data
        for parts, sizes, linear in (
            (names.qkv, [spec.q_size, spec.kv_size, spec.kv_size], attention.qkv),
            (names.o, [spec.hidden_size], attention.o),
            (names.gate_up, [spec.ffn_size, spec.ffn_size], mlp.gate_up),
            (names.down, [spec.hidden_size], mlp.down),
        ):
            for kind, weight in linear.named_parameters():
                for part, rows in zip(parts, torch.split(weight.data, sizes), strict=True):
                    targets[f"{prefix}{part}.{kind}"] = rows
    return targets


@torch.no_grad()
def _fill_from_folder(decoder: Decoder, spec: ModelSpec, folder: Path, report: ProgressCallback) -> None:
    files = weight_files(folder)
    targets = checkpoint_targets(decoder, spec)
    names, stored = FAMILIES[spec.architecture].names, stored_tensors(files)
    if spec.tie_embeddings and names.head in stored and names.embedding not in stored:
        targets[names.head] = targets.pop(names.embedding)  # one weight, stored under its other name
    missing = set(targets)
    total = sum(target.nbytes for target in targets.values())
    done = 0
    report(done, total)
    for name, shard, tensor in _tensors(files, decoder.embedding.weight.device):
        if name not in targets:
            _refuse_unknown(name, spec, shard)
            continue
        target = targets[name]
        _check_tensor(name, tensor, target, shard)
        if name not in missing:
            _refuse_second(name, tensor, target, shard)
            continue
        target.copy_(tensor)
        missing.remove(name)
        done += target.nbytes
        report(done, total)
    if missing:
        first = min(missing)
        raise CheckpointError(
            f"tensor {first!r} of shape {list(targets[first].shape)} is missing in {folder} ({len(missing)}"
            f" of {len(targets)} tensors are): the checkpoint is incomplete or no {spec.architecture}"
        )


def _tensors(shards: list[Path], device: torch.device) -> Iterator[tuple[str, Path, Tensor]]:
    """Every tensor of every shard, one at a time, read straight onto the device."""
    for shard in shards:
        try:
            with safe_open(shard, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
                    yield name, shard, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is not a readable safetensors file ({error}): download it again") from error


def _check_tensor(name: str, tensor: Tensor, target: Tensor, shard: Path) -> None:
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"tensor {name!r} in {shard} has shape {list(tensor.shape)}, the config asks for"
            f" {list(target.shape)}: config.json and the weights are of different models"
        )
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise CheckpointError(
            f"tensor {name!r} in {shard} has dtype {tensor.dtype}, supported are float32, bfloat16 and"
            " float16: use the unquantised checkpoint"
        )


def _refuse_second(name: str, tensor: Tensor, loaded: Tensor, shard: Path) -> None:
    """Two shards with the same tensor are harmless while it is the same."""
    if not torch.equal(tensor.to(loaded), loaded):
        raise CheckpointError(
            f"tensor {name!r} in {shard} differs from the one of that name in another shard: the folder mixes the"
            " shards of two checkpoints, download it anew"
        )


def _refuse_unknown(name: str, spec: ModelSpec, shard: Path) -> None:
    """A tensor without a place would be left out of the arithmetic in silence, a bias for one."""
    # load_spec has compared it with the embedding: another head would have made the spec an untied one.
    duplicate_head = spec.tie_embeddings and name == FAMILIES[spec.architecture].names.head
    if not duplicate_head and not name.endswith(_IGNORED_SUFFIXES):
        raise CheckpointError(
            f"tensor {name!r} in {shard} has no place in a {spec.architecture} with this config.json:"
            " config.json and the weights are of different models"
        )


@torch.no_grad()
def _fill_randomly(decoder: Decoder, spec: ModelSpec, seed: int, report: ProgressCallback) -> None:
    """Weights as an untrained model has them: normal matrices, norms of one, biases of zero."""
    generator = torch.Generator(decoder.embedding.weight.device).manual_seed(seed)
    weights = list(decoder.named_parameters())
    total = sum(weight.nbytes for _, weight in weights)
    done = 0
    report(done, total)
    for name, weight in weights:
        if weight.ndim == 2:
            weight.normal_(0.0, spec.initializer_std, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        done += weight.nbytes
        report(done, total)
