"""From a checkpoint to a Decoder with its weights in place.

Owns the way of every stored tensor to the target that the decoder's blocks name for it; which kind of file it comes
from, checkpoint.py knows. Never holds a second copy of the weights. Called by the worker at its start.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint import open_checkpoint
from graphgen.models.checkpoint_files import StoredTensor
from graphgen.models.collectives import Ranks
from graphgen.models.decoder import Decoder
from graphgen.models.families import FAMILIES
from graphgen.models.families.family import Family
from graphgen.models.formats.layout import Quantised
from graphgen.models.formats.linear import Linear, StoredWeight
from graphgen.models.formats.quantise import quantised
from graphgen.models.kv_scales import KVScales
from graphgen.models.norms import LayerNorm, RMSNorm
from graphgen.models.spec import ModelSpec
from graphgen.models.targets import AnyTarget, Stored

LoadFormat = Literal["auto", "safetensors", "dummy"]
ProgressCallback = Callable[[int, int], None]
"""(bytes in place, bytes of all weights)."""

_DRAWN_ELEMENTS = 2**23
"""Random weights that are quantised at once."""


def load_decoder(
    location: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: ProgressCallback | None = None,
    fused: bool = False,
    kept_as: str | None = None,
    ranks: Ranks | None = None,
) -> Decoder:
    """A decoder on `device` with the weights of a folder or a GGUF file, tensor by tensor, or random ones.

    spec: load_spec's of the same location, which knows whether a stored head is the embedding again.
    load_format: "auto" and "safetensors" read the checkpoint; "dummy" reads nothing and draws weights of the real
    shapes on the device itself from `seed`. fused, ranks: see Decoder. kept_as: the KV format, for a word on scales
    that nobody needs. Raises CheckpointError for a checkpoint that cannot be read, lacks a tensor, has one too many, or
    one of another shape.
    """
    decoder = Decoder(spec, dtype, device, fused, ranks)
    report = progress or (lambda done, total: None)
    if load_format == "dummy":
        _fill_randomly(decoder, spec, seed, report)
    else:
        _fill_from_checkpoint(decoder, spec, location, report, kept_as)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.settle(dtype)
    return decoder


@torch.no_grad()
def _fill_from_checkpoint(
    decoder: Decoder, spec: ModelSpec, location: Path, report: ProgressCallback, kept_as: str | None
) -> None:
    checkpoint, family = open_checkpoint(location), FAMILIES[spec.family]
    targets, names = dict(decoder.weights(family.names)), family.names
    stored = {family.stored_name(name): tensor for name, tensor in checkpoint.stored_tensors(names).items()}
    if spec.head.tied and names.head in stored and names.embedding not in stored:
        targets[names.head] = targets.pop(names.embedding)  # one weight, stored under its other name
    kv_scales = KVScales(decoder, names)
    weights = {name: tensor for name, tensor in stored.items() if not kv_scales.takes(name)}
    _check_stored(weights, targets, spec, family, location)
    placed: set[str] = set()
    total = sum(target.num_bytes for target in targets.values())
    done = 0
    report(done, total)
    weight = decoder.embedding.weight
    for stored_name, shard, tensor in checkpoint.tensors(names, weight.device, weight.dtype):
        name = family.stored_name(stored_name)
        if isinstance(tensor, torch.Tensor) and kv_scales.takes(name):
            kv_scales.fill(name, tensor, shard)
        if (target := targets.get(name)) is None:
            continue
        _check_tensor(name, tensor, target, shard)
        if name in placed:
            _refuse_second(name, tensor, target, shard)
            continue
        try:
            target.fill(tensor)
        except ValueError as error:
            raise CheckpointError(f"tensor {name!r} in {shard} cannot be used: {error}") from error
        placed.add(name)
        done += target.num_bytes
        report(done, total)
        del tensor  # before the next one is read
    kv_scales.check_complete(location)
    kv_scales.tell(kept_as, spec.kv_format, location)


def _check_stored(
    stored: Mapping[str, StoredTensor],
    targets: Mapping[str, AnyTarget],
    spec: ModelSpec,
    family: Family,
    location: Path,
) -> None:
    """What can be refused before a weight is read, which may take minutes."""
    for name, tensor in stored.items():
        if (target := targets.get(name)) is None:
            _refuse_unknown(name, spec, family, tensor.file)
        else:
            _check_shape(name, tensor.shape, target, tensor.file)
    if missing := set(targets) - set(stored):
        first = min(missing)
        raise CheckpointError(
            f"tensor {first!r} of shape {list(targets[first].shape)} is missing in {location} ({len(missing)}"
            f" of {len(targets)} tensors are): the checkpoint is incomplete or no {spec.architecture}"
        )


def _check_shape(name: str, shape: tuple[int, ...], target: AnyTarget, shard: Path) -> None:
    if shape != target.shape:
        raise CheckpointError(
            f"tensor {name!r} in {shard} has shape {list(shape)}, the config asks for {list(target.shape)}: config.json"
            " and the weights are of different models"
        )


def _check_tensor(name: str, tensor: Stored, target: AnyTarget, shard: Path) -> None:
    _check_shape(name, tuple(tensor.shape), target, shard)
    if isinstance(tensor, Quantised):
        return
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise CheckpointError(
            f"tensor {name!r} in {shard} has dtype {tensor.dtype}, supported are float32, bfloat16 and"
            " float16: use the unquantised checkpoint"
        )


def _refuse_second(name: str, tensor: Stored, target: AnyTarget, shard: Path) -> None:
    """Two shards with the same tensor are harmless while it is the same."""
    if not target.holds(tensor):
        raise CheckpointError(
            f"tensor {name!r} in {shard} differs from the one of that name in another shard: the folder mixes the"
            " shards of two checkpoints, download it anew"
        )


def _refuse_unknown(name: str, spec: ModelSpec, family: Family, shard: Path) -> None:
    """A tensor without a place would be left out of the arithmetic in silence, a bias for one."""
    # load_spec has compared it with the embedding: another head would have made the spec an untied one.
    duplicate_head = spec.head.tied and name == family.names.head
    if not duplicate_head and not family.ignores(name):
        raise CheckpointError(
            f"tensor {name!r} in {shard} has no place in a {spec.architecture} with this config.json:"
            " config.json and the weights are of different models"
        )


@torch.no_grad()
def _fill_randomly(decoder: Decoder, spec: ModelSpec, seed: int, report: ProgressCallback) -> None:
    """Weights as an untrained model has them: normal matrices, norms of one, biases of zero."""
    generator = torch.Generator(decoder.embedding.weight.device).manual_seed(seed)
    modules = [module for module in decoder.modules() if any(True for _ in module.parameters(recurse=False))]
    total = sum(weight.nbytes for weight in decoder.parameters())
    done = 0
    report(done, total)
    for module in modules:
        if isinstance(module, StoredWeight) and module.format is not None:
            _fill_format(module, spec.initializer_std, generator)
        else:
            _fill_plain(module, spec.initializer_std, generator)
        done += sum(weight.nbytes for weight in module.parameters(recurse=False))
        report(done, total)


def _fill_plain(module: nn.Module, std: float, generator: torch.Generator) -> None:
    of_norm = isinstance(module, RMSNorm | LayerNorm)
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim > 1 and not of_norm and not name.endswith("bias"):
            weight.normal_(0.0, std, generator=generator)
        else:
            weight.fill_(1.0 if name == "weight" else 0.0)


def _fill_format(linear: StoredWeight, std: float, generator: torch.Generator) -> None:
    """The weight is drawn and quantised some rows at a time."""
    assert linear.format is not None, "the other kind of layer"
    step = max(1, _DRAWN_ELEMENTS // (linear.in_features * linear.format.rows)) * linear.format.rows
    for first in range(0, linear.out_features, step):
        size = min(step, linear.out_features - first), linear.in_features
        drawn = torch.empty(size, dtype=torch.float32, device=linear.weight.device)
        linear.fill(first, quantised(drawn.normal_(0.0, std, generator=generator), linear.format))
    if isinstance(linear, Linear) and linear.bias is not None:
        linear.bias.zero_()
