"""How a key or a value lies in the KV cache, as data: what it takes, and what it is called.

    dtype   as it is computed
    fp8     numbers of e4m3 (arXiv 2209.05433) times the scale of their head, which is a constant of the model
    int8    integers times a scale of their own position and head, which is kept beside them

Owns names and sizes; attention/pages.py has the arithmetic. Imports no torch.
"""

from msgspec import Struct

from graphgen.ipc.errors import ConfigError
from graphgen.models.spec.parts import DTYPE_BYTES


class KVFormat(Struct, frozen=True):
    """Of all layers' keys and values."""

    name: str  # a dtype, or a key of QUANTISED
    element_bytes: int
    scale_bytes: int = 0  # kept beside the elements of each position and head, for a key and for a value

    @property
    def quantised(self) -> bool:
        return self.name in QUANTISED

    def position_bytes(self, num_heads: int, width: int) -> int:
        """Of a key, or of a value, in so many heads of so many elements."""
        return num_heads * (width * self.element_bytes + self.scale_bytes)


QUANTISED = {
    "fp8": KVFormat("fp8", element_bytes=1),
    "int8": KVFormat("int8", element_bytes=1, scale_bytes=4),
}
_FORMATS = {**{dtype: KVFormat(dtype, size) for dtype, size in DTYPE_BYTES.items()}, **QUANTISED}


def kv_format(name: str) -> KVFormat:
    """Raises ConfigError for a name that no format has."""
    if name not in _FORMATS:
        raise ConfigError(f"the KV format is {name!r}, supported are {', '.join(_FORMATS)}: choose one of them")
    return _FORMATS[name]
