"""The parts of a spec that are more than a template filled in: its layers, their rotations, and the head.

Owns the checks of their sizes. Called by reader.py.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.checkpoint_files import StoredTensor, are_equal
from graphgen.models.families.family import Family, Rotary
from graphgen.models.families.words import FULL, SLIDING, Config, Kinds, filled
from graphgen.models.rope_config import read_rope
from graphgen.models.spec import GQA, NO_ROPE, Experts, Head, Latent, Layer, Mixer, RopeSpec

logger = logging.getLogger("graphgen.models")

_MOST_LAYERS = 10_000


def layers_of(config: Config, family: Family) -> tuple[Layer, ...]:
    num_layers: int = config.need("num_hidden_layers")
    if not 1 <= num_layers <= _MOST_LAYERS:  # each of them is a part of the spec
        raise UnsupportedModelError(
            f"{family.architecture} has {num_layers} layers, graphgen takes 1 to {_MOST_LAYERS}: correct config.json"
        )
    layer = filled(family.layer, config)
    mixers = {kind: filled(mixer, config) for kind, mixer in family.mixers.items()}
    mixers = mixers or dict.fromkeys((FULL, SLIDING), layer.mixer)
    feed_forwards = {kind: filled(word, config) for kind, word in family.feed_forwards.items()}
    for mixer in mixers.values():
        _check_heads(mixer, family.architecture)
    for feed_forward in (layer.feed_forward, *feed_forwards.values()):
        if isinstance(feed_forward, Experts):
            _check_experts(feed_forward, family.architecture)
    mixer_kinds = _kinds(family.mixer_kinds, mixers, num_layers, config, family)
    layers = [msgspec.structs.replace(layer, mixer=mixers[kind]) for kind in mixer_kinds]
    if family.feed_forward_kinds is not None:
        kinds = _kinds(family.feed_forward_kinds, feed_forwards, num_layers, config, family)
        layers = [
            msgspec.structs.replace(layer, feed_forward=feed_forwards[kind])
            for layer, kind in zip(layers, kinds, strict=True)
        ]
    return tuple(layers)


def _kinds(kinds_of: Kinds, known: Mapping[str, Any], num_layers: int, config: Config, family: Family) -> Sequence[str]:
    """The kind of each layer, each of them one of `known`."""
    kinds = kinds_of(config, num_layers)
    if unknown := set(kinds) - set(known):
        raise UnsupportedModelError(
            f"{family.architecture} has layer types {', '.join(sorted(map(str, unknown)))}, supported are"
            f" {', '.join(known)}"
        )
    if len(kinds) != num_layers:
        raise UnsupportedModelError(f"{family.architecture} has {num_layers} layers and {len(kinds)} layer_types")
    return kinds


def _check_heads(mixer: Mixer, architecture: str) -> None:
    if isinstance(mixer, Latent):
        widths = mixer.latent_size, mixer.plain_dim, mixer.rope_dim, mixer.value_dim
        if min(mixer.num_heads, *widths) < 1 or mixer.rope_dim % 2:
            raise UnsupportedModelError(
                f"{architecture} has {mixer.num_heads} heads and kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and"
                f" v_head_dim {widths}: graphgen needs all above 0 and an even qk_rope_head_dim"
            )
        return
    sizes = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    if min(sizes) < 1 or mixer.num_heads % mixer.num_kv_heads or mixer.head_dim % 2:
        raise UnsupportedModelError(
            f"{architecture} has {mixer.num_heads} heads, {mixer.num_kv_heads} KV heads and head_dim"
            f" {mixer.head_dim}: graphgen needs a whole number of heads per KV head and an even head_dim"
        )
    if mixer.window is not None and mixer.window < 1:
        raise UnsupportedModelError(
            f"{architecture} has sliding_window {mixer.window}, the least is 1: null is no window"
        )


def _check_experts(experts: Experts, architecture: str) -> None:
    router = experts.router
    if not 1 <= experts.top_k <= experts.num_experts:
        raise UnsupportedModelError(
            f"{architecture} chooses {experts.top_k} of {experts.num_experts} experts for each token: correct"
            " config.json"
        )
    if not 1 <= router.kept_groups <= router.num_groups or experts.num_experts % router.num_groups:
        raise UnsupportedModelError(
            f"{architecture} keeps {router.kept_groups} of {router.num_groups} groups of {experts.num_experts} experts:"
            " graphgen needs groups of equal size, and no more kept than there are"
        )


def ropes_of(config: Config, family: Family, layers: Sequence[Layer]) -> tuple[RopeSpec, ...]:
    """Those that no layer has stay in their place, so that GQA.rope counts right."""
    head_dims = {layer.mixer.rope: layer.mixer.rotated[0] for layer in layers}
    return tuple(
        read_rope(config, rotary, head_dims[number], family.architecture)
        if isinstance(rotary, Rotary) and number in head_dims
        else filled(NO_ROPE if isinstance(rotary, Rotary) else rotary, config)
        for number, rotary in enumerate(family.rotaries)
    )


def norms_heads(layer: Layer) -> bool:
    """Whether a key that says so is told the truth."""
    return isinstance(layer.mixer, GQA) and layer.mixer.qk_norm is not None


def head_of(head: Head, family: Family, stored: Mapping[str, StoredTensor], where: str) -> Head:
    """With the matrix that the checkpoint has: one that is absent is the embedding, and one that differs from the
    embedding is used, whatever the config says."""
    named = {family.stored_name(name): tensor for name, tensor in stored.items()}
    own, embedding = named.get(family.names.head), named.get(family.names.embedding)
    if embedding is not None and own is None and not head.tied:
        logger.warning(
            "%s: config.json says that the head is not the embedding (tie_word_embeddings), but the checkpoint has no"
            " %s: the embedding is used",
            *(where, family.names.head),
        )
        return msgspec.structs.replace(head, tied=True)
    if head.tied and own is not None and embedding is not None and not are_equal(own, embedding):
        logger.warning(
            "%s: config.json says that the head is the embedding (tie_word_embeddings), but the checkpoint has a %s of"
            " its own: that is used",
            *(where, family.names.head),
        )
        return msgspec.structs.replace(head, tied=False)
    return head
