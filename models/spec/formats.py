"""How the weight of a linear layer is stored, as data. The tensors themselves are described in formats/layout.py."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from graphgen.ipc.errors import ConfigError
from graphgen.models.spec.parts import dtype_bytes

Storage = Literal["e4m3", "int8", "int4"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]

PACKED_BLOCK = 128
"""Columns of an int4 weight that are packed together, see formats/layout.py."""

LEAST_TILE = 16
"""Bytes of a row of experts' weights that a kernel reads at once, at least: LinearFormat.tile_bytes."""

LEAST_GROUP = 16
"""Columns of the narrowest group; what would need narrower ones has its weight in the model's dtype."""


class LinearFormat(Struct, frozen=True, kw_only=True):
    """A quantised weight [N, K]: weight[n, k] = (code[n, k] - zero) * scale, with one scale (and zero) for `rows` x
    `group` elements. A layer without a format has its weight in the model's dtype.

    group None, rows 1     one scale for each row ("channel")
    group G, rows 1        one for each G columns of a row
    group G, rows R        one for each block of R rows and G columns; published checkpoints have 128 x 128
    """

    storage: Storage
    group: Annotated[int, Meta(ge=1)] | None = None  # columns that share a scale; None: all
    rows: Annotated[int, Meta(ge=1)] = 1  # rows that share a scale
    scale_dtype: ScaleDtype = "float32"
    zeros: bool = False  # False: the zero is ZERO_CODES[storage]
    permuted: bool = False  # the weight's column k belongs to input permutation[k]
    activation: Literal["model", "e4m3"] = "model"
    """e4m3: where it is faster, the input may be rounded to e4m3 with a scale for each row. model: it may not, but see
    rounds_input."""

    @property
    def rounds_input(self) -> bool:
        """Whether the input of a step of many rows may be rounded to e4m3. Of int4 always: its own rounding is four
        times as coarse, and without it such a step would be slower than with a weight in bfloat16."""
        return self.activation == "e4m3" or self.storage == "int4"

    @property
    def name(self) -> str:
        """For people: "fp8", "fp8 128x128 (fp8 input)", "int4 g128 with zeros"."""
        grain = "" if self.group is None else f" {self.rows}x{self.group}" if self.rows > 1 else f" g{self.group}"
        rest = (" with zeros" if self.zeros else "") + (" reordered" if self.permuted else "")
        stored = "fp8" if self.storage == "e4m3" else self.storage
        return stored + grain + rest + (" (fp8 input)" if self.activation == "e4m3" else "")

    def check_shared(self, num_columns: int, num_ranks: int, what: str) -> None:
        """Raises ConfigError where ranks that each hold so many columns of a weight of this format could not keep it:
        each of their groups must lie in one stored group. `what` names the weight in the error."""
        if num_ranks == 1:
            return
        if self.permuted:
            raise ConfigError(
                f"{what} reads its input in an order of its own (g_idx), which {num_ranks} ranks cannot share: use a"
                " checkpoint without desc_act, or tensor_parallel=1"
            )
        width = self.group or LEAST_GROUP
        while width % 2 == 0 and width > LEAST_GROUP and num_columns % width:
            width //= 2
        odd = self.storage == "int4" and num_columns % 2
        if odd or (self.group is not None and num_columns % width):
            raise ConfigError(
                f"{what} is {self.name}, of which {num_ranks} ranks have {num_columns} columns each: they would cut its"
                " groups apart, use fewer ranks (tensor_parallel)"
            )

    def tile_bytes(self, num_columns: int, most: int) -> int:
        """Bytes of a row of so many columns that a kernel may read at once, so that all in them are of one group, and
        of int4 of one half of a block: a power of two, `most` or less."""
        sizes = [most]
        if self.group is not None and self.group < num_columns:
            sizes.append(self.group & -self.group)
        if self.storage == "int4":
            rest = num_columns % PACKED_BLOCK // 2
            sizes += [PACKED_BLOCK // 2, *([rest & -rest] if rest else [])]
        return min(sizes)

    def num_groups(self, num_columns: int) -> int:
        """Scales beside each other; the last group may be shorter than the others."""
        return 1 if self.group is None else -(-num_columns // self.group)

    def num_scales(self, num_rows: int, num_columns: int) -> int:
        return -(-num_rows // self.rows) * self.num_groups(num_columns)

    def num_bytes(self, num_rows: int, num_columns: int) -> int:
        """Memory of a weight [num_rows, num_columns] with all that belongs to it."""
        codes = num_rows * num_columns // (2 if self.storage == "int4" else 1)
        each = dtype_bytes(self.scale_dtype) + self.zeros
        return codes + each * self.num_scales(num_rows, num_columns) + 4 * num_columns * self.permuted


class LinearPlace(NamedTuple):
    """A linear layer of a block, whose format is the block's field `<name>_format`."""

    name: str
    num_rows: int  # N
    num_columns: int  # K
    format: LinearFormat | None

    def num_bytes(self, item_bytes: int) -> int:
        """Of its weight. item_bytes: of an element, where it has no format."""
        if self.format is not None:
            return self.format.num_bytes(self.num_rows, self.num_columns)
        return item_bytes * self.num_rows * self.num_columns


Choose = Callable[[LinearPlace], LinearFormat | None]
"""The format that a linear layer is to have; None: the model's dtype."""

Sizes = Mapping[str, tuple[int, int]]
"""Name of a linear layer in its block -> (N, K)."""

_Block = TypeVar("_Block", bound=Struct)


def places_of(block: Struct, sizes: Sizes, prefix: str = "") -> list[LinearPlace]:
    """The block's linear layers. prefix: of their names."""
    return [LinearPlace(prefix + name, *size, getattr(block, f"{name}_format")) for name, size in sizes.items()]


def with_formats(block: _Block, sizes: Sizes, choose: Choose, prefix: str = "") -> _Block:
    """The block with the chosen formats of its linear layers."""
    chosen = {f"{place.name.removeprefix(prefix)}_format": choose(place) for place in places_of(block, sizes, prefix)}
    return msgspec.structs.replace(block, **chosen)


# --- quantised as they are loaded ------------------------------------------------------------------------------

Quantization = Literal["fp8", "int8", "int4"]

_INT4_GROUPS = (128, 64, 32)


def format_at_load(kind: Quantization, num_columns: int) -> LinearFormat | None:
    """What a weight in floating point becomes where the user asks for `kind`; None: it has to stay as it is.

    int4 has the widest groups that divide the columns, since more than these are slower; zeros cost a byte a group and
    give what groups half as wide would.
    """
    match kind:
        case "fp8":
            return LinearFormat(storage="e4m3", activation="e4m3")
        case "int8":
            return LinearFormat(storage="int8")
        case "int4":
            groups = (group for group in _INT4_GROUPS if num_columns % group == 0)
            group = next(groups, _INT4_GROUPS[-1])
            form = LinearFormat(storage="int4", group=group, scale_dtype="bfloat16", zeros=True)
            return form if num_columns % 2 == 0 else None
