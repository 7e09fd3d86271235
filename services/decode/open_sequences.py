"""The sequences that are open, found by key, ticket, session and deadline. Pure: the caller knows what time it is."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from common.errors import InternalError, InvalidArgument, ResourceExhausted
from services.decode.request import DecodeSequence, Key, SequenceState


class OpenSequences:
    """At most `max_open` sequences."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._by_key: dict[Key, DecodeSequence] = {}
        self._by_ticket: dict[int, DecodeSequence] = {}
        self._deadlines: list[tuple[float, int, DecodeSequence]] = []  # a heap; some are gone

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def all(self) -> Collection[DecodeSequence]:
        return self._by_key.values()

    @property
    def num_active(self) -> int:
        """Sequences that hold all their blocks and will need more."""
        return sum(seq.state is not SequenceState.OPEN for seq in self._by_key.values())

    def find(self, key: Key) -> DecodeSequence | None:
        return self._by_key.get(key)

    def find_ticket(self, ticket_id: int) -> DecodeSequence | None:
        return self._by_ticket.get(ticket_id)

    def of_session(self, session_id: str) -> list[DecodeSequence]:
        return [seq for seq in self._by_key.values() if seq.session_id == session_id]

    def first_to_expire(self) -> DecodeSequence | None:
        """The sequence with the earliest deadline."""
        while self._deadlines and self._deadlines[0][2].state is SequenceState.GONE:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][2] if self._deadlines else None

    def check_new(self, key: Key, ticket_id: int) -> None:
        """Raises `InvalidArgument` or `ResourceExhausted` unless there may be such a sequence."""
        if key in self._by_key or ticket_id in self._by_ticket:
            raise InvalidArgument("sequence.sequence_id", key[1], "is open already")
        if len(self._by_key) >= self._max_open:
            raise ResourceExhausted(f"{self._max_open} sequences are open on this worker")

    def add(self, seq: DecodeSequence) -> None:
        self._by_key[seq.key] = seq
        self._by_ticket[seq.ticket_id] = seq
        if len(self._deadlines) > 2 * self._max_open:  # most are of sequences that are gone
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not SequenceState.GONE]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (seq.request.deadline_s, seq.serial, seq))

    def remove(self, seq: DecodeSequence) -> None:
        """It is gone."""
        del self._by_key[seq.key]
        del self._by_ticket[seq.ticket_id]

    def check_integrity(self) -> None:
        """Raises `InternalError` unless both indices name the same sequences."""
        if {id(seq) for seq in self._by_key.values()} != {id(seq) for seq in self._by_ticket.values()}:
            raise InternalError("sequences and tickets differ")
