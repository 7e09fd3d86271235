"""What an endpoint has sent and received; it knows no connections."""

from __future__ import annotations

from dataclasses import dataclass

from common.transport.base import TransportStats


@dataclass(slots=True)
class Counters:
    """The running counts behind `TransportStats`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    stale_messages: int = 0

    def sent(self, num_bytes: int) -> None:
        self.messages_sent += 1
        self.bytes_sent += num_bytes

    def received(self, num_bytes: int) -> None:
        self.messages_received += 1
        self.bytes_received += num_bytes

    def snapshot(self, num_connections: int) -> TransportStats:
        return TransportStats(
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            messages_sent=self.messages_sent,
            messages_received=self.messages_received,
            stale_messages=self.stale_messages,
            connections=num_connections,
        )
