"""The rows that decoding sequences own on the ranks, by number. Pure.

FREE ──give──▶ TAKEN ──leave──▶ LEAVING ──recycle: the ranks are told──▶ FREE
"""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import InternalError
from common.worker.step_plan import RemoveRow
from services.decode.request import DecodeSequence


class RowTable:
    """`max_rows` rows, all of them free at first."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._taken: dict[int, DecodeSequence] = {}
        self._leaving: list[int] = []
        self._free: list[int] = []
        self.reset()

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def sequences(self) -> Iterable[DecodeSequence]:
        """Those that have a row."""
        return self._taken.values()

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def give(self, seq: DecodeSequence) -> None:
        """The sequence gets a free row."""
        seq.row = self._free.pop()
        self._taken[seq.row] = seq

    def leave(self, seq: DecodeSequence) -> None:
        """The sequence needs its row no more."""
        del self._taken[seq.row]
        self._leaving.append(seq.row)

    def recycle(self) -> list[RemoveRow]:
        """What the ranks must be told of the rows that were left: they are free behind these messages."""
        messages = [RemoveRow(row) for row in self._leaving]
        self._free += self._leaving
        self._leaving.clear()
        return messages

    def reset(self) -> None:
        """The ranks are gone, and no sequence has a row."""
        assert not self._taken
        self._leaving.clear()
        self._free = list(range(self._max_rows - 1, -1, -1))

    def check_integrity(self) -> None:
        """Raises `InternalError` unless every row is in one state."""
        if sorted([*self._taken, *self._free, *self._leaving]) != list(range(self._max_rows)):
            raise InternalError("a row is used twice or not at all")
