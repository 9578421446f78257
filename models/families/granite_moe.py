"""Granite's mixtures of experts. The router's softmax over the chosen experts is one over all, renormalised."""

from msgspec.structs import replace

from graphgen.models.families.family import ExpertNames, TensorNames
from graphgen.models.families.kin import GRANITE
from graphgen.models.families.words import activation, key, only_if
from graphgen.models.spec import Dense, Experts, Router

_EXPERTS = Experts(
    num_experts=key("num_local_experts"),
    top_k=key("num_experts_per_tok"),
    size=key("intermediate_size"),
    activation=activation(),
    router=Router(renormalise=True),
)
GRANITE_MOE = replace(
    GRANITE,
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    checkpoints={"Granite 3.1 1B-A400M": 1.33, "Granite 3.1 3B-A800M": 3.3},
    defaults={**GRANITE.defaults, "num_local_experts": 8, "num_experts_per_tok": 2},
    layer=replace(GRANITE.layer, feed_forward=_EXPERTS),
    names=TensorNames(
        experts=ExpertNames(
            router="block_sparse_moe.router.layer.weight",
            gate_up=("block_sparse_moe.input_linear.weight",),
            down="block_sparse_moe.output_linear.weight",
            shared_gate_up=("shared_mlp.input_linear",),
            shared_down="shared_mlp.output_linear",
        )
    ),
)
_SHARED = only_if("shared_intermediate_size", Dense(size=key("shared_intermediate_size"), activation=activation()))
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    checkpoints={},
    notes="the experts of Granite MoE and one that sees every row",
    defaults={**GRANITE_MOE.defaults, "shared_intermediate_size": 0},
    layer=replace(GRANITE.layer, feed_forward=replace(_EXPERTS, shared=_SHARED)),
)

FAMILIES = (GRANITE_MOE, GRANITE_MOE_SHARED)
