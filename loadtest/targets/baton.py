"""A Baton router as a target: `baton.v1.Inference` over gRPC, prompts as token ids."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc

from common.errors import Unavailable
from common.rpc.client import decoded, open_channel
from common.rpc.status import error_from_call, error_from_rpc
from loadtest.targets.base import TIMEOUT_TO_DESCRIBE_S, Account, ModelInfo, Target, TargetSpec

_MAX_MESSAGE_BYTES = 64 << 20
_GENERATE = "/baton.v1.Inference/Generate"
_TIMES = [field.name for field in inference_pb2.Lifetime.DESCRIPTOR.fields if field.name.endswith("_ns")]

_Generate = Callable[..., "grpc.aio.UnaryStreamCall[bytes, inference_pb2.GenerateResponse]"]


class BatonTarget(Target):
    """Channels to one router, used in turn. A router of several processes is reached evenly only over several."""

    def __init__(self, address: str, channels: list[grpc.aio.Channel], model: str) -> None:
        self._address = address
        self._model = model
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        # Requests are serialised ahead of time, so this method takes bytes.
        methods: list[_Generate] = [
            channel.unary_stream(_GENERATE, response_deserializer=inference_pb2.GenerateResponse.FromString)
            for channel in channels
        ]
        self._generate = itertools.cycle(methods)

    async def describe(self) -> ModelInfo:
        """The router's model. A router without workers for a request is `Unavailable`."""
        try:
            for stub in self._stubs:
                answer = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=TIMEOUT_TO_DESCRIBE_S)
                info = decoded(answer, self._address)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._address) from error
        if not info.is_serving:
            ready = f"{info.num_prefill_workers} prefill and {info.num_decode_workers} decode workers"
            raise Unavailable(f"the router has {ready} that are ready")
        return ModelInfo(info.model, info.vocab_size, info.context_length, tuple(info.eos_token_ids))

    def prepare(self, request_id: str, token_ids: list[int], max_tokens: int) -> bytes:
        """A serialised GenerateRequest."""
        request = inference_pb2.GenerateRequest(request_id=request_id, model=self._model or None)
        request.token_ids.ids.extend(token_ids)
        request.sampling.max_tokens = max_tokens
        request.sampling.temperature = 0.0
        request.sampling.ignore_eos = True
        body: bytes = request.SerializeToString()
        return body

    async def generate(self, body: bytes, timeout_s: float, on_tokens: Callable[[int], None]) -> Account:
        """One Generate call. Its deadline is the request's."""
        call = next(self._generate)(body, timeout=timeout_s)
        account = Account()
        try:
            async for message in call:
                response = decoded(message, "the router")
                if response.token_ids:
                    on_tokens(len(response.token_ids))
                if response.HasField("usage"):
                    account = _account(response)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()
        return account


def _account(response: inference_pb2.GenerateResponse) -> Account:
    lifetime = response.lifetime
    times = {name: int(getattr(lifetime, name)) for name in _TIMES} if response.HasField("lifetime") else {}
    return Account(response.usage.num_cached_tokens, times)


@asynccontextmanager
async def open_baton(spec: TargetSpec) -> AsyncIterator[BatonTarget]:
    """Channels that connect when first used and are closed at the end."""
    async with AsyncExitStack() as stack:
        channels = [open_channel(spec.address, _MAX_MESSAGE_BYTES) for _ in range(spec.num_connections)]
        for channel in channels:
            await stack.enter_async_context(channel)
        yield BatonTarget(spec.address, channels, spec.model)
