"""Puts the tokens of one sequence in order: the first from prefill, the rest from decode, each exactly once.

The two come over different connections, so decode's may be here first: those are held until the gap closes. When the
first token is released is a policy: `EAGER`, as soon as it exists, or `STEADY`, when the sequence's first decode step
is under way, so that no gap between two tokens holds the hand-off. All tokens of a sequence whose prompt is computed
by decode come from decode. Positions are indices in the choice's token log. Knows nothing of calls or workers.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.v1 import decode_pb2, prefill_pb2, sampling_pb2

from common.errors import BatonError
from services.router.choice import Choice


class FirstToken(enum.Enum):
    """When the first token of a sequence that is handed off is released."""

    EAGER = "eager"
    STEADY = "steady"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ended. `by_worker` is False if decode still holds it: then it must be closed there."""

    end: decode_pb2.SequenceEnd.ValueType
    by_worker: bool
    error: str = ""
    decode_queue_ns: int = 0
    decode_ns: int = 0
    is_disconnect: bool = False  # LOST because the stream broke: the worker itself may live on


class SequenceReceiver:
    """A `TokenReceiver`. `ended` resolves once; what comes later is dropped."""

    def __init__(
        self,
        choice: Choice,
        policy: FirstToken = FirstToken.EAGER,
        on_local_prefill: Callable[[decode_pb2.LocalPrefill], None] | None = None,
    ) -> None:
        """`on_local_prefill`: given if decode computes the prompt; told how, when the first token is here."""
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.num_decode_entries = 0
        self.is_cut_short = False  # ended by its first token, and prefill does not know
        self.choice = choice
        self._policy = policy
        self._on_local_prefill = on_local_prefill
        self._first_position = len(choice.tokens)
        self._steps_began = False
        self._unreleased: prefill_pb2.FirstToken | None = None
        self._held: list[decode_pb2.SequenceTokens] = []

    @property
    def has_first_token(self) -> bool:
        """Whether prefill's token is here, released or not."""
        return self._unreleased is not None or len(self.choice.tokens) > self._first_position

    def on_first_token(self, token: prefill_pb2.FirstToken) -> None:
        """Prefill's one token."""
        if self.ended.done() or self.has_first_token:
            return
        ends_output = token.finish_reason != sampling_pb2.FINISH_REASON_UNSPECIFIED
        if self._policy is FirstToken.EAGER or self._steps_began or ends_output:
            self._release(token)
        else:
            self._unreleased = token

    @property
    def _misses_first_token(self) -> bool:
        """Whether what decode sends must wait for prefill's token."""
        return self._on_local_prefill is None and len(self.choice.tokens) == self._first_position

    def _release(self, token: prefill_pb2.FirstToken) -> None:
        self.choice.accept((token.token_id,), (token.logprobs,) if token.HasField("logprobs") else ())
        if token.finish_reason != sampling_pb2.FINISH_REASON_UNSPECIFIED:
            self.choice.end(token.finish_reason)
        if self.choice.has_ended:
            self.is_cut_short = token.finish_reason == sampling_pb2.FINISH_REASON_UNSPECIFIED
            self._resolve(Ending(decode_pb2.SEQUENCE_END_FINISHED, by_worker=False))
            return
        held, self._held = self._held, []
        for entry in held:
            self._take(entry)

    def on_tokens(self, entry: decode_pb2.SequenceTokens) -> None:
        """Decode's tokens, its end, or both."""
        if self.ended.done():
            return
        self.num_decode_entries += 1
        if entry.steps_begin:
            self._steps_began = True
            if self._unreleased is not None:
                first, self._unreleased = self._unreleased, None
                self._release(first)
        if self._on_local_prefill is not None and entry.HasField("local_prefill"):
            self._on_local_prefill(entry.local_prefill)
        self._take(entry)

    def _take(self, entry: decode_pb2.SequenceTokens) -> None:
        if self.ended.done():
            return
        finished = entry.end == decode_pb2.SEQUENCE_END_FINISHED
        if entry.token_ids:
            if not self._accept(entry) and (finished or entry.end == decode_pb2.SEQUENCE_END_UNSPECIFIED):
                return
        elif finished and (self._held or self._misses_first_token):
            self._held.append(entry)
            return
        if finished:
            self.choice.end(entry.finish_reason or sampling_pb2.FINISH_REASON_STOP)
        if entry.end != decode_pb2.SEQUENCE_END_UNSPECIFIED:
            self._resolve(_ending(entry, self.choice.has_ended))
        elif self.choice.has_ended:
            self._resolve(Ending(decode_pb2.SEQUENCE_END_FINISHED, by_worker=False))

    def on_lost(self) -> None:
        """Decode, and all that it held, is gone."""
        error = "token stream broke"
        self._resolve(Ending(decode_pb2.SEQUENCE_END_LOST, by_worker=True, error=error, is_disconnect=True))

    def on_failed(self, error: BatonError) -> None:
        """`ended` raises it."""
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # also if nobody awaits it any more

    def _accept(self, entry: decode_pb2.SequenceTokens) -> bool:
        """Whether the entry's tokens are in the log now; they are held if there is a gap before them."""
        num_known = len(self.choice.tokens)
        first_position = entry.first_position
        if first_position > num_known or self._misses_first_token:
            self._held.append(entry)
            return False
        token_ids: Sequence[int] = entry.token_ids
        logprobs: Sequence[sampling_pb2.PositionLogprobs] = entry.logprobs
        if first_position < num_known:
            token_ids = token_ids[num_known - first_position :]
            logprobs = logprobs[num_known - first_position :]
        self.choice.accept(token_ids, logprobs)
        return True

    def _resolve(self, ending: Ending) -> None:
        if not self.ended.done():
            self.ended.set_result(ending)


def _ending(entry: decode_pb2.SequenceTokens, has_output_ended: bool) -> Ending:
    # An output whose last token is here is finished, whatever became of the worker after it.
    end = decode_pb2.SEQUENCE_END_FINISHED if has_output_ended else entry.end
    return Ending(end, True, entry.error, entry.decode_queue_ns, entry.decode_ns)
