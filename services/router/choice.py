"""One of a request's outputs: its token log, its text, and what of both the client has not been sent yet.

Plain synchronous state. Tokens come in order (see `sequence_receiver`) and go out merged: what waits for a slow client
is few messages, each of bounded size. Knows nothing of workers or gRPC calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.v1 import inference_pb2, sampling_pb2

from services.router.detokenizer import IncrementalDetokenizer
from services.router.stop_strings import StopStringMatcher
from services.router.tokenizer import Tokenizer

# In one message: far below the 4 MiB that clients take by default, and below what a router with the lowest limit sends.
MAX_MESSAGE_TOKENS = 4096
MAX_MESSAGE_LOGPROBS = 256  # tokens with log-probabilities
MAX_MESSAGE_LOGPROB_BYTES = 1 << 16  # of these; the one that exceeds it is the last
MAX_MESSAGE_CHARS = 8192


@dataclass(frozen=True, slots=True)
class ChoiceLimits:
    """What ends an output, and how it becomes text."""

    max_tokens: int
    ending_token_ids: frozenset[int]  # end of sequence, unless ignored, and stop tokens
    stop: tuple[str, ...]
    include_stop_in_output: bool
    continues_text: bool  # the output goes on from a text, not from a chat's turn


class Choice:
    """`accept` and `end` change it, `on_change` tells that there is something to `take`."""

    def __init__(
        self,
        index: int,
        limits: ChoiceLimits,
        tokenizer: Tokenizer,
        on_change: Callable[[Choice], None],
    ) -> None:
        self.index = index
        self.tokens: list[int] = []  # the token log: everything that was generated
        self.finish_reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_UNSPECIFIED
        self.lifetime = inference_pb2.Lifetime()
        self.is_complete = False  # ended, and its lifetime is final
        self._limits = limits
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues_text=limits.continues_text)
        self._stop_matcher = StopStringMatcher(limits.stop) if limits.stop else None
        self._on_change = on_change
        self._pending_text = ""
        # As they will be sent, with how many bytes they take.
        self._pending_logprobs: deque[inference_pb2.GenerateResponse] = deque()
        self._num_last_logprob_bytes = 0
        self._num_taken = 0  # tokens that `take` has handed out

    @property
    def has_ended(self) -> bool:
        return self.finish_reason != sampling_pb2.FINISH_REASON_UNSPECIFIED

    def accept(self, token_ids: Sequence[int], logprobs: Sequence[sampling_pb2.PositionLogprobs]) -> None:
        """The next tokens of the log. What comes after the token that ends the output is dropped."""
        if self.has_ended:
            return
        num_before = len(self.tokens)
        if self._stop_matcher is None:
            self._accept_run(token_ids)
        else:
            for token_id in token_ids:
                self._accept_run((token_id,))
                if self.has_ended:
                    break
        if logprobs:
            self._add_logprobs(logprobs[: len(self.tokens) - num_before])
        if not self.has_ended or not num_before:
            # The last tokens go with the last message, which follows at once; but a first token never waits.
            self._on_change(self)

    def end(self, reason: sampling_pb2.FinishReason.ValueType) -> None:
        """No token follows. Keeps an earlier reason."""
        if self.has_ended:
            return
        self._push_text(self._detokenizer.flush())
        if self._stop_matcher is not None and not self.has_ended:
            self._pending_text += self._stop_matcher.flush()
        if not self.has_ended:
            self.finish_reason = reason

    def complete(self) -> None:
        """Ended, and the lifetime is final: the last message may go."""
        assert self.has_ended, "completed before its end"
        self.is_complete = True
        on_change, self._on_change = self._on_change, _nobody
        on_change(self)  # whose owner holds us: a cycle would be left to the garbage collector

    @property
    def has_pending(self) -> bool:
        """Whether there is something to `take`, besides the news that it is complete."""
        return len(self.tokens) > self._num_taken or bool(self._pending_text)

    def take(self) -> inference_pb2.GenerateResponse | None:
        """What waits, as much as one message may hold; None while there is nothing. The last one of a choice that is
        complete has its `finish_reason`."""
        if not self.has_pending and not self.is_complete:
            return None
        if self._pending_logprobs:
            response = self._pending_logprobs.popleft()
            num_tokens = len(response.logprobs)
        else:
            response = inference_pb2.GenerateResponse()
            num_tokens = MAX_MESSAGE_TOKENS
        token_ids = self.tokens[self._num_taken : self._num_taken + num_tokens]
        self._num_taken += len(token_ids)
        response.choice = self.index
        response.token_ids.extend(token_ids)
        response.text_delta = self._pending_text[:MAX_MESSAGE_CHARS]
        self._pending_text = self._pending_text[MAX_MESSAGE_CHARS:]
        if self.is_complete and not self.has_pending:
            response.finish_reason = self.finish_reason
        return response

    def _add_logprobs(self, logprobs: Sequence[sampling_pb2.PositionLogprobs]) -> None:
        for received in logprobs:
            if (
                not self._pending_logprobs
                or len(self._pending_logprobs[-1].logprobs) >= MAX_MESSAGE_LOGPROBS
                or self._num_last_logprob_bytes >= MAX_MESSAGE_LOGPROB_BYTES
            ):
                self._pending_logprobs.append(inference_pb2.GenerateResponse())
                self._num_last_logprob_bytes = 0
            added = self._pending_logprobs[-1].logprobs.add()
            self._read(received.chosen, added.chosen)
            for token in received.top:
                self._read(token, added.top.add())
            self._num_last_logprob_bytes += added.ByteSize()

    def _read(self, received: sampling_pb2.TokenLogprob, added: inference_pb2.OutputTokenLogprob) -> None:
        """With the token's text, which workers do not know."""
        added.token_id = received.token_id
        added.logprob = received.logprob
        added.text, added.utf8 = self._tokenizer.reading(received.token_id)

    def _accept_run(self, token_ids: Sequence[int]) -> None:
        """Tokens of which only the last may complete a stop string."""
        limits = self._limits
        room = limits.max_tokens - len(self.tokens)
        reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_UNSPECIFIED
        if len(token_ids) >= room:
            token_ids = token_ids[:room]
            reason = sampling_pb2.FINISH_REASON_LENGTH
        text_ids = token_ids
        if not limits.ending_token_ids.isdisjoint(token_ids):
            position = next(i for i, token_id in enumerate(token_ids) if token_id in limits.ending_token_ids)
            token_ids = token_ids[: position + 1]
            text_ids = token_ids[:position]
            reason = sampling_pb2.FINISH_REASON_STOP
        self.tokens.extend(token_ids)
        self._push_text(self._detokenizer.push(text_ids))
        if limits.include_stop_in_output and len(text_ids) < len(token_ids):
            self._push_text(self._detokenizer.push_ending(token_ids[-1]))
        if reason != sampling_pb2.FINISH_REASON_UNSPECIFIED:
            self.end(reason)

    def _push_text(self, text: str) -> None:
        if self._stop_matcher is None:
            self._pending_text += text
        elif text:
            emitted, matched = self._stop_matcher.push(text)
            self._pending_text += emitted
            if matched:
                if self._limits.include_stop_in_output:
                    self._pending_text += self._stop_matcher.matched or ""
                self.finish_reason = sampling_pb2.FINISH_REASON_STOP


def _nobody(_: Choice) -> None:
    pass
