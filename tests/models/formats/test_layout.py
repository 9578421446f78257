"""The layout of quantised weights is the one that its module writes down."""

import pytest
import torch

from graphgen.models.formats.layout import Quantised, dequantised, pack_int4, scale_shape, unpack_int4
from graphgen.models.spec.formats import LinearFormat


@pytest.mark.parametrize("num_columns", [2, 64, 126, 128, 130, 192, 256, 704])
def test_int4_codes_come_back_whatever_the_columns(num_columns: int) -> None:
    codes = torch.randint(0, 16, (3, num_columns), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (3, num_columns // 2)
    assert torch.equal(unpack_int4(packed), codes)


@pytest.mark.parametrize(
    ("num_columns", "column"), [(256, 0), (256, 63), (256, 64), (256, 200), (320, 256), (320, 300)]
)
def test_a_code_lies_where_the_layout_says(num_columns: int, column: int) -> None:
    codes = torch.zeros(1, num_columns, dtype=torch.uint8)
    codes[0, column] = 9
    block, place = divmod(column, 128)
    half = min(128, num_columns - 128 * block) // 2
    high, byte = divmod(place, half)
    expected = torch.zeros(1, num_columns // 2, dtype=torch.uint8)
    expected[0, 64 * block + byte] = 9 << 4 * high
    assert torch.equal(pack_int4(codes), expected)


def test_an_odd_number_of_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="has 5 columns, which must be even"):
        pack_int4(torch.zeros(2, 5, dtype=torch.uint8))


FORMATS = {
    "channel": LinearFormat(storage="e4m3"),
    "block": LinearFormat(storage="e4m3", group=4, rows=4),
    "group": LinearFormat(storage="int4", group=4),
    "group with zeros": LinearFormat(storage="int4", group=4, zeros=True),
    "reordered": LinearFormat(storage="int4", group=4, permuted=True),
    "int8 with zeros": LinearFormat(storage="int8", zeros=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_code_less_zero_times_scale(name: str) -> None:
    """Against the formula, element by element; the last rows and columns are no whole block."""
    form, num_rows, num_columns = FORMATS[name], 6, 10
    least, most = (0, 16) if form.storage == "int4" else (-8, 8)
    codes = torch.randint(least, most, (num_rows, num_columns)).to(
        {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[form.storage]
    )
    shape = scale_shape(form, num_rows, num_columns)
    scale = torch.rand(shape) + 0.5
    zeros = torch.randint(0, 16, shape).to(codes.dtype) if form.zeros else None
    permutation = torch.randperm(num_columns, dtype=torch.int32) if form.permuted else None
    made = dequantised(Quantised(form, codes, scale, zeros, permutation), torch.float32)
    for row in range(num_rows):
        for column in range(num_columns):
            place = row // form.rows, 0 if form.group is None else column // form.group
            zero = (8 if form.storage == "int4" else 0) if zeros is None else float(zeros[place])
            expected = (float(codes[row, column].float()) - zero) * float(scale[place])
            of_input = column if permutation is None else int(permutation[column])
            assert float(made[row, of_input]) == pytest.approx(expected, rel=1e-6)


def test_bytes_are_those_of_the_tensors() -> None:
    form = LinearFormat(storage="int4", group=64, scale_dtype="bfloat16", zeros=True)
    assert form.num_bytes(96, 200) == 96 * 100 + 96 * 4 * (2 + 1)
    assert LinearFormat(storage="e4m3", group=128, rows=128).num_bytes(200, 300) == 200 * 300 + 2 * 3 * 4
