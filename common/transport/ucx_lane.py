"""Which transport UCX really uses for the large messages of an endpoint, read from UCX's own protocol table.

UCX has no call for this that `ucxx` exposes, so the table that `ucp_ep_print_info` prints is captured and read.
"""

from __future__ import annotations

import ctypes
import re

UNKNOWN_LANE = "unknown"
_TABLE = re.compile(r"tagged message by ucp_tag_send\*? from (\w+)")
_ROW = re.compile(r"\.\.inf\s*\|[^|]*\|\s*([^|]+?)\s*\|")
_HOST_ONLY = frozenset({"tcp", "sysv", "posix", "cma", "xpmem", "self"})  # cannot touch the memory of a GPU
_LANE = re.compile(r"lane\[\d+\]:\s+\d+:(\w+)/")


def lane_of(endpoint_handle: int, memory: str) -> str:
    """Transports of a bulk send from `memory` (`host` or `cuda`): `tcp`, `cuda_ipc`, `rc_mlx5`; joined with `+`."""
    return parse_lane(_endpoint_info(endpoint_handle), memory)


def parse_lane(info: str, memory: str) -> str:
    """Read the last row (sizes up to infinity) of the send table; before it exists, the lanes for bulk data."""
    for table in re.split(r"\n#?\s*\n", info):
        title = _TABLE.search(table)
        row = _ROW.search(table)
        if title and row and title[1] == memory:
            return "+".join(dict.fromkeys(re.findall(r"(\w+)/\w+", row[1]))) or UNKNOWN_LANE
    bulk = [lane[1] for line in info.splitlines() if "_bw" in line and (lane := _LANE.search(line))]
    fitting = [lane for lane in bulk if lane not in _HOST_ONLY] if memory == "cuda" else bulk
    return "+".join(dict.fromkeys(fitting or bulk)) or UNKNOWN_LANE


def _endpoint_info(endpoint_handle: int) -> str:
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    libc.free.argtypes = [ctypes.c_void_p]
    ucp = ctypes.CDLL("libucp.so.0")
    ucp.ucp_ep_print_info.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    ucp.ucp_ep_print_info(endpoint_handle, stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text.value or 0, size.value).decode(errors="replace")
    finally:
        libc.free(text)
