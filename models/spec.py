"""ModelSpec: everything about a model that the engine needs to know, as one frozen value.

Owns the two Structs and the sizes that follow from them. Never reads a file and never imports torch, so that
the spec can travel in a message and be used by processes without torch. Made by families.py from a Hugging
Face config; read by the decoder, the loader, the KV cache and whoever sizes memory.
"""

from typing import Literal

from msgspec import Struct

from graphgen.ipc.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes weights and KV pages may have, and the size of one element."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ConfigError for a dtype that no weight or KV page may have."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {dtype!r}, supported are {', '.join(DTYPE_BYTES)}: choose one of them")
    return DTYPE_BYTES[dtype]


class RopeSpec(Struct, frozen=True):
    """How positions become rotations; rope.py has the formula of each kind. Unused numbers keep their
    default."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_len: int = 0  # dynamic, llama3, yarn: context length before scaling
    attention_factor: float = 1.0  # yarn: scales cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's bounds to whole dimensions


class ModelSpec(Struct, frozen=True):
    """A decoder-only transformer with pre-norm blocks, gated MLPs and rotary positions."""

    architecture: str  # the Hugging Face class name, a key of families.FAMILIES
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    activation: str  # a key of layers.ACTIVATIONS
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before the rotation
    tie_embeddings: bool
    rope: RopeSpec
    windows: tuple[int | None, ...]  # of each layer: positions a row sees, its own included; None sees all
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint, a key of DTYPE_BYTES
    initializer_std: float

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights held in memory: tied embeddings count once."""
        qkv_size = self.q_size + 2 * self.kv_size
        attention = self.hidden_size * (qkv_size + self.q_size)
        attention += self.qkv_bias * qkv_size + self.o_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.ffn_size
        mlp += self.mlp_bias * (2 * self.ffn_size + self.hidden_size)
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def weight_bytes(self, dtype: str) -> int:
        """Memory of the weights in `dtype`."""
        return self.num_parameters * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV memory of one position over all layers in `dtype`."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes(dtype)
