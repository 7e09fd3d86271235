"""A router that answers as a test says, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

from common.errors import BatonError
from common.rpc.server import RpcServer


@dataclass
class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Sends a message for each piece of `pieces`, one token each. `refuse` may name an error for a request."""

    pieces: tuple[str, ...] = ("one ", "two")
    is_endless: bool = False  # the last piece comes again and again
    stalls: bool = False  # after the pieces nothing comes
    refuse: Callable[[inference_pb2.GenerateRequest], BatonError | None] = lambda request: None
    context_length: int = 64
    finish_reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_STOP
    num_prompt_tokens: int = 5
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if (error := self.refuse(request)) is not None:
            raise error
        num_choices = request.n if request.HasField("n") else 1
        try:
            for choice in range(num_choices):
                for position, piece in enumerate(self.pieces):
                    yield _token(request, choice, position, piece)
            while self.is_endless:
                yield _token(request, 0, 0, self.pieces[-1])
            if self.stalls:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        for choice in range(num_choices):
            yield self._last(choice, choice == num_choices - 1)

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(
            model="fake", context_length=self.context_length, has_chat_template=True, is_serving=True
        )

    def _last(self, choice: int, is_end: bool) -> inference_pb2.GenerateResponse:
        usage = inference_pb2.Usage(num_prompt_tokens=self.num_prompt_tokens, num_output_tokens=len(self.pieces))
        return inference_pb2.GenerateResponse(
            choice=choice,
            finish_reason=self.finish_reason,
            lifetime=inference_pb2.Lifetime(total_ns=1_000_000 * (choice + 1), transport="ucx:tcp"),
            usage=usage if is_end else None,
        )


def _token(
    request: inference_pb2.GenerateRequest, choice: int, position: int, piece: str
) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(choice=choice, text_delta=piece, token_ids=(position,))
    if request.sampling.HasField("logprobs"):
        chosen = inference_pb2.OutputTokenLogprob(token_id=position, logprob=-0.25, text=piece, utf8=piece.encode())
        other = inference_pb2.OutputTokenLogprob(token_id=77, logprob=-1.5, text="\ufffd", utf8=b"\xc3")
        top = (chosen, other)[: request.sampling.logprobs]
        response.logprobs.append(inference_pb2.OutputLogprobs(chosen=chosen, top=top))
    return response


@asynccontextmanager
async def serving(fake: FakeRouter) -> AsyncIterator[FakeRouter]:
    """Serve it on a free port."""
    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, fake, "baton.v1.Inference")
    fake.address = f"127.0.0.1:{await server.start()}"
    try:
        yield fake
    finally:
        await server.stop(0.0)
