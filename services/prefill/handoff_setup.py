"""Sizes, names and bounds of hand-offs, as a prefill worker was configured. A plain value."""

from __future__ import annotations

from dataclasses import dataclass

from common.kvcache.layout import KVLayout


@dataclass(frozen=True, slots=True)
class HandoffSetup:
    """What is the same for all hand-offs of one incarnation of the ranks.

    `connection_key`: of `pair_secret`. `slot_bytes`: of a send slot. `last_chunk_bytes`: of a step, more or less; see
    `chunk_shapes`.
    """

    worker_id: str
    incarnation: str
    layout: KVLayout
    layout_fingerprint: str
    rank_peer_names: tuple[str, ...]
    connection_key: bytes
    slot_bytes: int
    last_chunk_bytes: int
    max_chunks_in_flight: int
    max_chunk_resends: int
    connect_timeout_s: float

    @property
    def tp_size(self) -> int:
        return len(self.rank_peer_names)
