"""What is measured of one hand-off, and what became of each attempt at a chunk. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.prefill.chunk_shapes import ChunkShape


@dataclass(frozen=True, slots=True)
class Shipment:
    """One attempt at one chunk. `granted_ns` is 0 if decode did not grant it; `begun_ns`: granted, and computed."""

    chunk_index: int
    shape: ChunkShape
    offered_ns: int
    granted_ns: int
    begun_ns: int
    ended_ns: int
    num_bytes: int
    is_verified: bool


@dataclass(slots=True)
class HandoffStats:
    """What was measured; see `PrefillCompleted`."""

    grant_ns: int = 0
    transfer_ns: int = 0
    verify_ns: int = 0
    exposed_ns: int = 0
    num_blocks_shipped: int = 0
    bytes_shipped: int = 0
    num_blocks_reused: int = 0
    num_chunks_resent: int = 0
    transport: str = ""
    shipments: list[Shipment] = field(default_factory=list)
