"""Writes a request's choices to its client: whatever waits is merged, so a slow client gets few messages.

One task writes; choices only mark themselves as changed. Knows nothing of workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from baton.v1 import inference_pb2, sampling_pb2

from common.telemetry.histogram import Histogram
from services.router.choice import Choice


class OutputStream:
    """The messages of one call. `choices` is filled by the caller before `write_to`; `gaps` hears of the seconds
    between messages of a choice that bring tokens, `sampling` is told to the client with the first message."""

    def __init__(
        self,
        request_id: str,
        seed: int,
        num_prompt_tokens: int,
        clock_ns: Callable[[], int],
        gaps: Histogram | None = None,
        sampling: sampling_pb2.SamplingParams | None = None,
    ) -> None:
        self.choices: list[Choice] = []
        self.first_token_ns: int | None = None  # when the first message of the stream was written
        self.num_messages = 0
        self._request_id = request_id
        self._seed = seed
        self._num_prompt_tokens = num_prompt_tokens
        self._clock_ns = clock_ns
        self._gaps = gaps
        self._sampling = sampling
        self._first_sent_ns: dict[int, int] = {}
        self._last_sent_ns: dict[int, int] = {}  # with tokens
        self._changed: dict[Choice, None] = {}  # an ordered set
        self._num_open = 0
        self._is_cut_off = False
        self._wake = asyncio.Event()

    def on_change(self, choice: Choice) -> None:
        """A choice has something to send."""
        self._changed[choice] = None
        self._wake.set()

    async def write_to(
        self, write: Callable[[inference_pb2.GenerateResponse], Awaitable[None]], received_ns: int
    ) -> None:
        """Write until every choice's last message is out, or until `cut_off`."""
        self._num_open = len(self.choices)
        while self._num_open and not self._is_cut_off:
            await self._wake.wait()
            self._wake.clear()
            while self._changed and not self._is_cut_off:
                choice = next(iter(self._changed))
                del self._changed[choice]
                response = choice.take()
                if response is not None:
                    if choice.has_pending:
                        self._changed[choice] = None  # the rest follows, behind other choices
                    self._finish_message(choice, response, received_ns)
                    await write(response)

    def cut_off(self) -> None:
        """Begin no other message: `write_to` returns when the one under way is out."""
        self._is_cut_off = True
        self._wake.set()

    def _finish_message(self, choice: Choice, response: inference_pb2.GenerateResponse, received_ns: int) -> None:
        now_ns = self._clock_ns()
        if choice.index not in self._first_sent_ns:
            self._first_sent_ns[choice.index] = now_ns
            if self.first_token_ns is None:
                self.first_token_ns = now_ns
                response.request_id = self._request_id
                response.seed = self._seed
                if self._sampling is not None:
                    response.sampling.CopyFrom(self._sampling)
                    response.sampling.ClearField("logit_bias")
        self.num_messages += 1
        if response.token_ids:
            last_ns = self._last_sent_ns.get(choice.index)
            self._last_sent_ns[choice.index] = now_ns
            if last_ns is not None and self._gaps is not None:
                self._gaps.observe((now_ns - last_ns) * 1e-9)
        if response.finish_reason:
            choice.lifetime.time_to_first_token_ns = self._first_sent_ns[choice.index] - received_ns
            choice.lifetime.total_ns = now_ns - received_ns
            response.lifetime.CopyFrom(choice.lifetime)
            self._num_open -= 1
            if not self._num_open:
                response.usage.CopyFrom(self._usage())

    def _usage(self) -> inference_pb2.Usage:
        return inference_pb2.Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=sum(len(choice.tokens) for choice in self.choices),
            # The prompt counts once, so what was cached of it does: the others find what the first one left behind.
            num_cached_tokens=self.choices[0].lifetime.num_cached_tokens,
        )
