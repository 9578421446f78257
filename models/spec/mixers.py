"""What makes a row see others, as data: attention of either kind, and what it keeps of each position.

Built by layers.py and latent.py.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.spec.formats import LinearFormat, Sizes
from graphgen.models.spec.kv_formats import kv_format
from graphgen.models.spec.parts import Norm, Shard, Size

KERNEL_HEAD_DIMS = (64, 128, 256)
"""Head sizes that the attention kernels for CUDA are written for; others are padded to the next."""


class QKNorm(Struct, frozen=True):
    """A norm of queries and keys."""

    norm: Norm
    over: Literal["head", "own_head", "all_heads"] = "head"
    """head: over each head, one weight for all. own_head: over each head, a weight for each. all_heads: over the whole
    width at once."""
    rotated: bool = False  # it stands behind their rotation, not before it

    def num_parameters(self, num_heads: int, head_dim: int) -> int:
        """Of the queries or of the keys."""
        return self.norm.num_parameters(head_dim if self.over == "head" else num_heads * head_dim)


class Pages(Struct, frozen=True):
    """What a layer keeps of each position that it may see again."""

    group: int  # layers of one group keep the same positions: 0 is all of them, W the last W
    bytes: int  # of one position


class Alibi(Struct, frozen=True):
    """Scores fall with distance, each head's by its own slope (arXiv 2108.12409): alibi_slopes in
    attention/variant.py."""

    scaled: bool = False  # the slopes are times 1 / sqrt(head_dim) too


class GQA(Struct, frozen=True, tag="gqa", kw_only=True):
    """Grouped-query attention (arXiv 2305.13245) over paged keys and values; one head a group is multi-head attention,
    one group multi-query attention."""

    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    padded_head_dim: int | None = None  # how wide a head lies in memory; None: as it is
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm | None = None
    clip: float | None = None  # bound of the values of q, k and v
    rope: int = 0  # which of ModelSpec.ropes
    window: int | None = None  # positions a row sees, its own included; None sees all
    segment: int | None = None  # a row sees its own segment alone, which begins at a multiple of this
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    alibi: Alibi | None = None
    sinks: bool = False  # exp(a number of each head) is added to the sum that weights are divided by
    qkv_format: LinearFormat | None = None
    o_format: LinearFormat | None = None

    @property
    def width(self) -> int:
        """Of a head in memory."""
        return self.padded_head_dim or self.head_dim

    @property
    def rotated(self) -> tuple[int, int]:
        """Elements of a head among which some turn, and their width in memory."""
        return self.head_dim, self.width

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of each tensor of a position's values in the pages."""
        return ((self.num_kv_heads, self.width),) * 2

    @property
    def score_scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.width

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.width

    @property
    def reach(self) -> int | None:
        """Of how many positions, its own included, a row sees none that is further behind; None sees all."""
        limits = [limit for limit in (self.window, self.segment) if limit is not None]
        return min(limits, default=None)

    def keeps(self, kept_as: str) -> Pages:
        """A key and a value for each KV head. kept_as: a KV format's name."""
        return Pages(self.reach or 0, 2 * kv_format(kept_as).position_bytes(self.num_kv_heads, self.width))

    def linears(self, hidden_size: int) -> Sizes:
        """Of the layers that may have a format."""
        return {"qkv": (self.q_size + 2 * self.kv_size, hidden_size), "o": (hidden_size, self.q_size)}

    def num_parameters(self, hidden_size: int) -> int:
        qkv_size = self.q_size + 2 * self.kv_size
        count = hidden_size * (qkv_size + self.q_size) + self.qkv_bias * qkv_size + self.o_bias * hidden_size
        count += self.sinks * self.num_heads
        if self.qk_norm is not None:
            count += sum(
                self.qk_norm.num_parameters(heads, self.width) for heads in (self.num_heads, self.num_kv_heads)
            )
        return count

    def heads_of(self, shard: Shard) -> tuple[range, range]:
        """Query heads and KV heads of a rank. Where there are fewer KV heads than ranks, several ranks hold the
        same. Raises ConfigError, or UnsupportedModelError where heads cannot be parted."""
        if shard.size > 1 and self.qk_norm is not None and self.qk_norm.over == "all_heads":
            raise UnsupportedModelError(f"{shard.size} ranks would share heads that are normed together: use one rank")
        heads = shard.part(self.num_heads, "attention heads")
        if self.num_kv_heads % shard.size and shard.size % self.num_kv_heads == 0:
            own = shard.rank * self.num_kv_heads // shard.size
            return heads, range(own, own + 1)
        return heads, shard.part(self.num_kv_heads, "KV heads")

    def shared_by(self, num_ranks: int) -> "GQA":
        """What one of so many ranks has of it. Raises as heads_of, and ConfigError for a format that would be lost."""
        heads, kv_heads = self.heads_of(Shard(0, num_ranks))
        if self.o_format is not None:
            self.o_format.check_shared(len(heads) * self.head_dim, num_ranks, "the output projection of attention")
        return msgspec.structs.replace(self, num_heads=len(heads), num_kv_heads=len(kv_heads))

    def within(self, num_positions: int) -> "GQA":
        """The same for requests of so many: a window or segment that holds them all is none."""
        limits = {"window": self.window, "segment": self.segment}
        return msgspec.structs.replace(
            self, **{name: None for name, limit in limits.items() if (limit or 0) >= num_positions}
        )

    def padded(self) -> "GQA":
        """The same, its heads as wide as the kernels for CUDA want them, where zeros can fill them up."""
        fitting = next((size for size in KERNEL_HEAD_DIMS if size >= self.head_dim), self.head_dim)
        has_mean = self.qk_norm is not None and self.qk_norm.norm.kind == "layer" and self.qk_norm.over != "all_heads"
        if fitting == self.head_dim or has_mean:
            return self
        return msgspec.structs.replace(self, padded_head_dim=fitting)


