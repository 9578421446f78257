"""The way from a Hugging Face config to a ModelSpec: which family it is, and that family's template filled in.

Owns every check of «can graphgen run this model». Never touches weights. Called by the engine when it resolves its
configuration.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from graphgen.ipc.errors import CheckpointError, GraphgenError, UnsupportedModelError
from graphgen.models.checkpoint import Checkpoint, open_checkpoint
from graphgen.models.checkpoint_files import StoredTensor
from graphgen.models.families.choice import family_of, text_config, with_defaults
from graphgen.models.families.ends import eos_token_ids
from graphgen.models.families.family import Family, TensorNames
from graphgen.models.families.parts import head_of, layers_of, norms_heads, ropes_of
from graphgen.models.families.stored_formats import with_stored_formats
from graphgen.models.families.table import families_of_type
from graphgen.models.families.words import Config, filled
from graphgen.models.foreign_keys import check_unread_keys
from graphgen.models.formats.kv_scheme import kv_format_of, quantises_only_kv
from graphgen.models.formats.quantised_tensors import QuantisedTensors
from graphgen.models.formats.readers.table import method_of, open_reader
from graphgen.models.spec import DTYPE_BYTES, ModelSpec

logger = logging.getLogger("graphgen.models")

_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' name of a dtype -> ours."""


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
        spec = spec_from_hf(config, checkpoint.generation_eos(), stored, checkpoint.quantised)
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


def spec_from_hf(
    config: Any,
    generation_eos: int | list[int] | None = None,
    stored_by: Callable[[TensorNames], Mapping[str, StoredTensor]] = lambda names: {},
    quantised_by: Callable[[], QuantisedTensors | None] = lambda: None,
) -> ModelSpec:
    """The spec of a transformers config object (untyped there, hence Any).

    `generation_eos`: the ids of generation_config.json, which win over the config's own. `stored_by`: the
    checkpoint's tensors, where it has any. `quantised_by`: its quantised weights.
    """
    where = getattr(config, "_name_or_path", None) or config.model_type
    family = family_of(config, where)
    if family.nested is not None:
        config = text_config(config, family.nested, where)
    view = Config(config, family.aliases)
    view.read.update(path.split(".")[0] for row in families_of_type(family.model_type) for path in row.when)
    _refuse_quantized(view.get("quantization_config"), family, where)
    layers, stored = layers_of(view, family), stored_by(family.names)
    spec = ModelSpec(
        family=family.name,
        architecture=family.architecture,
        vocab_size=view.need("vocab_size"),
        hidden_size=view.need("hidden_size"),
        layers=layers,
        ropes=ropes_of(view, family, layers),
        embedding=filled(family.embedding, view),
        final_norm=filled(family.final_norm, view),
        head=head_of(filled(family.head, view), family, stored, where),
        max_position_embeddings=_max_positions(view, family, where),
        bos_token_id=view.get("bos_token_id"),
        eos_token_ids=eos_token_ids(view, generation_eos, where),
        dtype=_dtype(view, family.architecture, stored),
        float16=family.float16,
        needs_bos=family.needs_bos,
        initializer_std=float(filled(family.initializer_std, view)),
        kv_format=kv_format_of(_as_mapping(view.get("quantization_config")), where),
    )
    check_unread_keys(config, family, view.read, any(map(norms_heads, layers)), where)
    quantised = quantised_by()
    return spec if quantised is None else with_stored_formats(spec, family, quantised)


def _as_mapping(quantization: Any) -> Mapping[str, Any] | None:
    """A quantization_config, which in a config of transformers may be an object. None where there is none."""
    if quantization is None or isinstance(quantization, Mapping):
        return quantization
    if not hasattr(quantization, "to_dict"):
        raise UnsupportedModelError(
            f"quantization_config is {quantization!r}: it must be an object with a quant_method"
        )
    return dict(quantization.to_dict())


def _refuse_quantized(quantization: Any, family: Family, where: str) -> None:
    """`quantization`: the config's quantization_config, a dict or one of many transformers classes."""
    quantization = _as_mapping(quantization)
    if not quantization or quantises_only_kv(quantization) or method_of(quantization) in family.dequantised:
        return
    if open_reader(quantization, where) is None:
        raise UnsupportedModelError(
            f"the weights of {where!r} are quantised ({method_of(quantization)}), which a {family.architecture} of"
            " graphgen does not read: use the unquantised checkpoint with --quantization fp8, int8 or int4"
        )


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
