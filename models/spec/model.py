"""A model as one frozen value: its layers, what stands before and behind them, and the sizes that follow."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.spec.feed_forwards import Dense, FeedForward
from graphgen.models.spec.formats import Choose, LinearFormat, LinearPlace, places_of, with_formats
from graphgen.models.spec.mixers import GQA, Latent, Mixer
from graphgen.models.spec.parts import Norm, Size, dtype_bytes
from graphgen.models.spec.rotations import RopeSpec

EXPERTS = "experts_"
"""Names of linear layers that all experts of a mixture have in common begin with it."""
_SHARED = "shared_"


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

    def with_formats(self, hidden_size: int, choose: Choose) -> "Layer":
        """The same layer with chosen formats of its linear layers. Those of all experts of a mixture are two, called
        `experts_gate_up` and `experts_down`, and those of a shared one `shared_gate_up` and `shared_down`."""
        mixer, ff = with_formats(self.mixer, self.mixer.linears(hidden_size), choose), self.feed_forward
        if isinstance(ff, Dense):
            ff = with_formats(ff, ff.linears(hidden_size), choose)
        else:
            ff = with_formats(ff, ff.linears(hidden_size), choose, EXPERTS)
            if ff.shared is not None:
                shared = with_formats(ff.shared, ff.shared.linears(hidden_size), choose, _SHARED)
                ff = msgspec.structs.replace(ff, shared=shared)
        return msgspec.structs.replace(self, mixer=mixer, feed_forward=ff)

    def shared_by(self, num_ranks: int) -> "Layer":
        """See ModelSpec.shared_by."""
        mixer, feed_forward = self.mixer.shared_by(num_ranks), self.feed_forward.shared_by(num_ranks)
        return msgspec.structs.replace(self, mixer=mixer, feed_forward=feed_forward)

    def linears(self, hidden_size: int) -> list[LinearPlace]:
        """Every linear layer that may have a format."""
        found, ff = places_of(self.mixer, self.mixer.linears(hidden_size)), self.feed_forward
        if isinstance(ff, Dense):
            return found + places_of(ff, ff.linears(hidden_size))
        found += places_of(ff, ff.linears(hidden_size), EXPERTS)
        return found if ff.shared is None else found + places_of(ff.shared, ff.shared.linears(hidden_size), _SHARED)


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
    kv_format: Literal["fp8"] | None = None  # how the checkpoint asks that keys and values be kept; None: it does not

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
        # In whatever format their weights are.
        mixers = [layer.with_formats(self.hidden_size, lambda _: None).mixer for layer in self.layers]
        first = mixers[0]
        same = isinstance(first, Latent) and all(mixer == first for mixer in mixers)
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
        """Memory of the weights in `dtype`, and in the formats that some of them have."""
        each = dtype_bytes(dtype)
        saved = sum(each * place.num_rows * place.num_columns - place.num_bytes(each) for place in self.linears)
        return each * self.num_parameters - saved

    @property
    def linears(self) -> list[LinearPlace]:
        """Every linear layer that may have a format, from the first layer to the last."""
        return [place for layer in self.layers for place in layer.linears(self.hidden_size)]

    @property
    def formats(self) -> Mapping[LinearFormat, int]:
        """Format -> how many linear layers have it; those in the model's dtype are left out."""
        return Counter(place.format for place in self.linears if place.format is not None)

    def with_formats(self, choose: Callable[[int, LinearPlace], LinearFormat | None]) -> "ModelSpec":
        """The same model with chosen formats of its linear layers. choose: also takes the number of the layer."""
        layers = (
            layer.with_formats(self.hidden_size, functools.partial(choose, number))
            for number, layer in enumerate(self.layers)
        )
        return msgspec.structs.replace(self, layers=tuple(layers))

    def kv_bytes_per_token(self, kept_as: str) -> int:
        """KV memory of one position over all layers. kept_as: a KV format's name."""
        return sum(layer.mixer.keeps(kept_as).bytes for layer in self.layers)

    def shared_by(self, num_ranks: int) -> "ModelSpec":
        """The sizes of what each of so many ranks has of the layers: its heads, its inner columns. Raises ConfigError
        where so many cannot share this model, UnsupportedModelError where no ranks can."""
        if num_ranks == 1:
            return self
        return msgspec.structs.replace(self, layers=tuple(layer.shared_by(num_ranks) for layer in self.layers))

    def rank_weight_bytes(self, dtype: str, num_ranks: int) -> int:
        """See weight_bytes; of one of so many ranks, which has the whole embedding and its rows of the head."""
        held_bytes = self.shared_by(num_ranks).weight_bytes(dtype)
        if self.head.tied:
            return held_bytes
        others = self.vocab_size - -(-self.vocab_size // num_ranks)
        return held_bytes - others * (self.embedding.size or self.hidden_size) * dtype_bytes(dtype)

    def within(self, max_model_len: int) -> "ModelSpec":
        """The same model for requests of so many tokens: a window that holds all of them is none."""
        layers = (msgspec.structs.replace(layer, mixer=layer.mixer.within(max_model_len)) for layer in self.layers)
        return msgspec.structs.replace(self, layers=tuple(layers))

    def padded(self) -> "ModelSpec":
        """The same model with heads as wide as the kernels for CUDA want them; a zero more changes nothing."""
        layers = (msgspec.structs.replace(layer, mixer=layer.mixer.padded()) for layer in self.layers)
        return msgspec.structs.replace(self, layers=tuple(layers))