class Latent(Struct, frozen=True, tag="latent", kw_only=True):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1). A position keeps one latent vector, from which each
    head has a key and a value of its own, and one key that turns and that all heads share.

        c = norm(latent part of kv_down(x));   k_r = rotated(the rest of kv_down(x))
        q = q_up(q_norm(q_down(x))), without a q_rank q_up(x);   of each head plain_dim that stay and rope_dim that turn
        score = scale * (q_plain . (up_k c) + q_rotated . k_r);   value = up_v c

    It is computed absorbed (section 2.1.3 there): q_plain up_k meets c itself, and up_v stands behind the sum of
    weighted c. So it is multi-query attention whose one key is [c, k_r] and whose value is c.
    """

    num_heads: Size
    latent_size: Size
    plain_dim: Size
    rope_dim: Size
    value_dim: Size
    q_rank: Size | None = None
    bias: bool = False  # of q_down, kv_down and the output
    norm: Norm = Norm()  # of both latents
    rope: int = 0  # which of ModelSpec.ropes
    window: None = None
    q_down_format: LinearFormat | None = None
    q_up_format: LinearFormat | None = None
    kv_down_format: LinearFormat | None = None
    o_format: LinearFormat | None = None

    @property
    def query_dim(self) -> int:
        """Of a head of the queries."""
        return self.plain_dim + self.rope_dim

    @property
    def score_scale(self) -> float:
        """Of the scores, but for the rope's score_factor."""
        return float(self.query_dim**-0.5)

    @property
    def row_size(self) -> int:
        """Values that a position keeps."""
        return self.latent_size + self.rope_dim

    @property
    def rotated(self) -> tuple[int, int]:
        """See GQA."""
        return self.rope_dim, self.rope_dim

    @property
    def reach(self) -> None:
        """See GQA: all."""
        return None

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """See GQA."""
        return ((1, self.row_size),)

    def keeps(self, kept_as: str) -> Pages:
        """One row for all heads. kept_as: a KV format's name."""
        return Pages(0, kv_format(kept_as).position_bytes(1, self.row_size))

    def linears(self, hidden_size: int) -> Sizes:
        """See GQA. The one that makes keys and values of latents is no layer of its own."""
        q_down = {} if self.q_rank is None else {"q_down": (self.q_rank, hidden_size)}
        return {
            **q_down,
            "q_up": (self.num_heads * self.query_dim, self.q_rank or hidden_size),
            "kv_down": (self.row_size, hidden_size),
            "o": (hidden_size, self.num_heads * self.value_dim),
        }

    def num_parameters(self, hidden_size: int) -> int:
        q_in, rank = self.q_rank or hidden_size, self.q_rank or 0
        count = hidden_size * (rank + self.row_size) + self.bias * (rank + self.row_size + hidden_size)
        count += self.norm.num_parameters(self.latent_size) + self.norm.num_parameters(rank)
        of_head = q_in * self.query_dim + self.latent_size * (self.plain_dim + self.value_dim)
        return count + self.num_heads * (of_head + self.value_dim * hidden_size)

    def shared_by(self, num_ranks: int) -> "Latent":
        """See GQA. Each rank keeps the latents of all positions."""
        heads = Shard(0, num_ranks).part(self.num_heads, "attention heads")
        if self.o_format is not None:
            self.o_format.check_shared(len(heads) * self.value_dim, num_ranks, "the output projection of attention")
        return msgspec.structs.replace(self, num_heads=len(heads))

    def within(self, num_positions: int) -> "Latent":
        """The same: it has no window."""
        return self

    def padded(self) -> "Latent":
        """The same: no kernel for CUDA asks for another width."""
        return self


Mixer = GQA | Latent
"""What makes a row see others. One Struct with a tag of its own for each kind."""
