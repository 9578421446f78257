"""The tiles of a mixture of experts on a GPU: the formula, whichever pairs a tile is made of, and in a graph."""

import pytest
import torch

from tests.models.expert_cases import CASES, by_hand, make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_the_formula(case: str) -> None:
    from graphgen.models.experts.operator import run_experts

    made = CASES[case]().to("cuda")
    torch.testing.assert_close(made.of_experts(run_experts(*made.arguments)), by_hand(made), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100, 600, 2048])
def test_bfloat16_in_the_shape_of_a_real_layer(rows: int) -> None:
    from graphgen.models.experts.operator import run_experts

    made = make(rows, num_experts=128, top_k=8, hidden=2048, size=768, dtype=torch.bfloat16)
    made = made._replace(gate_up=made.gate_up * 0.02, down=made.down * 0.02).to("cuda")
    wanted = torch.empty(rows * 8, 2048, dtype=torch.float64, device="cuda")
    pairs, x = made.experts.flatten(), made.x.double().repeat_interleave(8, 0)
    for expert in range(128):
        own = pairs == expert
        gate, up = (x[own] @ made.gate_up[expert].double().T).chunk(2, -1)
        wanted[own] = (torch.nn.functional.silu(gate) * up) @ made.down[expert].double().T
    found = run_experts(*made.arguments).double().flatten(0, 1)
    assert (found - wanted).norm() / wanted.norm() < 8e-3


def test_a_graph_follows_the_choice_of_experts() -> None:
    """What was captured with one choice computes another, with as many or as few tiles as that has."""
    from graphgen.models.experts.operator import run_experts

    for rows in (3, 100):
        first, second = (make(rows, num_experts=30, every_third_row_dead=dead).to("cuda") for dead in (False, True))
        experts = first.experts.clone()
        static = first._replace(experts=experts)
        run_experts(*static.arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run_experts(*static.arguments)
        experts.copy_(second.experts)
        graph.replay()
        wanted = static._replace(experts=second.experts)
        torch.testing.assert_close(wanted.of_experts(made), by_hand(wanted), rtol=1e-4, atol=1e-4)
