"""One msgpack encoder and decoder per direction, and packed int32 arrays. Called by channel.py and both ends' loops."""

import sys
from array import array
from collections.abc import Iterable
from typing import Generic, TypeVar

import msgspec

Send = TypeVar("Send")
Receive = TypeVar("Receive")


class Codec(Generic[Send, Receive]):
    """Encodes one union of message types and decodes another.

    Anything that does not decode raises `msgspec.DecodeError` or `ValueError`, also bad UTF-8 and nesting bombs.
    """

    def __init__(self, receive_type: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Receive] = msgspec.msgpack.Decoder(receive_type)

    def encode(self, message: Send) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes) -> Receive:
        try:
            return self._decoder.decode(frame)
        except (UnicodeDecodeError, RecursionError) as error:
            # msgspec lets these two through as they are; one bad byte must not look like a different fault.
            raise msgspec.DecodeError(f"malformed message: {error}") from None


def pack_int32(values: Iterable[int]) -> bytes:
    """Little-endian int32 bytes. Raises OverflowError for a value outside int32."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int32(packed: bytes) -> "array[int]":
    """The ints of `pack_int32`. Raises ValueError when the length is no multiple of 4."""
    values = array("i")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values
