"""ModelSpec: everything about a model that the engine needs to know, as one frozen value.

Owns the Structs that describe a model layer by layer, and the sizes that follow from them. Never reads a file and
never imports torch, so that the spec can travel in a message and be used by processes without torch. Made by
families/reader.py from a Hugging Face config; read by the decoder, the loader, the KV cache and whoever sizes memory.

    ModelSpec   embedding, layers, final norm, head
    Layer       mixer (attention over earlier positions), feed-forward, their norms, how the residual runs

Every field has one meaning in arithmetic. A trait without a field is refused when the config is read.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from graphgen.ipc.errors import ConfigError, UnsupportedModelError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes weights and KV pages may have, and the size of one element."""

KERNEL_HEAD_DIMS = (64, 128, 256)
"""Head sizes that the attention kernels for CUDA are written for; others are padded to the next."""

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""Of a dimension, or a number of things. A config's is checked when it is read."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ConfigError for a dtype that no weight or KV page may have."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {dtype!r}, supported are {', '.join(DTYPE_BYTES)}: choose one of them")
    return DTYPE_BYTES[dtype]


# --- ranks -----------------------------------------------------------------------------------------------------


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


# --- the parts of a layer --------------------------------------------------------------------------------------


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

    def keeps(self, dtype: str) -> Pages:
        """A key and a value for each KV head."""
        return Pages(self.reach or 0, 2 * self.kv_size * dtype_bytes(dtype))

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
        same."""
        heads = shard.part(self.num_heads, "attention heads")
        if self.num_kv_heads % shard.size and shard.size % self.num_kv_heads == 0:
            own = shard.rank * self.num_kv_heads // shard.size
            return heads, range(own, own + 1)
        return heads, shard.part(self.num_kv_heads, "KV heads")

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

    def keeps(self, dtype: str) -> Pages:
        """One row for all heads."""
        return Pages(0, self.row_size * dtype_bytes(dtype))

    def num_parameters(self, hidden_size: int) -> int:
        q_in, rank = self.q_rank or hidden_size, self.q_rank or 0
        count = hidden_size * (rank + self.row_size) + self.bias * (rank + self.row_size + hidden_size)
        count += self.norm.num_parameters(self.latent_size) + self.norm.num_parameters(rank)
        of_head = q_in * self.query_dim + self.latent_size * (self.plain_dim + self.value_dim)
        return count + self.num_heads * (of_head + self.value_dim * hidden_size)

    def padded(self) -> "Latent":
        """The same: no kernel for CUDA asks for another width."""
        return self


ACTIVATION_WEIGHTS: Mapping[str, tuple[str, ...]] = {"xielu": ("alpha_p", "alpha_n")}
"""Activation -> the numbers that each layer has learned for it."""


class Dense(Struct, frozen=True, tag="dense", kw_only=True):
    """down(activation(gate(x)) * up(x)) if gated (arXiv 2002.05202), else down(activation(up(x)))."""

    size: Size
    activation: str  # a key of activations.ACTIVATIONS
    gated: bool = True
    bias: bool = False

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

    def num_parameters(self, hidden_size: int) -> int:
        router, inner = self.router, 2 * self.size
        each = hidden_size * (inner + self.size) + self.bias * (inner + hidden_size)
        count = self.num_experts * (each + hidden_size + router.bias + router.correction)
        shared = 0 if self.shared is None else self.shared.num_parameters(hidden_size)
        return count + shared + self.shared_gate * hidden_size


Mixer = GQA | Latent
"""What makes a row see others. One Struct with a tag of its own for each kind."""

FeedForward = Dense | Experts
"""What treats each row alone. One Struct with a tag of its own for each kind."""


class Layer(Struct, frozen=True, kw_only=True):
    """A mixer and a feed-forward on a residual stream. A norm that is None does nothing.

    sequential   x += mixer_output_norm(mixer(input_norm(x)));  x += ff_output_norm(ff(ff_norm(x)))
    parallel     x += mixer(input_norm(x)) + ff(ff_norm(x));  with shared_norm ff(input_norm(x))
    """

    mixer: Mixer
    feed_forward: FeedForward
    input_norm: Norm | None
    ff_norm: Norm | None
    mixer_output_norm: Norm | None = None
    ff_output_norm: Norm | None = None
    parallel: bool = False
    shared_norm: bool = False  # of a parallel layer: the feed-forward reads what the mixer reads
    residual_from_norm: bool = False  # input_norm and ff_norm stand on the stream: x becomes what they return
    output_norm: Norm | None = None  # on the stream, behind both
    residual_scale: float = 1.0  # of what is added to the stream

    def num_parameters(self, hidden_size: int) -> int:
        norms = (self.input_norm, self.ff_norm, self.mixer_output_norm, self.ff_output_norm, self.output_norm)
        return (
            self.mixer.num_parameters(hidden_size)
            + self.feed_forward.num_parameters(hidden_size)
            + sum(norm.num_parameters(hidden_size) for norm in norms if norm is not None)
        )


# --- the whole -------------------------------------------------------------------------------------------------


class Embedding(Struct, frozen=True):
    """From token ids to the residual stream: norm(project(table[id] * scale) + positions[position + offset])."""

    size: int | None = None  # width of the table; None: the model's. Another is projected, at both ends
    scale: float = 1.0
    round_scale: bool = False  # the scale is rounded to the weights' dtype first
    num_positions: int = 0  # rows of a learned table of positions; 0: none
    position_offset: int = 0  # the row of position 0
    norm: Norm | None = None


class Head(Struct, frozen=True):
    """From the final norm to logits: softcap(scale * (x @ weight + bias))."""

    tied: bool = False  # the weight is the embedding's table
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)


class ModelSpec(Struct, frozen=True, kw_only=True):
    """A decoder-only transformer."""

    family: str  # a key of families.FAMILIES
    architecture: str  # the Hugging Face class name
    vocab_size: Size  # rows of the embedding and of the head
    num_tokens: int | None = None  # ids that the tokenizer has; rows from here on mean nothing. None: every row has one
    hidden_size: Size
    layers: tuple[Layer, ...]
    ropes: tuple[RopeSpec, ...]
    embedding: Embedding
    final_norm: Norm | None
    head: Head
    max_position_embeddings: Size
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint, a key of DTYPE_BYTES
    float16: bool = True  # False: its activations leave float16's range
    needs_bos: bool = False  # what it says of a text without a beginning-of-sequence token is of no use
    initializer_std: float

    @property
    def num_drawable(self) -> int:
        """Tokens that may be drawn."""
        return min(self.vocab_size, self.num_tokens or self.vocab_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> GQA:
        """Of every layer, but for what an attention kernel takes as an argument. Raises UnsupportedModelError where
        layers have heads of unequal number or size, or latent attention."""
        mixers = [layer.mixer for layer in self.layers if isinstance(layer.mixer, GQA)]
        if len(mixers) < self.num_layers:
            raise UnsupportedModelError(
                f"this {self.architecture} has latent attention, which FlashInfer has no kernel for here: use"
                " attention='torch'"
            )
        shapes = {(mixer.num_heads, mixer.num_kv_heads, mixer.width) for mixer in mixers}
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"the layers of this {self.architecture} have heads of {len(shapes)} numbers or sizes"
                f" ({', '.join(map(str, sorted(shapes)))}): use attention='torch'"
            )
        return mixers[0]

    @property
    def latent(self) -> Latent | None:
        """Of every layer, where all have latent attention of the same sizes."""
        first = self.layers[0].mixer
        same = isinstance(first, Latent) and all(layer.mixer == first for layer in self.layers)
        return first if isinstance(first, Latent) and same else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer: positions a row sees, its own included; None sees all."""
        return tuple(layer.mixer.window for layer in self.layers)

    @property
    def depends_on_length(self) -> bool:
        """Whether the keys of equal tokens differ with the length of their prompts."""
        return any(rope.depends_on_length for rope in self.ropes)

    @property
    def rotates_by_limit(self) -> bool:
        """Whether the length from which a rotation follows is the most that a request may have: all its positions then
        rotate alike. Else it is that of its prompt, and beyond it its own."""
        return any(rope.kind == "longrope" for rope in self.ropes)

    @property
    def num_parameters(self) -> int:
        """Weights held in memory: tied embeddings count once."""
        embedding, head, hidden = self.embedding, self.head, self.hidden_size
        width = embedding.size or hidden
        count = self.vocab_size * (width * (1 if head.tied else 2) + head.bias)
        count += (embedding.num_positions + embedding.position_offset) * hidden
        count += 0 if width == hidden else 2 * width * hidden
        count += sum(norm.num_parameters(hidden) for norm in (embedding.norm, self.final_norm) if norm is not None)
        return count + sum(layer.num_parameters(hidden) for layer in self.layers)

    def weight_bytes(self, dtype: str) -> int:
        """Memory of the weights in `dtype`."""
        return self.num_parameters * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV memory of one position over all layers in `dtype`."""
        return sum(layer.mixer.keeps(dtype).bytes for layer in self.layers)

    def padded(self) -> "ModelSpec":
        """The same model with heads as wide as the kernels for CUDA want them; a zero more changes nothing."""
        layers = (msgspec.structs.replace(layer, mixer=layer.mixer.padded()) for layer in self.layers)
        return msgspec.structs.replace(self, layers=tuple(layers))
