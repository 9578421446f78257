"""Which family a Hugging Face config is of, and the config with all that its family's class would add.

Owns the errors about models of no family. Called by reader.py.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families.family import Family
from graphgen.models.families.table import FAMILIES, families_of_type
from graphgen.models.families.words import value_at

logger = logging.getLogger("graphgen.models")

_OF_WHOLE = (
    *("architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "quantization_config"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
"""Keys beside the text model's config that hold for it too, before its own."""

_COMMON_DEFAULTS: Mapping[str, Any] = {"architectures": None, "bos_token_id": None, "eos_token_id": None}


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


def _model_type_of(architectures: Sequence[str]) -> str | None:
    """transformers writes both; files made by hand may name the class alone."""
    return next((family.model_type for family in FAMILIES.values() if family.architecture in architectures), None)


def family_of(config: Any, where: str) -> Family:
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


def text_config(config: Any, nested: str, where: str) -> SimpleNamespace:
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
