"""A thin client of the `Inference` service: builds requests from command-line options and streams answers."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

from common.rpc.client import open_channel
from common.rpc.status import error_from_rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 << 20


class Client:
    """One channel to a router."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(channel)

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream the responses. Raises the error of `common.errors` that the router answered with."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()

    async def model_info(self, timeout_s: float = 5.0) -> inference_pb2.GetModelInfoResponse:
        """What the router serves."""
        try:
            return await self._stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Client]:
    """A client of the router at `host:port`."""
    async with open_channel(address, MAX_MESSAGE_BYTES) as channel:
        yield Client(channel)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `sampling_from` reads. A flag that is not given leaves the field to the router's default."""
    add = parser.add_argument
    add("--max-tokens", type=int, help="most tokens to generate (default: what the context allows)")
    add("--min-tokens", type=int, help="tokens before the output may end")
    add("--temperature", type=float, help="0 is greedy (default 1)")
    add("--top-p", type=float, help="smallest set of tokens with this probability, above 0 to 1")
    add("--top-k", type=int, help="the so many most probable tokens; 0 is off")
    add("--min-p", type=float, help="share of the best token's probability, 0 to 1")
    add("--seed", type=int, help="seed of the random numbers (default: drawn by the router)")
    add("--presence-penalty", type=float, help="-2 to 2")
    add("--frequency-penalty", type=float, help="-2 to 2")
    add("--repetition-penalty", type=float, help="above 0.1 to 10; 1 is off")
    add("--logprobs", type=int, help="report so many alternatives for each token, 0 to 20")
    add("--ignore-eos", action="store_const", const=True, help="go on past end-of-sequence tokens")


_SAMPLING_FLAGS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "ignore_eos",
)


def sampling_from(args: argparse.Namespace) -> sampling_pb2.SamplingParams:
    """The sampling parameters that were given on the command line."""
    given = {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None}
    return sampling_pb2.SamplingParams(**given)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for reaching a router."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help=f"router, host:port ({DEFAULT_ADDRESS})")
    parser.add_argument("--timeout", type=float, default=600.0, help="deadline of a request in seconds (600)")
