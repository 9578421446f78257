"""Scales of fp8 keys and values that come with a checkpoint: which of its tensors they are, and how layers get them.

Owns their names, of which each tool has its own, and the checks. A scale that is there is read; one that no layer can
take, or that some layers have and others have not, is refused. Called by loader.py; kv_cache.py hands the layers'
scales to their pages.

    self_attn.k_scale, .v_scale               compressed-tensors, of a layer or of each head
    self_attn.k_proj.k_scale, .v_proj.v_scale ModelOpt
    self_attn.k_proj.output_scale, ...        older compressed-tensors
    self_attn.kv_scale                        AutoFP8, one for both
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from graphgen.ipc.errors import CheckpointError
from graphgen.models.decoder import Decoder
from graphgen.models.families.family import TensorNames
from graphgen.models.layers import Attention

logger = logging.getLogger("graphgen.models")

_OF_QUERIES = ("q_scale", "q_proj.q_scale", "q_proj.output_scale")
"""Relative to the attention: queries are not quantised here, which is the more exact."""


class KVScales:
    """Of one decoder: the tensors that fill them, by name."""

    def __init__(self, decoder: Decoder, names: TensorNames) -> None:
        self._sides: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._zeros: set[str] = set()
        self._unneeded: set[str] = set()
        self._attentions = [layer.attention for layer in decoder.decoder_layers]
        self._placed: dict[tuple[int, str], str] = {}
        for number, mixer in enumerate(self._attentions):
            if isinstance(mixer, Attention):
                self._name_layer(number, names.layer.format(layer=number) + names.qkv[0].rpartition(".")[0])

    def _name_layer(self, number: int, attention: str) -> None:
        for side in ("k", "v"):
            own = f"{side}_scale"
            for name in (own, f"attn.{own}", f"{side}_proj.{own}", f"qkv_proj.{own}", f"{side}_proj.output_scale"):
                self._sides[f"{attention}.{name}"] = number, (side,)
            self._zeros |= {f"{attention}.{side}_zero_point", f"{attention}.attn.{side}_zero_point"}
        for name in ("kv_scale", "attn.kv_scale"):
            self._sides[f"{attention}.{name}"] = number, ("k", "v")
        self._unneeded |= {f"{attention}.{name}" for name in _OF_QUERIES}

    def takes(self, name: str) -> bool:
        """Whether a tensor of that name belongs to quantised keys and values of a layer of this decoder."""
        return name in self._sides or name in self._zeros or name in self._unneeded

    def fill(self, name: str, tensor: Tensor, file: Path) -> None:
        """Raises CheckpointError for what no layer can take. file: for the message."""
        if name in self._unneeded:
            return
        if name in self._zeros:
            if tensor.any():
                raise CheckpointError(
                    f"tensor {name!r} in {file} is not zero, keys and values have no zero points here: use a checkpoint"
                    " whose KV scheme is symmetric"
                )
            return
        number, sides = self._sides[name]
        for side in sides:
            if (other := self._placed.setdefault((number, side), name)) != name:
                raise CheckpointError(f"{file} has both {other!r} and {name!r}, which mean the same: remove one")
            self._fill_side(number, side, name, tensor, file)

    def _fill_side(self, number: int, side: str, name: str, tensor: Tensor, file: Path) -> None:
        mixer = self._attentions[number]
        assert isinstance(mixer, Attention), "takes() knows no other"
        values = tensor.detach().float().flatten()
        num_heads = mixer.spec.num_kv_heads
        if len(values) not in (1, num_heads):
            raise CheckpointError(
                f"tensor {name!r} in {file} holds {len(values)} scales for {num_heads} KV heads: it has to be one"
                " for all or one for each"
            )
        if not bool((values.isfinite() & (values > 0)).all()):
            raise CheckpointError(f"tensor {name!r} in {file} is {values.tolist()}: a scale is above 0 and finite")
        own = torch.arange(mixer.kv_heads.start, mixer.kv_heads.stop, device=values.device)
        scales = mixer.k_scales if side == "k" else mixer.v_scales
        scales.copy_(values.expand(num_heads)[own])

    def check_complete(self, location: Path) -> None:
        """All layers have scales, or none has. Raises CheckpointError."""
        missing = [] if not self._placed else list(self._missing())
        if missing:
            number, side = missing[0]
            raise CheckpointError(
                f"{location} has {len(self._placed)} scales of keys and values and none for the {side} of layer"
                f" {number} ({len(missing)} are missing): the checkpoint is incomplete, download it again"
            )

    def _missing(self) -> Iterator[tuple[int, str]]:
        for number, mixer in enumerate(self._attentions):
            for side in ("k", "v"):
                if isinstance(mixer, Attention) and (number, side) not in self._placed:
                    yield number, side

    def tell(self, kept_as: str | None, asked_for: str | None, location: Path) -> None:
        """Logs what becomes of them. kept_as: the engine's KV format; asked_for: the checkpoint's."""
        if self._placed and kept_as != "fp8":
            logger.warning(
                "%s brings scales of fp8 keys and values, which kv_cache_dtype='fp8' would use; they are kept as %s",
                *(location, kept_as),
            )
        if not self._placed and kept_as == "fp8" and asked_for == "fp8":
            logger.warning("%s asks for fp8 keys and values and brings no scales: they are 1", location)
