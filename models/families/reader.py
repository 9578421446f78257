"""The way from a Hugging Face config to a ModelSpec: which family it is, and that family's template filled in.

Owns every check of «can graphgen run this model». Never touches weights. Called by the engine when it resolves its
configuration.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from graphgen.ipc.errors import CheckpointError, GraphgenError, UnsupportedModelError
from graphgen.ipc.messages import MAX_STOP_TOKEN_IDS
from graphgen.models.checkpoint import Checkpoint, open_checkpoint
from graphgen.models.checkpoint_files import StoredTensor, are_equal
from graphgen.models.families.family import Family, Rotary, TensorNames
from graphgen.models.families.table import FAMILIES, families_of_type
from graphgen.models.families.words import FULL, SLIDING, Config, Kinds, filled, value_at
from graphgen.models.foreign_keys import check_unread_keys
from graphgen.models.rope_config import read_rope
from graphgen.models.spec import DTYPE_BYTES, GQA, NO_ROPE, Experts, Head, Latent, Layer, Mixer, ModelSpec, RopeSpec

logger = logging.getLogger("graphgen.models")

_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' name of a dtype -> ours."""

_MOST_LAYERS = 10_000

_OF_WHOLE = (
    *("architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "quantization_config"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
"""Keys beside the text model's config that hold for it too, before its own."""

_COMMON_DEFAULTS: Mapping[str, Any] = {"architectures": None, "bos_token_id": None, "eos_token_id": None}


def load_spec(model: str | Path, revision: str | None = None, tokenizer: str | Path | None = None) -> ModelSpec:
    """The spec of a local folder, a GGUF file or a hub id; of a hub id only the two small config files are downloaded.

    End-of-sequence ids come from generation_config.json where it has them: chat models often end on several. Where
    there are weights, they say whether the head is the embedding, and their dtype where the config does not.
    tokenizer: folder or GGUF file of one that is used instead of the model's; its tokens are those that may be drawn.
    Raises CheckpointError when there is no readable config.json, UnsupportedModelError when graphgen cannot
    run it.
    """
    location = str(model)
    try:
        checkpoint = open_checkpoint(location, revision)
        config = with_defaults(checkpoint.config(), location)
        stored = partial(_stored_weights, checkpoint, Path(location))
        spec = spec_from_hf(config, checkpoint.generation_eos(), stored)
        spec = _with_tokens(spec, (checkpoint if tokenizer is None else open_checkpoint(tokenizer)).num_tokens())
        values = msgspec.to_builtins(spec)
        _check_finite(values, "$")
        return msgspec.convert(values, ModelSpec)  # checks the types and sizes of what the file says
    except GraphgenError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, msgspec.ValidationError) as error:
        raise UnsupportedModelError(f"the config of {location!r} is not understood: {error}") from error


def _check_finite(value: Any, path: str) -> None:
    """Raises ValueError for an infinite number or none: config.json may hold Infinity and NaN. value: of a spec."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number - at `{path}`")
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        _check_finite(inner, f"{path}.{name}")


def _with_tokens(spec: ModelSpec, num_tokens: int | None) -> ModelSpec:
    """num_tokens: of a tokenizer. Ids that end an output have a meaning whatever it says."""
    known = num_tokens and max(num_tokens, *(token_id + 1 for token_id in spec.eos_token_ids), 0)
    return msgspec.structs.replace(spec, num_tokens=known)


def with_defaults(raw: Mapping[str, Any], location: str) -> SimpleNamespace:
    """An object with the attributes of a transformers config. Keys a file leaves out get the values transformers would
    give them, and a common name of a key counts as the family's own; a test holds both to be equal."""
    model_type = raw.get("model_type") or _model_type_of(raw.get("architectures") or ())
    values = {**raw, "model_type": model_type, "_name_or_path": location}
    rows = families_of_type(str(model_type))
    row = next((row for row in rows if row.nested is None or _fits(row, raw)), None)
    if row is not None and row.nested is not None:
        values = {**row.beside, **values}
        values[row.nested] = SimpleNamespace(**_filled_up(raw.get(row.nested) or {}, row))
    elif row is not None:
        values = _filled_up(values, row)
    return SimpleNamespace(**{**_COMMON_DEFAULTS, **values})


def _filled_up(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    renamed = {own: values[common] for common, own in family.aliases.items() if common in values}
    return {**family.defaults, **renamed, **values}


def spec_from_hf(
    config: Any,
    generation_eos: int | list[int] | None = None,
    stored_by: Callable[[TensorNames], Mapping[str, StoredTensor]] = lambda names: {},
) -> ModelSpec:
    """The spec of a transformers config object (untyped there, hence Any).

    `generation_eos`: the ids of generation_config.json, which win over the config's own. `stored_by`: the
    checkpoint's tensors, where it has any.
    """
    where = getattr(config, "_name_or_path", None) or config.model_type
    family = _family_of(config, where)
    if family.nested is not None:
        config = _text_config(config, family.nested, where)
    view = Config(config, family.aliases)
    view.read.update(path.split(".")[0] for row in families_of_type(family.model_type) for path in row.when)
    _refuse_quantized(view.get("quantization_config"), family, where)
    layers, stored = _layers(view, family), stored_by(family.names)
    spec = ModelSpec(
        family=family.name,
        architecture=family.architecture,
        vocab_size=view.need("vocab_size"),
        hidden_size=view.need("hidden_size"),
        layers=layers,
        ropes=_ropes(view, family, layers),
        embedding=filled(family.embedding, view),
        final_norm=filled(family.final_norm, view),
        head=_head(filled(family.head, view), family, stored, where),
        max_position_embeddings=_max_positions(view, family, where),
        bos_token_id=view.get("bos_token_id"),
        eos_token_ids=_eos_token_ids(view, generation_eos, where),
        dtype=_dtype(view, family.architecture, stored),
        float16=family.float16,
        needs_bos=family.needs_bos,
        initializer_std=float(filled(family.initializer_std, view)),
    )
    check_unread_keys(config, family, view.read, any(map(_norms_heads, layers)), where)
    return spec


# --- which family ----------------------------------------------------------------------------------------------


def _model_type_of(architectures: Sequence[str]) -> str | None:
    """transformers writes both; files made by hand may name the class alone."""
    return next((family.model_type for family in FAMILIES.values() if family.architecture in architectures), None)


def _family_of(config: Any, where: str) -> Family:
    """By the class that the config names; by the model type where it names none, as transformers does. Of several rows
    for one class, the first whose conditions hold."""
    rows = families_of_type(config.model_type)
    by_type = rows[0].architecture if rows else None
    named = config.architectures or [by_type or "none"]
    known = {family.architecture for family in FAMILIES.values()}
    architecture = next((name for name in named if name in known), None)
    if architecture is None:
        raise UnsupportedModelError(
            f"architecture of {where!r} is {', '.join(named)} and its model_type {config.model_type!r}, which graphgen"
            f" does not run; the nearest that it runs are {_nearest(str(config.model_type), named)}. docs/models.md"
            " lists all: choose one of them"
        )
    if architecture != by_type:
        raise UnsupportedModelError(
            f"the config.json of {where!r} names the architecture {architecture} and the model_type"
            f" {config.model_type!r}, which do not belong together (model types are"
            f" {', '.join(sorted({family.model_type for family in FAMILIES.values()}))}): correct the one that is wrong"
        )
    for family in rows:
        if _fits(family, config):
            return family
    conditions = "; ".join(
        f"{family.name}: " + ", ".join(f"{name} in {values}" for name, values in family.when.items()) for family in rows
    )
    raise UnsupportedModelError(f"{where!r} is a {architecture} that graphgen does not run, it runs {conditions}")


def _fits(family: Family, config: Any) -> bool:
    """Whether a row's conditions hold. config: an object, or a dictionary."""
    return all(value_at(config, path) in values for path, values in family.when.items())


def _text_config(config: Any, nested: str, where: str) -> SimpleNamespace:
    """The config of the text model in one of a model that reads images too, with what that says of the whole."""
    logger.warning("%s: only text is served, the weights for images are not loaded", where)
    of_whole = {name: value for name in _OF_WHOLE if (value := vars(config).get(name)) is not None}
    beside = {name: value for name, value in vars(config).items() if name != nested}
    return SimpleNamespace(**{**beside, **vars(getattr(config, nested)), **of_whole})


def _nearest(model_type: str, architectures: Sequence[str]) -> str:
    """The families whose names are most like the given ones, for a message."""
    by_type = {family.model_type: family.architecture for family in FAMILIES.values()}
    by_class = {architecture: model_type for model_type, architecture in by_type.items()}
    close = difflib.get_close_matches(model_type.lower(), by_type, n=3, cutoff=0.3)
    for name in architectures:
        close += [by_class[found] for found in difflib.get_close_matches(name, by_class, n=3, cutoff=0.5)]
    chosen = list(dict.fromkeys(close))[:3] or list(by_type)[:3]
    return ", ".join(f"{by_type[name]} ({name})" for name in chosen)


def _refuse_quantized(quantization: Any, family: Family, where: str) -> None:
    """`quantization`: the config's quantization_config, a dict or one of many transformers classes."""
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        if method in family.dequantised:
            return
        raise UnsupportedModelError(
            f"the weights of {where!r} are quantised ({method}), supported are {', '.join(DTYPE_BYTES)}:"
            " use the unquantised checkpoint"
        )


# --- its parts -------------------------------------------------------------------------------------------------


def _layers(config: Config, family: Family) -> tuple[Layer, ...]:
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


def _ropes(config: Config, family: Family, layers: Sequence[Layer]) -> tuple[RopeSpec, ...]:
    """Those that no layer has stay in their place, so that GQA.rope counts right."""
    head_dims = {layer.mixer.rope: layer.mixer.rotated[0] for layer in layers}
    return tuple(
        read_rope(config, rotary, head_dims[number], family.architecture)
        if isinstance(rotary, Rotary) and number in head_dims
        else filled(NO_ROPE if isinstance(rotary, Rotary) else rotary, config)
        for number, rotary in enumerate(family.rotaries)
    )


def _norms_heads(layer: Layer) -> bool:
    """Whether a key that says so is told the truth."""
    return isinstance(layer.mixer, GQA) and layer.mixer.qk_norm is not None


def _head(head: Head, family: Family, stored: Mapping[str, StoredTensor], where: str) -> Head:
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


def _stored_weights(checkpoint: Checkpoint, location: Path, names: TensorNames) -> Mapping[str, StoredTensor]:
    """Nothing where there are no weights or no whole ones: the loader says what is wrong, if it reads them at all."""
    if (adapter := location / "adapter_config.json").exists():
        logger.warning("%s is not applied: merge the adapter into the weights and save them", adapter)
    try:
        return checkpoint.stored_tensors(names) if location.exists() else {}
    except CheckpointError:
        return {}


def _max_positions(config: Config, family: Family, where: str) -> int:
    """Positions that the model's attention serves as it is written here.

    Qwen's models of a million tokens attend by dual chunks, which is plain attention up to the length that they name.
    """
    positions: int = filled(family.max_positions, config)
    chunks: dict[str, int] = config.get("dual_chunk_attention_config") or {}
    plain = min(positions, chunks.get("original_max_position_embeddings", positions))
    if plain < positions:
        logger.warning(
            "%s: served up to %d positions instead of %d, beyond which it needs dual chunk attention",
            *(where, plain, positions),
        )
    return plain


def _eos_token_ids(config: Config, generation_eos: int | list[int] | None, where: str) -> tuple[int, ...]:
    listed = _token_ids(config.get("eos_token_id") if generation_eos is None else generation_eos, where)
    return _known_ids(listed, config.need("vocab_size"), where)


def _token_ids(ids: object, where: str) -> tuple[int, ...]:
    """The ids of an eos_token_id as it stands in a file, each once."""
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(token_id) is int for token_id in listed):
        raise UnsupportedModelError(
            f"the eos_token_id of {where} is {ids!r}: give a token id or a list of them in generation_config.json,"
            " or in config.json where that file has none"
        )
    return tuple(dict.fromkeys(listed))


def _known_ids(token_ids: tuple[int, ...], vocab_size: int, where: str) -> tuple[int, ...]:
    """Those of the ids that the model can draw. Configs often keep the ids of the model they were made from."""
    known = tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)
    if known != token_ids:
        logger.warning(
            "%s: of the end-of-sequence ids %s of its configs, those outside the vocabulary, 0 to %d, are ignored",
            *(where, ", ".join(map(str, token_ids)), vocab_size - 1),
        )
    if len(known) >= MAX_STOP_TOKEN_IDS:  # the tokenizer may have one more
        raise UnsupportedModelError(
            f"{where} ends on {len(known)} token ids, the limit is {MAX_STOP_TOKEN_IDS - 1}: shorten eos_token_id in"
            " generation_config.json"
        )
    return known


def _dtype(config: Config, architecture: str, stored: Mapping[str, StoredTensor]) -> str:
    # transformers 4 calls it torch_dtype, and "auto" says nothing. Then the weights tell; without any it is float32,
    # torch's own default.
    dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = next((_STORED_DTYPES[it.dtype] for it in stored.values() if it.dtype in _STORED_DTYPES), "float32")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"{architecture} has dtype {name}, supported are {', '.join(DTYPE_BYTES)}")
    return name
