"""docs/models.md, its table made from the families' data.

    python -m graphgen.models.families.document docs/models.md

writes what stands between the two marks anew; a test holds that it is up to date.
"""

import sys
from pathlib import Path

from graphgen.models.families.family import Family
from graphgen.models.families.table import FAMILIES
from graphgen.models.spec import dtype_bytes

BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
_HEAD = "| class in config.json | model_type | checkpoints, GB of weights in bfloat16 | |\n|---|---|---|---|\n"


def table() -> str:
    """One row a family; variants of one class in one row each."""
    return _HEAD + "".join(map(_row, FAMILIES.values()))


def written(page: str) -> str:
    """A page with the table in its place. Raises ValueError where a mark is missing."""
    begin = page.index(BEGIN) + len(BEGIN)
    return page[:begin] + table() + page[page.index(END) :]


def _row(family: Family) -> str:
    name = f"`{family.architecture}`" + (f", {family.variant}" if family.variant else "")
    sizes = ", ".join(f"{checkpoint} {_gigabytes(billions)}" for checkpoint, billions in family.checkpoints.items())
    notes = [family.notes] if family.notes else []
    notes += [] if family.float16 else ["not in float16, whose range its activations leave"]
    return f"| {name} | `{family.model_type}` | {sizes} | {'; '.join(notes)} |\n"


def _gigabytes(billions: float) -> str:
    size = billions * dtype_bytes("bfloat16")
    return f"{size:.2g}" if size < 10 else f"{size:.0f}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written(path.read_text()))
