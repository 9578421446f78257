"""ModelSpec: everything about a model that the engine needs to know, as one frozen value.

Owns the Structs that describe a model layer by layer, and the sizes that follow from them. Never reads a file and
never imports torch, so that the spec can travel in a message and be used by processes without torch. Made by
families/reader.py from a Hugging Face config; read by the decoder, the loader, the KV cache and whoever sizes memory.

    ModelSpec   embedding, layers, final norm, head
    Layer       mixer (attention over earlier positions), feed-forward, their norms, how the residual runs

Every field has one meaning in arithmetic. A trait without a field is refused when the config is read.
"""

from graphgen.models.spec.feed_forwards import Dense, Experts, FeedForward, Router
from graphgen.models.spec.formats import LEAST_TILE, LinearFormat, LinearPlace, Quantization, format_at_load
from graphgen.models.spec.kv_formats import KVFormat, kv_format
from graphgen.models.spec.mixers import GQA, Alibi, Latent, Mixer, QKNorm
from graphgen.models.spec.model import EXPERTS, Embedding, Head, Layer, ModelSpec
from graphgen.models.spec.parts import DTYPE_BYTES, WHOLE, Norm, Shard, dtype_bytes
from graphgen.models.spec.rotations import NO_ROPE, RopeKind, RopeSpec, Temperature

__all__ = [
    "DTYPE_BYTES",
    "EXPERTS",
    "GQA",
    "LEAST_TILE",
    "NO_ROPE",
    "WHOLE",
    "Alibi",
    "Dense",
    "Embedding",
    "Experts",
    "FeedForward",
    "Head",
    "KVFormat",
    "Latent",
    "Layer",
    "LinearFormat",
    "LinearPlace",
    "Mixer",
    "ModelSpec",
    "Norm",
    "QKNorm",
    "Quantization",
    "RopeKind",
    "RopeSpec",
    "Router",
    "Shard",
    "Temperature",
    "dtype_bytes",
    "format_at_load",
    "kv_format",
]
