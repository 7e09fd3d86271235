"""Confines a listening TCP socket of a library to one of this machine's IPv4 addresses, when it can listen on all only.

A socket filter drops the first packet of every connection to another address, as if nobody listened there. Knows no
transport.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Final

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; Python has no name for it
_DESTINATION: Final = 0xFFF00000 + 16  # SKF_NET_OFF: from the start of the IPv4 header
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_WHOLE_PACKET: Final = 0xFFFFFFFF


def confine_listener(port: int, address: str) -> bool:
    """Let this process's listener on `port` take connections to the IPv4 `address` only. False if it was not found, or
    the kernel has no such filters."""
    (destination,) = struct.unpack("!I", socket.inet_aton(address))
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, _DESTINATION),
            (_JUMP_EQUAL, 0, 1, destination),
            (_RETURN, 0, 0, _WHOLE_PACKET),
            (_RETURN, 0, 0, 0),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    found = False
    for listener in _listeners(port):
        try:
            # struct sock_fprog: the number of instructions, and where they are
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(code)))
        except OSError:
            return False
        found = True
    return found


def _listeners(port: int) -> Iterator[socket.socket]:
    """Listening sockets of this process, as duplicates that are closed behind the caller."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if is_listening and one.family == socket.AF_INET and one.getsockname()[1] == port:
                    yield one
