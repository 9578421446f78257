"""A filter on a listening TCP socket: the kernel drops connection attempts of some addresses before anyone sees them.

Pure but for `set_filter`. A dropped attempt is repeated by the peer's kernel after 1, 3, 7 seconds, so that it waits
and is not refused. Connections that exist are left alone. Linux's classic BPF, which needs no privilege.
"""

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Iterable

MOST_ADDRESSES = 256
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP, _JUMP_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x05, 0x15, 0x06
_NETWORK_HEADER = -0x100000 & 0xFFFFFFFF
"""SKF_NET_OFF: loads relative to the IP header, where a TCP socket's filter begins at the TCP header."""
_PASS, _DROP = 0xFFFFFFFF, 0

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand"""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def set_filter(listening: socket.socket, shut_out: Iterable[str] | None) -> None:
    """Drops attempts of these addresses; of all with None, of nobody without any. Raises OSError where it cannot."""
    instructions = filter_program(shut_out)
    if not instructions:
        listening.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, bytes(4))
        return
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    program = _Program(len(instructions), ctypes.addressof(packed))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))


def filter_program(shut_out: Iterable[str] | None) -> list[Instruction]:
    """The filter's instructions; none when everyone is let in."""
    if shut_out is None:
        return [(_RETURN, 0, 0, _DROP)]
    addresses = [ipaddress.ip_address(text) for text in shut_out]
    if not addresses:
        return []
    version4 = _version4_tests([int(one) for one in addresses if one.version == 4])
    version6 = [test for one in addresses if one.version == 6 for test in _version6_test(int(one))]
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_EQUAL, 0, 1, 6),
        (_JUMP, 0, 0, len(version4)),  # version 6 passes over the tests of version 4
        *version4,
        *version6,
        (_RETURN, 0, 0, _PASS),
    ]


def _version4_tests(addresses: list[int]) -> list[Instruction]:
    tests: list[Instruction] = [(_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12 & 0xFFFFFFFF)]
    for address in addresses:
        tests += [(_JUMP_EQUAL, 0, 1, address), (_RETURN, 0, 0, _DROP)]
    return [*tests, (_RETURN, 0, 0, _PASS)]


def _version6_test(address: int) -> list[Instruction]:
    """Drops one address: four words of it are compared in turn."""
    test: list[Instruction] = []
    for word in range(4):
        test.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + 8 + 4 * word & 0xFFFFFFFF))
        test.append((_JUMP_EQUAL, 0, 7 - 2 * word, address >> (96 - 32 * word) & 0xFFFFFFFF))
    return [*test, (_RETURN, 0, 0, _DROP)]
