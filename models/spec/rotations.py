"""How positions become rotations, as data; rope.py has the formula of each kind."""

from typing import Literal

from msgspec import Struct


class Temperature(Struct, frozen=True):
    """Of attention: a query at position p counts 1 + beta * ln(1 + (p + offset) // length) times."""

    beta: float
    length: int
    offset: int = 0


RopeKind = Literal["none", "default", "linear", "dynamic", "llama3", "yarn", "longrope"]


class RopeSpec(Struct, frozen=True):
    """How positions become rotations; rope.py has the formula of each kind. Unused numbers keep their
    default."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # linear, dynamic, llama3, yarn, longrope
    original_max_len: int = 0  # dynamic, llama3, yarn, longrope: context length before scaling
    attention_factor: float = 1.0  # yarn, longrope: scales cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's bounds to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: divisors up to the original length
    long_factors: tuple[float, ...] = ()  # longrope: divisors beyond it
    rotary_dim: int | None = None  # the first dimensions of a head, which turn; None: all
    interleaved: bool = False  # a pair that turns together lies side by side in the checkpoint, not half a head apart
    temperature: Temperature | None = None  # of the queries that turn by this
    score_factor: float = 1.0  # of the scores of attention that turns by this

    @property
    def depends_on_length(self) -> bool:
        """Whether the keys of equal tokens differ with the length of their prompts."""
        return self.kind in ("dynamic", "longrope")


NO_ROPE = RopeSpec(kind="none")
"""The rotation of layers and models without one: by nothing."""
