"""What mixers, feed-forwards and layers of a spec are made of: sizes, dtypes, norms, and who holds which share."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from graphgen.ipc.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes weights and KV pages may have, and the size of one element."""

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""Of a dimension, or a number of things. A config's is checked when it is read."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ConfigError for a dtype that no weight or KV page may have."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {dtype!r}, supported are {', '.join(DTYPE_BYTES)}: choose one of them")
    return DTYPE_BYTES[dtype]


class Shard(Struct, frozen=True):
    """Which of the ranks that share a model's weights this one is."""

    rank: int = 0
    size: int = 1

    def part(self, count: int, what: str) -> range:
        """This rank's of `count` things that are dealt out evenly. `what` names them in the error."""
        if count % self.size:
            raise ConfigError(
                f"{count} {what} cannot be shared by {self.size} ranks: use a number that divides {count}"
            )
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


WHOLE = Shard()
"""The one rank that holds everything."""


class Norm(Struct, frozen=True):
    """Normalisation over the last dimension: `rms` divides by the root mean square (arXiv 1910.07467), `layer`
    subtracts the mean first (arXiv 1607.06450)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: Annotated[float, Meta(ge=0.0)] = 1e-6
    weight: bool = True
    bias: bool = False
    plus_one: bool = False  # checkpoints store the weight less one
    round_first: bool = True  # `rms` rounds to the model's dtype before the weight; else the weight is float32

    def num_parameters(self, size: int) -> int:
        return size * (self.weight + self.bias)
