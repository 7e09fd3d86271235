"""Token ids to text, as they come: the pieces that are given out add up to the decoding of the whole
sequence.

What could still change is held back: the bytes of an unfinished character and, for vocabularies with byte
fallback, a run of byte tokens, since one bad byte spoils its run. This module knows nothing of stop strings
or requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Final

from services.router.token_pieces import BytePieces, TextPieces
from services.router.tokenizer import Tokenizer

_UTF8: Final = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one sequence. `continues_text` keeps the space of a first word that goes on from a prompt."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues_text: bool = False) -> None:
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        pieces = tokenizer.pieces
        self._stream = _ByteStream(pieces) if isinstance(pieces, BytePieces) else _TextStream(pieces, continues_text)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens settle; may be empty."""
        return self._stream.push([token_id for token_id in token_ids if token_id not in self._skipped])

    def push_ending(self, token_id: int) -> str:
        """As `push`, of the token that ends the sequence and is to be seen, even if it is special."""
        return self._stream.push([token_id])

    def flush(self) -> str:
        """The rest, at the end of the sequence; an unfinished character becomes U+FFFD."""
        return self._stream.flush()


class _ByteStream:
    """Bytes in, whole characters out. An invalid byte is U+FFFD at once: nothing that follows can mend it."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._utf8 = _UTF8("replace")

    def push(self, token_ids: list[int]) -> str:
        pieces = self._pieces
        return self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TextStream:
    """start: nothing has been given out, so decode all there is; then: a text per token, runs of bytes as a whole."""

    def __init__(self, pieces: TextPieces, continues_text: bool) -> None:
        self._pieces = pieces
        self._at_start = not continues_text
        self._held: list[int] = []  # the run of byte tokens at the end; at the start, all tokens so far

    def push(self, token_ids: list[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            self._held.append(token_id)
            return ""
        if not piece and not self._pieces.exists(token_id):
            return ""  # an id without a token is left out, and so does not even end a run of bytes
        if self._at_start:
            # Decoders strip a leading space, perhaps over several tokens; once there is text, that is done.
            self._held.append(token_id)
            text = self._pieces.at_start(self._held)
            if text:
                self._at_start = False
                self._held.clear()
            return text
        return self._release() + piece if self._held else piece

    def _release(self) -> str:
        text = self._pieces.at_start(self._held) if self._at_start else self._pieces.within(self._held)
        self._held.clear()
        return text

    def flush(self) -> str:
        return self._release() if self._held else ""
