"""Each trait of each family shows in the logits of one of its tiny checkpoints: the parity tests would miss none.

A trait is a field of the spec that is not at its neutral value. Each is put back to it, one at a time, and the same
checkpoint is loaded with what is left: either it is refused, or its logits are others.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from msgspec import Struct
from torch import Tensor

from graphgen.ipc.errors import GraphgenError
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import GQA, Dense, Embedding, Experts, Layer, ModelSpec, Norm, RopeSpec
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.splits import tokens

PROMPTS = tokens(80), tokens(30)
"""One longer than every window, segment and original length of the cases, one shorter than the longest of those."""


class Trait(NamedTuple):
    kind: type[Struct]
    field: str
    neutral: Any  # of the field's type


NEUTRAL: dict[tuple[type[Struct], str], Any] = {
    (Layer, "input_norm"): None,
    (Layer, "ff_norm"): None,
    (ModelSpec, "final_norm"): None,
    (Dense, "activation"): "relu",
    (Experts, "activation"): "relu",
    (Norm, "eps"): 0.0,
}
"""Of fields that have no default, or one that is a family's."""

IN_BFLOAT16 = {(Norm, "round_first"), (Embedding, "round_scale")}
"""In float32 they round nothing."""

UNREAD = {
    "none": {"theta", "factor", "original_max_len", "rotary_dim", "interleaved"},
    "default": {"factor", "original_max_len"},
    "linear": {"original_max_len"},
    "longrope": {"factor"},
}
"""Numbers of a RopeSpec that its kind does not read."""


def structs_of(value: Any) -> Iterator[Struct]:
    if isinstance(value, Struct):
        yield value
        for name in value.__struct_fields__:
            yield from structs_of(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from structs_of(item)


def traits_of(spec: ModelSpec) -> dict[Trait, None]:
    found: dict[Trait, None] = {}
    for struct in structs_of(spec):
        for field in msgspec.structs.fields(type(struct)):
            place, value = (type(struct), field.name), getattr(struct, field.name)
            neutral = NEUTRAL.get(place, field.default)
            unread = isinstance(struct, RopeSpec) and field.name in UNREAD.get(struct.kind, ())
            unread |= type(struct) is ModelSpec and place not in NEUTRAL  # the rest is about tokens and memory
            unread |= place == (GQA, "rope") and len(set(spec.ropes)) == 1
            unread |= place == (Norm, "eps") and value <= 1e-5  # a constant of the class, too small to show
            if neutral is not msgspec.NODEFAULT and value != neutral and not unread:
                found[Trait(*place, neutral)] = None
    return found


def without(value: Any, trait: Trait) -> Any:
    """A spec, the trait's field neutral in every Struct of its kind."""
    if isinstance(value, tuple):
        return tuple(without(item, trait) for item in value)
    if not isinstance(value, Struct):
        return value
    fields = {name: without(getattr(value, name), trait) for name in value.__struct_fields__}
    return type(value)(**{**fields, **({trait.field: trait.neutral} if type(value) is trait.kind else {})})


def logits(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Tensor | None:
    """None where the checkpoint does not fit the spec."""
    try:
        driver = Driver(load_decoder(folder, spec, dtype, torch.device("cpu")))
        return torch.cat(driver.step([(driver.request(prompt), len(prompt)) for prompt in PROMPTS]))
    except (GraphgenError, ValueError, RuntimeError):  # torch's for tensors of unequal sizes
        return None


def shows(folder: Path, spec: ModelSpec, trait: Trait, whole: Tensor) -> bool:
    if (trait.kind, trait.field) in IN_BFLOAT16:
        with_it, left = (logits(folder, each, torch.bfloat16) for each in (spec, without(spec, trait)))
        return with_it is None or left is None or not torch.equal(with_it, left)
    left = logits(folder, without(spec, trait), torch.float32)
    return left is None or not (left - whole).abs().max() < 1e-3  # a NaN shows


CASES_OF_FAMILY: dict[str, list[str]] = defaultdict(list)
for _case, (_model_type, _) in tiny.CASES.items():
    CASES_OF_FAMILY[_model_type].append(_case)


@pytest.mark.parametrize("model_type", CASES_OF_FAMILY)
def test_every_trait_shows_in_a_case_of_its_family(model_type: str, tmp_path: Path) -> None:
    hidden: dict[Trait, None] = {}
    seen: set[Trait] = set()
    for case in CASES_OF_FAMILY[model_type]:
        tiny.save(case, tmp_path / case)
        spec = load_spec(tmp_path / case)
        whole = logits(tmp_path / case, spec, torch.float32)
        assert whole is not None
        for trait in traits_of(spec):
            if trait not in seen and shows(tmp_path / case, spec, trait, whole):
                seen.add(trait)
            elif trait not in seen:
                hidden[trait] = None
    left = [f"{trait.kind.__name__}.{trait.field}" for trait in hidden if trait not in seen]
    assert not left, f"{model_type}: leaving these out changes nothing that a test would see"
