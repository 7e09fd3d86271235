"""A rank's KV blocks as one tensor, and how they enter and leave staging slots.

    slot: | header, 64 bytes (`slot_header`) | payload [layers, blocks, 2, heads, block_size, head_dim] |

Received bytes are checked before any block is written. On a GPU the device does both, headers included, and the host
waits for neither: it learns what the check found when the work is done. Knows neither transports nor which sequence
owns a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from common.errors import DigestMismatch, InternalError, Truncated
from common.kernels.backend import KernelBackend, kernels_for
from common.kernels.batch import KVShape
from common.kvcache.device_queue import DeviceQueue, DeviceWork
from common.kvcache.layout import HEADER_BYTES
from common.kvcache.slot_header import DIGEST_OFFSET, check_digest, checked_digest, encode_header

_WORD_BYTES: Final = 8
_HEADER_WORDS: Final = HEADER_BYTES // _WORD_BYTES
_DIGEST_WORD: Final = DIGEST_OFFSET // _WORD_BYTES


@runtime_checkable
class SlotsOnDevice(Protocol):
    """What a kernel backend has beyond `KernelBackend` if headers and digests can stay on the device.

    See `common.kernels.triton_blocks`; nothing is waited for.
    """

    def gather_slot(
        self,
        kv: torch.Tensor,
        words: torch.Tensor,
        first_head: int,
        num_heads: int,
        slot: torch.Tensor,
        scratch: torch.Tensor,
        /,
    ) -> None: ...

    def scatter_slot(
        self,
        kv: torch.Tensor,
        words: torch.Tensor,
        first_head: int,
        num_heads: int,
        slot: torch.Tensor,
        scratch: torch.Tensor,
        report: torch.Tensor,
        /,
    ) -> None: ...


class KVStorage:
    """The KV cache of the layers and heads of one rank.

    `kv`: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]. Blocks that a step reads or writes must not
    be scattered to at the same time; the front, which owns the block table, sees to that.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelBackend | None = None,
    ) -> None:
        # Zeros rather than garbage: attention masks what lies beyond a context, but reads it.
        self.kv = torch.zeros(
            (num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim), dtype=dtype, device=device
        )
        self._kernels = kernels_for(device) if kernels is None else kernels
        self._queue = DeviceQueue(device)
        self._scratch = torch.zeros(2, dtype=torch.int64, device=device)  # of launches, which follow each other
        self._report = torch.zeros(_HEADER_WORDS + 2, dtype=torch.int64, device=device)  # of the last slot's check

    @property
    def shape(self) -> KVShape:
        """The shape of one layer."""
        _, num_blocks, _, num_kv_heads, block_size, head_dim = self.kv.shape
        return KVShape(num_blocks, num_kv_heads, block_size, head_dim)

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes

    def leg_bytes(self, num_blocks: int, num_heads: int, layers: range | None = None) -> int:
        """Bytes that `gather` writes of these layers [all], header included."""
        num_layers = self.kv.shape[0] if layers is None else len(layers)
        _, _, _, _, block_size, head_dim = self.kv.shape
        return HEADER_BYTES + num_layers * num_blocks * 2 * num_heads * block_size * head_dim * self.kv.itemsize

    def gather(
        self,
        block_ids: Sequence[int],
        first_local_head: int,
        num_heads: int,
        slot: torch.Tensor,
        tag: int,
        layers: range | None = None,
    ) -> int:
        """Write header and payload to the front of `slot`; returns their bytes once they are there.

        slot: uint8 [at least `leg_bytes`], contiguous, 8-byte aligned, on the storage's device. `tag`: uint64, checked
        by `scatter`. `layers`: a run of them [all]. Live blocks stay as they are; what the step that wrote them does to
        these layers must be complete. Calls of `gather` and `scatter` must not overlap; they may come from any thread.
        """
        self.start_gather(block_ids, first_local_head, num_heads, slot, tag, layers).wait()
        return self.leg_bytes(len(block_ids), num_heads, layers)

    def start_gather(
        self,
        block_ids: Sequence[int],
        first_local_head: int,
        num_heads: int,
        slot: torch.Tensor,
        tag: int,
        layers: range | None = None,
    ) -> DeviceWork:
        """`gather` without waiting for the device: slot and blocks are lent until the work is done."""
        num_bytes = self.leg_bytes(len(block_ids), num_heads, layers)
        if slot.numel() < num_bytes:
            raise InternalError(f"{num_bytes} bytes do not fit into a slot of {slot.numel()}")
        kv = self._part(block_ids, first_local_head, num_heads, layers)
        header = encode_header(tag, num_bytes - HEADER_BYTES, 0)
        with self._queue.entered():
            words = self._queue.upload(_words(header, block_ids))
            if isinstance(self._kernels, SlotsOnDevice):
                slot_words = slot[:num_bytes].view(torch.int64)
                self._kernels.gather_slot(kv, words, first_local_head, num_heads, slot_words, self._scratch)
            else:
                payload = _payload(kv, slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
                ids = words[_HEADER_WORDS:]
                words[_DIGEST_WORD] = _signed(
                    self._kernels.gather_blocks(kv, ids, first_local_head, num_heads, payload)
                )
                slot[:HEADER_BYTES].view(torch.int64).copy_(words[:_HEADER_WORDS])
            return self._queue.mark()

    def scatter(
        self,
        block_ids: Sequence[int],
        first_local_head: int,
        num_heads: int,
        slot: torch.Tensor,
        expected_tag: int,
        layers: range | None = None,
    ) -> None:
        """Check `slot`, uint8 [the bytes that arrived], then write its payload to heads of blocks, and wait for that.

        Raises `Truncated` (too few bytes, or the header says another size) or `DigestMismatch` (not the bytes that
        were gathered for this tag). No block is written then.
        """
        work = self.start_scatter(block_ids, first_local_head, num_heads, slot, expected_tag, layers)
        work.wait()
        work.result()

    def start_scatter(
        self,
        block_ids: Sequence[int],
        first_local_head: int,
        num_heads: int,
        slot: torch.Tensor,
        expected_tag: int,
        layers: range | None = None,
    ) -> DeviceWork:
        """`scatter` without waiting for a GPU: what the check finds is the outcome of the work."""
        num_bytes = self.leg_bytes(len(block_ids), num_heads, layers)
        kv = self._part(block_ids, first_local_head, num_heads, layers)
        if slot.numel() < num_bytes:
            raise Truncated(f"{slot.numel()} bytes arrived, {num_bytes} were expected")
        payload_bytes = num_bytes - HEADER_BYTES
        with self._queue.entered():
            words = self._queue.upload(_words(encode_header(expected_tag, payload_bytes, 0), block_ids))
            if isinstance(self._kernels, SlotsOnDevice):
                slot_words = slot[:num_bytes].view(torch.int64)
                self._kernels.scatter_slot(
                    kv, words, first_local_head, num_heads, slot_words, self._scratch, self._report
                )
                return self._queue.download(
                    self._report, lambda report: _judge(report.tobytes(), expected_tag, payload_bytes)
                )
            payload = _payload(kv, slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
            announced = checked_digest(slot[:HEADER_BYTES].cpu().numpy().tobytes(), expected_tag, payload_bytes)
            check_digest(self._kernels.payload_digest(payload), announced)
            self._kernels.scatter_blocks(kv, words[_HEADER_WORDS:], first_local_head, num_heads, payload)
            return self._queue.mark()

    def _part(self, block_ids: Sequence[int], first_head: int, num_heads: int, layers: range | None) -> torch.Tensor:
        """`kv` of these layers alone. Checks everything: a wrong id would write into somebody else's memory."""
        num_layers, num_blocks, _, num_kv_heads, _, _ = self.kv.shape
        layers = range(num_layers) if layers is None else layers
        if not 0 <= layers.start < layers.stop <= num_layers or layers.step != 1:
            raise InternalError(f"layers [{layers.start}, {layers.stop}) are not within {num_layers}")
        if not block_ids or not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
            raise InternalError(f"block ids {list(block_ids)[:8]} are not within {num_blocks} blocks")
        if not (first_head >= 0 and num_heads >= 1 and first_head + num_heads <= num_kv_heads):
            raise InternalError(
                f"heads [{first_head}, {first_head + num_heads}) are not within {num_kv_heads} KV heads"
            )
        return self.kv[layers.start : layers.stop]


def _payload(kv: torch.Tensor, part: torch.Tensor, num_blocks: int, num_heads: int) -> torch.Tensor:
    """The bytes of a slot seen as K and V of blocks of these layers."""
    num_layers, _, _, _, block_size, head_dim = kv.shape
    return part.view(kv.dtype).view(num_layers, num_blocks, 2, num_heads, block_size, head_dim)


def _words(header: bytearray, block_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """The header, then the block ids: [_HEADER_WORDS + n], so that one copy takes both to the device."""
    return np.concatenate((np.frombuffer(header, dtype=np.int64), np.array(block_ids, dtype=np.int64)))


def _judge(report: bytes, expected_tag: int, payload_bytes: int) -> None:
    """Raise what a device found wrong. report: a slot's header, the digest of its payload, whether it was scattered."""
    announced = checked_digest(report, expected_tag, payload_bytes)
    digest, scattered = np.frombuffer(report[HEADER_BYTES:], dtype=np.uint64).tolist()
    check_digest(digest, announced)
    if not scattered:
        raise DigestMismatch(f"the slot's header has bytes that mean nothing: {report[:HEADER_BYTES].hex()}")


def _signed(digest: int) -> int:
    """The int64 with the bits of a number in [0, 2^64)."""
    return digest - (digest >> 63 << 64)
