"""Msgpack by hand, one function per wire format, and the type of a vector.

Owns bytes that an encoder would not choose: a small number in eight bytes, a length that lies, a key that occurs twice.
Knows nothing of messages. Used by the modules of vectors.
"""

import struct
from typing import NamedTuple

NIL, FALSE, TRUE = b"\xc0", b"\xc2", b"\xc3"

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
"""What a vector says of a decoded value, as JSON has it. Bytes are {"bin": "hex"}."""


class Repeat(NamedTuple):
    """Bytes that occur many times in a row, so that a frame of a megabyte is a line."""

    piece: bytes
    times: int


Frame = bytes | list[Repeat]


class Vector(NamedTuple):
    """One message and what must come of it."""

    name: str
    frames: tuple[Frame, ...]
    meaning: str
    expect: str
    """`ok`, `ignore` (a kind that clients do not know), or the code of the error that answers it."""
    value: dict[str, Value] | None = None
    """The fields that the message carries; every other field has its default. None if it does not decode."""
    error_id: int | None = None
    """Of a refused message: the `id` that its error carries."""


def positive_fixint(number: int) -> bytes:
    assert 0 <= number < 128
    return bytes([number])


def negative_fixint(number: int) -> bytes:
    assert -32 <= number < 0
    return struct.pack("b", number)


def u8(number: int) -> bytes:
    return b"\xcc" + struct.pack(">B", number)


def u16(number: int) -> bytes:
    return b"\xcd" + struct.pack(">H", number)


def u32(number: int) -> bytes:
    return b"\xce" + struct.pack(">I", number)


def u64(number: int) -> bytes:
    return b"\xcf" + struct.pack(">Q", number)


def i8(number: int) -> bytes:
    return b"\xd0" + struct.pack(">b", number)


def i16(number: int) -> bytes:
    return b"\xd1" + struct.pack(">h", number)


def i32(number: int) -> bytes:
    return b"\xd2" + struct.pack(">i", number)


def i64(number: int) -> bytes:
    return b"\xd3" + struct.pack(">q", number)


def integer(number: int) -> bytes:
    """In the fewest bytes."""
    if number < 0:
        return negative_fixint(number) if number >= -32 else i64(number)
    if number < 128:
        return positive_fixint(number)
    for width, write in ((8, u8), (16, u16), (32, u32)):
        if number < 1 << width:
            return write(number)
    return u64(number)


def f32(number: float) -> bytes:
    return b"\xca" + struct.pack(">f", number)


def f64(number: float) -> bytes:
    return b"\xcb" + struct.pack(">d", number)


def text(value: str | bytes) -> bytes:
    """A str in the fewest bytes; of `bytes`, which need not be UTF-8."""
    data = value.encode() if isinstance(value, str) else value
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    if len(data) < 256:
        return str8(data)
    return str16(data)


def str8(data: bytes) -> bytes:
    return b"\xd9" + struct.pack(">B", len(data)) + data


def str16(data: bytes) -> bytes:
    return b"\xda" + struct.pack(">H", len(data)) + data


def str32(data: bytes) -> bytes:
    return b"\xdb" + struct.pack(">I", len(data)) + data


def bin8(data: bytes) -> bytes:
    return b"\xc4" + struct.pack(">B", len(data)) + data


def bin16(data: bytes) -> bytes:
    return b"\xc5" + struct.pack(">H", len(data)) + data


def bin32(data: bytes) -> bytes:
    return b"\xc6" + struct.pack(">I", len(data)) + data


def array(*items: bytes) -> bytes:
    if len(items) < 16:
        return bytes([0x90 | len(items)]) + b"".join(items)
    return array16(*items)


def array16(*items: bytes) -> bytes:
    return b"\xdc" + struct.pack(">H", len(items)) + b"".join(items)


def array32(*items: bytes) -> bytes:
    return b"\xdd" + struct.pack(">I", len(items)) + b"".join(items)


def mapping(*pairs: tuple[str, bytes]) -> bytes:
    """Of keys, which become strs, and values, which are bytes of msgpack already."""
    items = b"".join(text(key) + value for key, value in pairs)
    if len(pairs) < 16:
        return bytes([0x80 | len(pairs)]) + items
    return b"\xde" + struct.pack(">H", len(pairs)) + items


def map16(*pairs: tuple[str, bytes]) -> bytes:
    return b"\xde" + struct.pack(">H", len(pairs)) + b"".join(text(key) + value for key, value in pairs)


def map32(*pairs: tuple[str, bytes]) -> bytes:
    return b"\xdf" + struct.pack(">I", len(pairs)) + b"".join(text(key) + value for key, value in pairs)


def header(kind: str, major: int = 1) -> bytes:
    return b"GG" + bytes([major]) + kind.encode()


def without(pairs: tuple[tuple[str, bytes], ...], missing: str) -> tuple[tuple[str, bytes], ...]:
    return tuple(pair for pair in pairs if pair[0] != missing)
