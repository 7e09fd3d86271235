"""A rank's KV blocks as one tensor, and how they enter and leave staging slots.

    slot: | header, 64 bytes (`slot_header`) | payload [layers, blocks, 2, heads, block_size, head_dim] |

Received bytes are checked before any block is written. On a GPU the device does both, headers included, and the host
waits for neither: it learns what the check found when the work is done. Knows neither transports nor which sequence
owns a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch

from common.errors import DigestMismatch, InternalError, Truncated
from common.kernels.backend import KernelBackend, kernels_for
from common.kernels.batch import KVShape
from common.kernels.blocks_reference import HEADER_WORDS, REPORT_WORDS, SCRATCH_WORDS
from common.kvcache.device_queue import DeviceQueue, DeviceWork, Parcel
from common.kvcache.layout import HEADER_BYTES
from common.kvcache.slot_header import DIGEST_OFFSET, check_digest, checked_digest, encode_header

_WORD_BYTES: Final = 8
_DIGEST_WORD: Final = DIGEST_OFFSET // _WORD_BYTES
assert HEADER_WORDS * _WORD_BYTES == HEADER_BYTES, "kernels and transports mean the same header"


@runtime_checkable
class SlotsOnDevice(Protocol):
    """What a kernel backend has beyond `KernelBackend` if headers and digests can stay on the device.

    See `common.kernels.triton_blocks`; nothing is waited for.
    """

    def gather_slot(
        self,
        kv: torch.Tensor,
        words: torch.Tensor,
        num_ids: int,
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
        num_ids: int,
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
        # Asked once: looking for methods takes as long as a launch.
        self._on_device = self._kernels if isinstance(self._kernels, SlotsOnDevice) else None
        self._queue = DeviceQueue(device, REPORT_WORDS)
        self._scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=device)  # launches follow each other
        self._head_bytes = block_size * head_dim * self.kv.itemsize  # of K or V of a block
        self._parts: dict[tuple[int, int], torch.Tensor] = {}  # `kv` of runs of layers

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
        return HEADER_BYTES + num_layers * num_blocks * 2 * num_heads * self._head_bytes

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
        kv, ids = self._part(first_local_head, num_heads, layers), self._ids(block_ids)
        header = encode_header(tag, num_bytes - HEADER_BYTES, 0)
        if self._on_device is not None:
            with self._queue.entered():
                parcel = self._sent(header, ids)
                try:
                    self._on_device.gather_slot(
                        kv, parcel.words, len(block_ids), first_local_head, num_heads, slot, self._scratch
                    )
                finally:
                    work = self._queue.mark(parcel)
                return work
        with torch.inference_mode(), self._queue.entered():
            parcel = self._sent(header, ids)
            words = parcel.words[: HEADER_WORDS + len(block_ids)]
            payload = _payload(kv, slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
            words[_DIGEST_WORD] = _signed(
                self._kernels.gather_blocks(kv, words[HEADER_WORDS:], first_local_head, num_heads, payload)
            )
            slot[:HEADER_BYTES].view(torch.int64).copy_(words[:HEADER_WORDS])
            return self._queue.mark(parcel)

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
        kv, ids = self._part(first_local_head, num_heads, layers), self._ids(block_ids)
        if slot.numel() < num_bytes:
            raise Truncated(f"{slot.numel()} bytes arrived, {num_bytes} were expected")
        payload_bytes = num_bytes - HEADER_BYTES
        header = encode_header(expected_tag, payload_bytes, 0)
        if self._on_device is not None:
            with self._queue.entered():
                parcel = self._sent(header, ids)
                try:
                    self._on_device.scatter_slot(
                        kv, parcel.words, len(block_ids), first_local_head, num_heads, slot, self._scratch,
                        parcel.report,
                    )  # fmt: skip
                finally:  # what was launched before an error still writes into the parcel
                    work = self._queue.mark(parcel, lambda report: _judge(report, expected_tag, payload_bytes))
                return work
        with torch.inference_mode(), self._queue.entered():
            payload = _payload(kv, slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
            announced = checked_digest(slot[:HEADER_BYTES].cpu().numpy().tobytes(), expected_tag, payload_bytes)
            check_digest(self._kernels.payload_digest(payload), announced)
            parcel = self._sent(header, ids)
            device_ids = parcel.words[HEADER_WORDS : HEADER_WORDS + len(block_ids)]
            self._kernels.scatter_blocks(kv, device_ids, first_local_head, num_heads, payload)
            return self._queue.mark(parcel)

    def _sent(self, header: bytearray, ids: bytes) -> Parcel:
        """Header, then block ids, on their way to the device in one copy."""
        end = HEADER_BYTES + len(ids)
        parcel = self._queue.parcel(end // _WORD_BYTES)
        parcel.host[:HEADER_BYTES] = header
        parcel.host[HEADER_BYTES:end] = ids
        parcel.send()
        return parcel

    def _part(self, first_head: int, num_heads: int, layers: range | None) -> torch.Tensor:
        """`kv` of these layers alone. Checks that layers and heads are the storage's."""
        num_layers, _, _, num_kv_heads, _, _ = self.kv.shape
        start, stop, step = (0, num_layers, 1) if layers is None else (layers.start, layers.stop, layers.step)
        if not 0 <= start < stop <= num_layers or step != 1:
            raise InternalError(f"layers [{start}, {stop}) are not within {num_layers}")
        if not (first_head >= 0 and num_heads >= 1 and first_head + num_heads <= num_kv_heads):
            raise InternalError(
                f"heads [{first_head}, {first_head + num_heads}) are not within {num_kv_heads} KV heads"
            )
        part = self._parts.get((start, stop))
        if part is None:
            part = self._parts[start, stop] = self.kv[start:stop]
        return part

    def _ids(self, block_ids: Sequence[int]) -> bytes:
        """As int64. Checks every one: a wrong id would write into somebody else's memory."""
        num_blocks = self.kv.shape[1]
        if not block_ids or not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
            raise InternalError(f"block ids {list(block_ids)[:8]} are not within {num_blocks} blocks")
        return array("q", block_ids).tobytes()


def _payload(kv: torch.Tensor, part: torch.Tensor, num_blocks: int, num_heads: int) -> torch.Tensor:
    """The bytes of a slot seen as K and V of blocks of these layers."""
    num_layers, _, _, _, block_size, head_dim = kv.shape
    return part.view(kv.dtype).view(num_layers, num_blocks, 2, num_heads, block_size, head_dim)


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
