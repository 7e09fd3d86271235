"""A rank's KV blocks as one tensor, and how they enter and leave staging slots.

    slot: | header, 64 bytes | payload [num_layers, num_blocks, 2, num_heads, block_size, head_dim], contiguous |
    header, little-endian: magic 8s | version u32 | 0 u32 | tag u64 | payload bytes u64 | digest u64 | zeros

Received bytes are checked before any block is written. Knows neither transports nor which sequence owns a block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import torch

from common.errors import DigestMismatch, InternalError, Truncated
from common.kernels.backend import kernels_for
from common.kernels.batch import KVShape
from common.kvcache.layout import HEADER_BYTES

PAYLOAD_VERSION: Final = 1
_MAGIC: Final = b"BATON-KV"
_HEADER: Final = struct.Struct("<8sIIQQQ")


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
    ) -> None:
        # Zeros rather than garbage: attention masks what lies beyond a context, but reads it.
        self.kv = torch.zeros(
            (num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim), dtype=dtype, device=device
        )
        self._kernels = kernels_for(device)

    @property
    def shape(self) -> KVShape:
        """The shape of one layer."""
        _, num_blocks, _, num_kv_heads, block_size, head_dim = self.kv.shape
        return KVShape(num_blocks, num_kv_heads, block_size, head_dim)

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes

    def leg_bytes(self, num_blocks: int, num_heads: int) -> int:
        """Bytes that `gather` writes, header included."""
        num_layers, _, _, _, block_size, head_dim = self.kv.shape
        return HEADER_BYTES + num_layers * num_blocks * 2 * num_heads * block_size * head_dim * self.kv.itemsize

    @torch.inference_mode()
    def gather(
        self, block_ids: Sequence[int], first_local_head: int, num_heads: int, slot: torch.Tensor, tag: int
    ) -> int:
        """Write header and payload to the front of `slot`; returns their bytes. Live blocks stay as they are.

        slot: uint8 [at least `leg_bytes`], contiguous, on the storage's device. `tag`: uint64, checked by `scatter`.
        """
        num_bytes = self.leg_bytes(len(block_ids), num_heads)
        if slot.numel() < num_bytes:
            raise InternalError(f"{num_bytes} bytes do not fit into a slot of {slot.numel()}")
        ids = self._checked(block_ids, first_local_head, num_heads)
        payload = self._payload(slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
        digest = self._kernels.gather_blocks(self.kv, ids, first_local_head, num_heads, payload)
        header = _HEADER.pack(_MAGIC, PAYLOAD_VERSION, 0, tag, num_bytes - HEADER_BYTES, digest)
        padded = bytearray(header.ljust(HEADER_BYTES, b"\0"))
        slot[:HEADER_BYTES].copy_(torch.frombuffer(padded, dtype=torch.uint8))
        return num_bytes

    @torch.inference_mode()
    def scatter(
        self,
        block_ids: Sequence[int],
        first_local_head: int,
        num_heads: int,
        slot: torch.Tensor,
        expected_tag: int,
    ) -> None:
        """Check `slot`, uint8 [the bytes that arrived], then write its payload to heads of blocks.

        Raises `Truncated` (too few bytes, or the header says another size) or `DigestMismatch` (not the bytes that
        were gathered for this tag). No block is written then.
        """
        num_bytes = self.leg_bytes(len(block_ids), num_heads)
        ids = self._checked(block_ids, first_local_head, num_heads)
        if slot.numel() < num_bytes:
            raise Truncated(f"{slot.numel()} bytes arrived, {num_bytes} were expected")
        digest = _checked_header(slot[:HEADER_BYTES], expected_tag, num_bytes - HEADER_BYTES)
        payload = self._payload(slot[HEADER_BYTES:num_bytes], len(block_ids), num_heads)
        actual = self._kernels.payload_digest(payload)
        if actual != digest:
            raise DigestMismatch(f"payload digest {actual:016x}, the header says {digest:016x}")
        self._kernels.scatter_blocks(self.kv, ids, first_local_head, num_heads, payload)

    def _payload(self, part: torch.Tensor, num_blocks: int, num_heads: int) -> torch.Tensor:
        """The bytes of a slot seen as K and V of blocks."""
        num_layers, _, _, _, block_size, head_dim = self.kv.shape
        return part.view(self.kv.dtype).view(num_layers, num_blocks, 2, num_heads, block_size, head_dim)

    def _checked(self, block_ids: Sequence[int], first_head: int, num_heads: int) -> torch.Tensor:
        """[n] int64 on the device; a wrong id here would write into somebody else's memory."""
        _, num_blocks, _, num_kv_heads, _, _ = self.kv.shape
        if not block_ids or not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
            raise InternalError(f"block ids {list(block_ids)[:8]} are not within {num_blocks} blocks")
        if not (first_head >= 0 and num_heads >= 1 and first_head + num_heads <= num_kv_heads):
            raise InternalError(
                f"heads [{first_head}, {first_head + num_heads}) are not within {num_kv_heads} KV heads"
            )
        return torch.tensor(list(block_ids), dtype=torch.int64, device=self.kv.device)


def _checked_header(header: torch.Tensor, expected_tag: int, payload_bytes: int) -> int:
    """header: uint8 [HEADER_BYTES]. Returns the digest that the sender computed."""
    raw = header.cpu().numpy().tobytes()
    magic, version, _, tag, num_bytes, digest = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != PAYLOAD_VERSION:
        raise DigestMismatch(
            f"the slot starts with {raw[:12].hex()}, which is no KV payload of version {PAYLOAD_VERSION}"
        )
    if tag != expected_tag:
        raise DigestMismatch(f"the payload carries tag {tag:016x}, expected {expected_tag:016x}")
    if num_bytes != payload_bytes:
        raise Truncated(f"the header announces {num_bytes} bytes, {payload_bytes} were expected")
    assert isinstance(digest, int)
    return digest
