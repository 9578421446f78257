"""Which quantised weights are multiplied in e4m3 with their codes as they lie; of others another weight is made first.

Pure: needs no Triton and no GPU. Called by products.py and the kernels behind it, and by few_rows_layers.py: the fused
kernels keep fewer rows where the compiled layers multiply so.
"""

from graphgen.models.spec.formats import PACKED_BLOCK, LinearFormat

BLOCK = 128
"""Columns of an input that share a scale, and rows and columns of a weight, where both are scaled in blocks."""


def is_by_rows(form: LinearFormat) -> bool:
    """Codes in e4m3 with one scale a row."""
    return form.storage == "e4m3" and (form.rows, form.group) == (1, None)


def is_by_blocks(form: LinearFormat) -> bool:
    """Codes in e4m3 with one scale for BLOCK x BLOCK of them."""
    return form.storage == "e4m3" and (form.rows, form.group) == (BLOCK, BLOCK)


def is_int4(group: int, rows: int) -> bool:
    """Codes in int4, of which `group` columns, or all (0), and `rows` rows share a scale. Each half of a block of codes
    has one then."""
    return rows == 1 and (group == PACKED_BLOCK // 2 or group % PACKED_BLOCK == 0)


def is_read(form: LinearFormat) -> bool:
    """Any of these."""
    return is_by_rows(form) or is_by_blocks(form) or (form.storage == "int4" and is_int4(form.group or 0, form.rows))
