"""The tiles of a mixture of experts on a GPU: the formula, whichever pairs a tile is made of, and in a graph."""

import pytest
import torch

from graphgen.models.spec.formats import LinearFormat
from tests.models.expert_cases import CASES, by_hand, make, quantised_like
from tests.models.format_cases import FORMATS

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


@pytest.mark.parametrize("rows", [3, 100, 300])
@pytest.mark.parametrize("form", [form for form in FORMATS.values() if not form.permuted], ids=lambda form: form.name)
def test_quantised_weights_mean_what_their_format_says(form: LinearFormat, rows: int) -> None:
    """A tile for each pair, tiles of few rows and of many, in float32 and bfloat16; no size is a multiple of 64 or 128
    where the format lets it be none."""
    from graphgen.models.experts.operator import run_experts

    hidden, size = (288, 160) if form.rows == 1 else (256, 384)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        plain = make(rows, 6, 2, hidden, size, biases=True, every_third_row_dead=True, dtype=dtype)
        plain = plain._replace(gate_up=plain.gate_up * 0.1, down=plain.down * 0.1)
        quantised, meant = (case.to("cuda") for case in quantised_like(plain, form))
        wide = meant._replace(
            x=meant.x.float(), gate_up=meant.gate_up.float(), down=meant.down.float()
        )  # what the weights mean in bfloat16 is rounded once more than what the kernel multiplies
        got, want = plain.of_experts(run_experts(*quantised.arguments).cpu()), by_hand(wide.to("cpu"))
        assert (got - want).norm() / want.norm() < limit


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
