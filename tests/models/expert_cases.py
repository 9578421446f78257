"""Arguments of the operator of a mixture of experts, and its formula written out, pair by pair, in float64."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import LinearStack
from graphgen.models.formats.products import Weight
from graphgen.models.formats.quantise import quantised
from graphgen.models.spec.formats import LinearFormat

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
}


class Case(NamedTuple):
    x: Tensor
    experts: Tensor
    gate_up: Any  # a tensor, or a stack of quantised weights
    gate_up_bias: Tensor | None
    down: Any
    down_bias: Tensor | None
    activation: str
    limit: float | None
    up_plus_one: bool

    def to(self, device: str) -> "Case":
        def moved(weight: Any) -> Any:
            if isinstance(weight, Weight):
                return Weight(weight.format, *map(moved, weight[1:]))
            return None if weight is None else weight.to(device)

        return self._replace(
            x=self.x.to(device),
            experts=self.experts.to(device),
            gate_up=moved(self.gate_up),
            gate_up_bias=moved(self.gate_up_bias),
            down=moved(self.down),
            down_bias=moved(self.down_bias),
        )

    @property
    def num_experts(self) -> int:
        return len(self.down.codes if isinstance(self.down, Weight) else self.down)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of run_experts."""
        return tuple(self)

    def of_experts(self, made: Tensor) -> Tensor:
        """Of an operator's result, that of pairs that have an expert: the rest is undefined."""
        return made[self.experts < self.num_experts].double()


def make(
    rows: int,
    num_experts: int = 5,
    top_k: int = 2,
    hidden: int = 24,
    size: int = 20,
    activation: str = "silu",
    limit: float | None = None,
    biases: bool = False,
    row_of_each_pair: bool = False,
    every_third_row_dead: bool = False,
    only_expert: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(rows)
    normal = partial(torch.randn, generator=generator)
    experts = torch.rand(rows, num_experts, generator=generator).topk(top_k).indices
    if only_expert is not None:
        experts = torch.full((rows, 1), only_expert)
    x = normal(experts.numel() if row_of_each_pair else rows, hidden)
    if every_third_row_dead:
        experts[::3] = num_experts
        x[::3] = float("nan")
    gate_up_bias, down_bias = (
        (normal(num_experts, 2 * size).to(dtype), normal(num_experts, hidden).to(dtype)) if biases else (None, None)
    )
    matrices = normal(num_experts, 2 * size, hidden).to(dtype), normal(num_experts, hidden, size).to(dtype)
    return Case(
        x.to(dtype), experts, matrices[0], gate_up_bias, matrices[1], down_bias, activation, limit, limit is not None
    )


def quantised_like(case: Case, form: LinearFormat) -> tuple[Case, Case]:
    """The case with its matrices in a format, and with what these mean in its dtype."""
    stacks, meant = [], []
    for matrices in (case.gate_up, case.down):
        stack = LinearStack(len(matrices), matrices.shape[2], matrices.shape[1], case.x.dtype, form)
        made = quantised(matrices.flatten(0, 1), form)
        stack.fill(0, made)
        stacks.append(stack.stored)
        meant.append(dequantised(made, torch.float32).to(case.x.dtype).view_as(matrices))
    return case._replace(gate_up=stacks[0], down=stacks[1]), case._replace(gate_up=meant[0], down=meant[1])


CASES: Mapping[str, Callable[[], Case]] = {
    "no row": partial(make, 0),
    "one row": partial(make, 1),
    "few rows, biases": partial(make, 7, biases=True),
    "limits": partial(make, 9, activation="quick_gelu", limit=0.8, biases=True),
    "a row of each pair": partial(make, 5, row_of_each_pair=True),
    "rows of no expert": partial(make, 10, every_third_row_dead=True),
    "most pairs that are not sorted": partial(make, 32, every_third_row_dead=True),
    "one more": partial(make, 33, every_third_row_dead=True, biases=True),
    "several tiles of an expert": partial(make, 70, num_experts=3, row_of_each_pair=True),
    "all to one expert, more experts than rows": partial(make, 65, num_experts=40, only_expert=39),
    "large tiles": partial(make, 150, num_experts=3, every_third_row_dead=True),
    **{activation: partial(make, 3, activation=activation) for activation in ACTIVATIONS},
}


def by_hand(case: Case) -> Tensor:
    """Of the pairs that have an expert, [pairs, H] float64."""
    num_experts, outputs = case.down.shape[0], []
    rows = (
        case.x.double()
        if len(case.x) != len(case.experts)
        else case.x.double().repeat_interleave(case.experts.shape[1], 0)
    )
    for row, expert in zip(rows, case.experts.flatten().tolist(), strict=True):
        if expert == num_experts:
            continue
        inner = case.gate_up[expert].double() @ row
        if case.gate_up_bias is not None:
            inner = inner + case.gate_up_bias[expert]
        gate, up = inner.split(len(inner) // 2)
        if case.limit is not None:
            gate, up = gate.clamp(max=case.limit), up.clamp(-case.limit, case.limit)
        out = case.down[expert].double() @ (ACTIVATIONS[case.activation](gate) * (up + case.up_plus_one))
        outputs.append(out if case.down_bias is None else out + case.down_bias[expert])
    return torch.stack(outputs) if outputs else case.x.double().new_empty(0, case.x.shape[1])
