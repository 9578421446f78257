"""A mixture of experts: what parity with transformers in float32 cannot show, and that it shows every trait."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.ipc.errors import CheckpointError
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.experts.operator import run_experts
from graphgen.models.experts.routing import route
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import WHOLE, Dense, Experts, Layer, ModelSpec, Router
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.expert_cases import CASES, by_hand
from tests.models.splits import reference_logits, tokens

CPU = torch.device("cpu")
SPEC = Experts(
    num_experts=5, top_k=2, size=6, activation="silu", router=Router(), shared=Dense(size=4, activation="silu")
)


@pytest.mark.parametrize("case", CASES)
def test_the_operator_computes_the_formula(case: str) -> None:
    made = CASES[case]()
    torch.testing.assert_close(made.of_experts(run_experts(*made.arguments)), by_hand(made), rtol=1e-4, atol=1e-4)


def make_block(spec: Experts, dtype: torch.dtype = torch.float32) -> MixtureOfExperts:
    torch.manual_seed(0)
    block = MixtureOfExperts(spec, 8, dtype, WHOLE)
    for parameter in block.parameters():
        parameter.data.normal_()
    return block


def test_rows_that_hold_no_token_go_to_no_expert_and_disturb_nobody() -> None:
    spec = replace(SPEC, shared=None)
    block = make_block(spec)
    x = torch.randn(6, 8)
    alone = block(x[[0, 2, 3]], None)
    x[[1, 4, 5]] = float("nan")
    live = torch.tensor([True, False, True, True, False, False])
    made = block(x, live)
    assert torch.equal(made[live], alone)
    assert not made[~live].any(), "the update of a padded row is zero"


def test_padded_rows_of_a_step_are_not_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("mixtral", tmp_path)
    driver = Driver(load_decoder(tmp_path, load_spec(tmp_path), torch.float32, CPU), padded_rows=3)
    seen: list[list[bool]] = []
    forward = MixtureOfExperts.forward

    def spy(self: MixtureOfExperts, x: Tensor, live: Tensor) -> Tensor:
        seen.append(live.tolist())
        return forward(self, x, live)

    monkeypatch.setattr(MixtureOfExperts, "forward", spy)
    request = driver.request(tokens(5))
    driver.step([(request, 2)])
    driver.step(decodes=[request], drawing_rows=[1, 0])
    padding = [False] * 3
    assert seen == [[True, True, *padding, *padding]] * 3 + [[True, *padding]] * 2 + [[False, True]]


def test_the_router_of_a_bfloat16_model_computes_in_float32() -> None:
    """Logits as near as these would be equal in bfloat16, and the first of them chosen."""
    block = make_block(replace(SPEC, top_k=1, shared=None), torch.bfloat16)
    block.router.zero_()
    block.router[:, 0] = torch.tensor([1.0, 1.001, 1.002, 1.003, 1.004])
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 0] = 100.0
    made = block(x, None)
    block.gate_up.weight[: 4 * block.gate_up.each_rows] = float("nan")
    assert torch.equal(block(x, None), made), "the last expert was chosen"


def test_of_scores_that_are_equal_for_their_size_the_larger_logit_is_chosen() -> None:
    logits = torch.tensor([[20.0, 30.0, 25.0]])
    assert len(logits.sigmoid().unique()) == 1
    assert route(logits, None, Router(score="sigmoid"), 2)[1].tolist() == [[1, 2]]


def test_equal_scores_choose_different_experts() -> None:
    for router in (Router(), Router(score="sigmoid", num_groups=2, kept_groups=1), Router(score="sparsemixer")):
        _, experts = route(torch.zeros(3, 4), None, router, 2)
        assert all(len(set(row)) == 2 for row in experts.tolist())


def test_dummy_weights_of_experts_are_those_of_an_untrained_model(tmp_path: Path) -> None:
    spec = tiny.spec_of(tiny.build("glm4_moe"))
    block: Any = load_decoder(tmp_path, spec, torch.float32, CPU, "dummy").decoder_layers[-1].mlp
    for weight in (block.router, block.gate_up.weight, block.down.weight):
        assert weight.std().item() == pytest.approx(spec.initializer_std, rel=0.1)
    assert not block.correction.any()


# --- leaving out any trait shows ---


def with_layers(spec: ModelSpec, change: Callable[[Layer], Layer]) -> ModelSpec:
    return replace(spec, layers=tuple(map(change, spec.layers)))


def changed(**changes: Any) -> Callable[[Layer], Layer]:
    """Experts with other values."""

    def change(layer: Layer) -> Layer:
        experts = layer.feed_forward
        return replace(layer, feed_forward=replace(experts, **changes)) if isinstance(experts, Experts) else layer

    return change


def routed(**changes: Any) -> Callable[[Layer], Layer]:
    """Routers with other values."""

    def change(layer: Layer) -> Layer:
        experts = layer.feed_forward
        if not isinstance(experts, Experts):
            return layer
        return replace(layer, feed_forward=replace(experts, router=replace(experts.router, **changes)))

    return change


def attending(**changes: Any) -> Callable[[Layer], Layer]:
    """Attention with other values."""
    return lambda layer: replace(layer, mixer=replace(layer.mixer, **changes))


LEFT_OUT = {
    "mixtral: renormalised": ("mixtral", routed(renormalise=False)),
    "mixtral: experts a row": ("mixtral", changed(top_k=2)),
    "phimoe: sparsemixer": ("phimoe", routed(score="softmax")),
    "phimoe: jitter": ("phimoe", routed(jitter=0.01)),
    "minimax_m2: sigmoid": ("minimax_m2", routed(score="softmax")),
    "minimax_m2: correction": ("minimax_m2", routed(correction=False)),
    "qwen2_moe: shared": ("qwen2_moe", changed(shared=None, shared_gate=False)),
    "qwen2_moe: shared gate": ("qwen2_moe", changed(shared_gate=False)),
    "qwen3_moe: renormalised": ("qwen3_moe", routed(renormalise=False)),
    "olmoe: not renormalised": ("olmoe", routed(renormalise=True)),
    "granite_moe: renormalised": ("granite_moe", routed(renormalise=False)),
    "granite_moe_shared: shared": ("granite_moe_shared", changed(shared=None)),
    "gpt_oss: bias of the router": ("gpt_oss", routed(bias=False)),
    "gpt_oss: biases": ("gpt_oss", changed(bias=False)),
    "gpt_oss: sinks": ("gpt_oss", attending(sinks=False)),
    "gpt_oss: window": ("gpt_oss", attending(window=None)),
    "gpt_oss: limit": ("gpt_oss", changed(limit=None)),
    "gpt_oss: one more than up": ("gpt_oss", changed(up_plus_one=False)),
    "gpt_oss: activation": ("gpt_oss", changed(activation="silu")),
    "llama4: scaled input": ("llama4_experts", changed(input_scaled=False)),
    "llama4: sigmoid": ("llama4_experts", routed(score="softmax")),
    "llama4: shared": ("llama4_experts", changed(shared=None)),
    "glm4_moe: groups": ("glm4_moe", routed(num_groups=1, kept_groups=1)),
    "glm4_moe: score of a group": ("glm4_moe", routed(group_score="max")),
    "glm4_moe: scale": ("glm4_moe", routed(scale=1.0)),
    "glm4_moe: correction": ("glm4_moe", routed(correction=False)),
}


@pytest.mark.parametrize("trait", LEFT_OUT)
def test_leaving_out_a_trait_changes_logits_or_is_refused(trait: str, tmp_path: Path) -> None:
    case, change = LEFT_OUT[trait]
    model = tiny.save(case, tmp_path)
    prompt = tokens(33)

    def logits(spec: ModelSpec) -> Tensor:
        driver = Driver(load_decoder(tmp_path, spec, torch.float32, CPU))
        (found,) = driver.step([(driver.request(prompt), len(prompt))])
        return found

    spec, wanted = load_spec(tmp_path), reference_logits(model, prompt)
    torch.testing.assert_close(logits(spec), wanted, rtol=1e-4, atol=1e-4)
    with suppress(CheckpointError):  # its tensor has no place
        assert (logits(with_layers(spec, change)) - wanted).abs().max() > 1e-2
