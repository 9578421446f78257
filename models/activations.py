"""Activations of a feed-forward, by the names that a spec has for them.

Owns their arithmetic and the numbers that some have learned. Called by feed_forward.py and by experts/.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.models.targets import Target, Targets

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * F.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
"""Those without weights."""


class XIELU(nn.Module):
    """x^2 softplus(p) + x b above 0, else (exp(x) - 1 - x) (b + softplus(n)) + x b (arXiv 2411.13010), p and n being
    learned."""

    beta: Tensor
    eps: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False) for _ in range(2))
        # Constants, which checkpoints have too: of the largest exponent that does not round to nothing the second.
        self.register_buffer("beta", torch.tensor(0.5, dtype=dtype))
        self.register_buffer("eps", torch.tensor(-1e-6, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        above, below = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        curve = torch.where(x > 0, above * x * x, (torch.expm1(torch.minimum(x, self.eps)) - x) * below)
        return curve + self.beta * x

    def weights(self, prefix: str) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        for name, weight in (*self.named_parameters(), *self.named_buffers()):
            yield f"{prefix}.{name}", Target(weight.data, tuple(weight.shape))
