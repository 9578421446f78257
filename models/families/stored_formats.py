"""Which formats the linear layers of a model have by its checkpoint.

Owns the way from the modules of a checkpoint, of which several may be one layer here, to the fields of a spec. Called
by reader.py.
"""

import logging
from collections.abc import Sequence

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families.family import Family, TensorNames
from graphgen.models.formats.quantised_tensors import WEIGHT, QuantisedTensors
from graphgen.models.spec import EXPERTS, Experts, Layer, LinearFormat, LinearPlace, ModelSpec

_EXPERT = "{expert}"

logger = logging.getLogger("graphgen.models")


def with_stored_formats(spec: ModelSpec, family: Family, quantised: QuantisedTensors) -> ModelSpec:
    """A layer whose parts have several formats, q in another than v, say, is dequantised as it is loaded, and so are
    experts that differ in them or have an order of their columns each, and every quantised weight that is no linear
    layer of a block: of embedding, head and router."""
    names = family.names
    if names.transposed:
        raise UnsupportedModelError(
            f"quantised weights of a {spec.architecture} are not read, since its matrices are stored as [in, out]: use"
            " the unquantised checkpoint with --quantization"
        )
    stored = {family.stored_name(name): form for name, (form, _) in quantised.weights.items()}
    mixed: list[str] = []

    def choose(number: int, place: LinearPlace) -> LinearFormat | None:
        prefix = names.layer.format(layer=number)
        modules = [prefix + name for name in modules_of(place.name, names, spec, number)]
        if not modules:
            return None
        if stored:
            forms = {stored.get(f"{module}.{WEIGHT}") for module in modules}
        else:
            forms = {quantised.expected(module) for module in modules}
        form = forms.pop()
        if forms or (form is not None and form.permuted and place.name.startswith(EXPERTS)):
            mixed.append(modules[0])
            return None
        return None if form is not None and form.storage == "int4" and place.num_columns % 2 else form

    made = spec.with_formats(choose)
    if mixed:
        logger.warning(
            "%d linear layers (%s the first) are made of parts in different formats, or of experts with orders of their"
            " own: their weights are dequantised",
            *(len(mixed), mixed[0]),
        )
    return made


def modules_of(name: str, names: TensorNames, spec: ModelSpec, number: int) -> Sequence[str]:
    """Modules of a checkpoint that make one linear layer, relative to its layer; none for experts that are stored in
    one tensor, which no format has. name: of a LinearPlace."""
    latent, experts = names.latent, names.experts
    q_up = latent.q_up if getattr(spec.layers[number].mixer, "q_rank", None) else latent.q
    return {
        "qkv": names.qkv,
        "o": (names.o,),
        "gate_up": names.gate_up,
        "down": (names.down,),
        "q_down": (latent.q_down,),
        "q_up": (q_up,),
        "kv_down": (latent.kv_down,),
        "experts_gate_up": _of_experts(experts.gate_up, spec.layers[number]),
        "experts_down": _of_experts((experts.down,), spec.layers[number]),
        "shared_gate_up": experts.shared_gate_up,
        "shared_down": (experts.shared_down,),
    }[name]


def _of_experts(names: Sequence[str], layer: Layer) -> Sequence[str]:
    """names: of one expert's tensors, with a place for its number."""
    count = layer.feed_forward.num_experts if isinstance(layer.feed_forward, Experts) else 0
    each = [name.removesuffix(f".{WEIGHT}") for name in names if _EXPERT in name]
    return [name.replace(_EXPERT, str(expert)) for expert in range(count) for name in each]
