"""The few functions of NCCL that a communicator of two ranks needs, called in the library that torch has loaded.

torch's own process group cannot be used here: its communicators are torn down by a watchdog that may end the process.
Knows neither messages nor threads; every call acts on the calling thread's current device.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Final

import torch

from common.errors import FailedPrecondition, TransferError

UNIQUE_ID_BYTES: Final = 128
_SUCCESS: Final = 0
_IN_PROGRESS: Final = 7
_UINT8: Final = 1
_UNDEFINED: Final = -(1 << 31)
_CONFIG_MAGIC: Final = 0xCAFEBEEF
_CONFIG_VERSION: Final = 21700  # the layout of 2.17, which later releases go on to accept


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.17."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


class NcclError(TransferError):
    """A call of NCCL failed."""


class NcclLibrary:
    """The calls, with their results checked. A communicator is the address of NCCL's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.ncclGetErrorString.restype = ctypes.c_char_p
        library.ncclCommInitRankConfig.argtypes = [pointer, number, _UniqueId, number, pointer]
        library.ncclSend.argtypes = [pointer, size, number, number, pointer, pointer]
        library.ncclRecv.argtypes = [pointer, size, number, number, pointer, pointer]
        library.ncclCommGetAsyncError.argtypes = [pointer, pointer]
        library.ncclCommAbort.argtypes = [pointer]

    def unique_id(self) -> bytes:
        """What both ranks of a new communicator must name; this process answers for it while they meet."""
        found = _UniqueId()
        self._check(self._library.ncclGetUniqueId(ctypes.byref(found)), "get a unique id")
        return bytes(bytearray(found))

    def begin_init(self, unique_id: bytes, rank: int) -> int:
        """A communicator of two ranks in which no call blocks; use it once `in_progress` is false."""
        assert len(unique_id) == UNIQUE_ID_BYTES
        communicator = ctypes.c_void_p()
        config = _Config(
            ctypes.sizeof(_Config),
            _CONFIG_MAGIC,
            _CONFIG_VERSION,
            0,
            _UNDEFINED,
            _UNDEFINED,
            _UNDEFINED,
            None,
        )
        result = self._library.ncclCommInitRankConfig(
            ctypes.byref(communicator), 2, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._check(result, "open a communicator")
        return communicator.value or 0

    def in_progress(self, communicator: int) -> bool:
        """Whether the last call on the communicator is not through yet. Raises what it failed with."""
        result = ctypes.c_int()
        self._check(self._library.ncclCommGetAsyncError(communicator, ctypes.byref(result)), "ask for errors")
        self._check(result.value, "carry on")
        return result.value == _IN_PROGRESS

    def begin_send(self, communicator: int, peer: int, buffer: torch.Tensor, stream: int) -> None:
        """buffer: uint8 [num_bytes], lent until the stream has passed it."""
        result = self._library.ncclSend(buffer.data_ptr(), buffer.numel(), _UINT8, peer, communicator, stream)
        self._check(result, "send")

    def begin_receive(self, communicator: int, peer: int, buffer: torch.Tensor, stream: int) -> None:
        """buffer: uint8 [num_bytes], lent until the stream has passed it."""
        result = self._library.ncclRecv(buffer.data_ptr(), buffer.numel(), _UINT8, peer, communicator, stream)
        self._check(result, "receive")

    def abort(self, communicator: int) -> None:
        """End what is under way, kernels included, and free the communicator. The peer is not asked."""
        self._check(self._library.ncclCommAbort(communicator), "abort")

    def _check(self, result: int, action: str) -> None:
        if result not in (_SUCCESS, _IN_PROGRESS):
            reason = self._library.ncclGetErrorString(result)
            raise NcclError(f"NCCL could not {action}: {reason.decode()}")


@cache
def nccl_library() -> NcclLibrary:
    """Raises `FailedPrecondition` where torch has no NCCL or there is no GPU."""
    if not torch.cuda.is_available():
        raise FailedPrecondition("nccl:// needs a GPU, and torch sees none")
    # Between two devices of one process NCCL would write straight into the receiver's buffer, and the receiver's abort
    # could not stop that. Between processes a buffer of NCCL's own lies in between, and this changes nothing.
    os.environ.setdefault("NCCL_P2P_DIRECT_DISABLE", "1")
    try:
        return NcclLibrary(ctypes.CDLL("libnccl.so.2"))
    except OSError as error:
        raise FailedPrecondition(f"nccl:// needs a torch with NCCL: {error}") from error
