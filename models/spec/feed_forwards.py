"""What treats each row alone, as data: dense ones and mixtures of experts. Built by feed_forward.py and experts/."""

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from graphgen.models.spec.formats import LinearFormat, Sizes
from graphgen.models.spec.parts import Shard, Size

ACTIVATION_WEIGHTS: Mapping[str, tuple[str, ...]] = {"xielu": ("alpha_p", "alpha_n")}
"""Activation -> the numbers that each layer has learned for it."""


class Dense(Struct, frozen=True, tag="dense", kw_only=True):
    """down(activation(gate(x)) * up(x)) if gated (arXiv 2002.05202), else down(activation(up(x)))."""

    size: Size
    activation: str  # a key of activations.ACTIVATIONS
    gated: bool = True
    bias: bool = False
    gate_up_format: LinearFormat | None = None
    down_format: LinearFormat | None = None

    def linears(self, hidden_size: int) -> Sizes:
        """Of the layers that may have a format."""
        return {"gate_up": ((1 + self.gated) * self.size, hidden_size), "down": (hidden_size, self.size)}

    def shared_by(self, num_ranks: int) -> "Dense":
        """What one of so many ranks has of it. Raises ConfigError where they cannot share it."""
        part = Shard(0, num_ranks).part(self.size, "inner columns of a feed-forward")
        if self.down_format is not None:
            self.down_format.check_shared(len(part), num_ranks, "the down projection of a feed-forward")
        return msgspec.structs.replace(self, size=len(part))

    def num_parameters(self, hidden_size: int) -> int:
        inner = (1 + self.gated) * self.size
        of_activation = len(ACTIVATION_WEIGHTS.get(self.activation, ()))
        return hidden_size * (inner + self.size) + self.bias * (inner + hidden_size) + of_activation


class Router(Struct, frozen=True, kw_only=True):
    """Which experts a row goes to and how much each counts: a score for each expert from x @ weight (+ bias), the
    `top_k` experts of highest score, and their scores as weights. All of it in float32.

    softmax, sigmoid   of the products. A softmax over the chosen alone is `softmax` renormalised.
    sparsemixer        arXiv 2409.12136 as it is evaluated: the best expert, weighted by a softmax over those within a
                       relative distance of 2 * `jitter` of it, then the same of the rest; top_k is 2
    """

    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    bias: bool = False
    correction: bool = False  # the choice is by score + a bias of each expert, the weight is the score alone
    num_groups: int = 1  # experts stand in groups of equal size, and only those of the best groups are chosen
    kept_groups: int = 1
    group_score: Literal["max", "top_two"] = "max"  # of a group: its best score, or the sum of its two best
    renormalise: bool = False  # the weights of a row add up to 1
    scale: float = 1.0  # of the weights
    jitter: float = 0.0  # sparsemixer


class Experts(Struct, frozen=True, tag="experts", kw_only=True):
    """A mixture of experts (arXiv 1701.06538): sum of weight * expert(x) over the experts that the router chose, each
    down(activation(gate(x)) * up(x)), and of a shared one that sees every row."""

    num_experts: Size
    top_k: Size
    size: Size  # inner, of each expert
    activation: str  # a key of activations.ACTIVATIONS
    router: Router
    bias: bool = False
    limit: float | None = None  # of gate's values from above, of up's from both sides
    up_plus_one: bool = False  # activation(gate(x)) * (up(x) + 1)
    input_scaled: bool = False  # expert(weight * x) instead of weight * expert(x)
    shared: Dense | None = None
    shared_gate: bool = False  # shared(x) counts sigmoid(x @ weight)
    gate_up_format: LinearFormat | None = None  # of all experts alike
    down_format: LinearFormat | None = None

    def linears(self, hidden_size: int) -> Sizes:
        """What may have a format: matrices of all experts, one below the other."""
        rows, hidden_rows = self.num_experts * 2 * self.size, self.num_experts * hidden_size
        return {"gate_up": (rows, hidden_size), "down": (hidden_rows, self.size)}

    def shared_by(self, num_ranks: int) -> "Experts":
        """See Dense: a part of every expert."""
        part = Shard(0, num_ranks).part(self.size, "inner columns of an expert")
        if self.down_format is not None:
            self.down_format.check_shared(len(part), num_ranks, "the down projection of experts")
        shared = None if self.shared is None else self.shared.shared_by(num_ranks)
        return msgspec.structs.replace(self, size=len(part), shared=shared)

    def num_parameters(self, hidden_size: int) -> int:
        router, inner = self.router, 2 * self.size
        each = hidden_size * (inner + self.size) + self.bias * (inner + hidden_size)
        count = self.num_experts * (each + hidden_size + router.bias + router.correction)
        shared = 0 if self.shared is None else self.shared.num_parameters(hidden_size)
        return count + shared + self.shared_gate * hidden_size


FeedForward = Dense | Experts
"""What treats each row alone. One Struct with a tag of its own for each kind."""
