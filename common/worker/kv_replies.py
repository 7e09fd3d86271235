"""What the KV channels of both kinds of ranks answer alike. Knows neither sending nor receiving."""

from __future__ import annotations

from common.errors import BatonError
from common.transport.base import TransportStats
from common.worker.rank_messages import TransportStatsReply


def transport_stats_reply(op_id: int, stats: TransportStats) -> TransportStatsReply:
    """The endpoint's counters, as the front adds them up."""
    return TransportStatsReply(
        op_id,
        stats.bytes_sent,
        stats.bytes_received,
        stats.messages_sent,
        stats.messages_received,
        stats.stale_messages,
        stats.connections,
    )


def described(error: Exception) -> tuple[str, str]:
    """Kind and detail of a failure; the front restores the class by its name."""
    if isinstance(error, BatonError):
        return type(error).__name__, str(error)
    return "InternalError", f"{type(error).__name__}: {error}"
