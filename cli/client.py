"""A thin client of the `Inference` service: builds requests from command-line options and streams answers."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

from cli.flag_types import host_port, number, seconds, whole
from common.rpc.client import decoded, open_channel
from common.rpc.status import error_from_call
from common.sampling import limits

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 << 20


class Client:
    """One channel to a router."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._address = address
        self._stub = inference_pb2_grpc.InferenceStub(channel)

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream the responses. Raises the error of `common.errors` that the router answered with."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for response in call:
                yield decoded(response, self._address)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._address) from error
        finally:
            call.cancel()

    async def model_info(self, timeout_s: float = 5.0) -> inference_pb2.GetModelInfoResponse:
        """What the router serves."""
        try:
            info = await self._stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=timeout_s)
            return decoded(info, self._address)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._address) from error


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Client]:
    """A client of the router at `host:port`."""
    async with open_channel(address, MAX_MESSAGE_BYTES) as channel:
        yield Client(channel, address)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `sampling_from` reads. A flag that is not given leaves the field to the router's default."""
    penalty = number(-limits.MAX_ADDITIVE_PENALTY, limits.MAX_ADDITIVE_PENALTY)
    repetition = number(limits.MIN_REPETITION_PENALTY, limits.MAX_REPETITION_PENALTY)
    share, tokens = number(0, 1), whole(1, limits.MAX_TOKENS)
    add = parser.add_argument
    add("--max-tokens", type=tokens, metavar="N", help="most tokens to generate (default: what the context allows)")
    add("--min-tokens", type=whole(0, limits.MAX_TOKENS), metavar="N", help="tokens before the output may end")
    add(
        "--temperature",
        type=number(0, limits.MAX_TEMPERATURE),
        metavar="X",
        help="0 is greedy (default: the checkpoint's, or 1)",
    )
    add("--top-p", type=number(0, 1, above=True), metavar="X", help="smallest set with this probability, above 0 to 1")
    add("--top-k", type=whole(0, limits.MAX_TOP_K), metavar="N", help="the so many most probable tokens; 0 is off")
    add("--min-p", type=share, metavar="X", help="share of the best token's probability, 0 to 1")
    add("--seed", type=whole(0, limits.MAX_SEED), metavar="N", help="of the random numbers (default: the router draws)")
    add("--presence-penalty", type=penalty, metavar="X", help="-2 to 2")
    add("--frequency-penalty", type=penalty, metavar="X", help="-2 to 2")
    add("--repetition-penalty", type=repetition, metavar="X", help="0.1 to 10; 1 is off")
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
    given = {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name, None) is not None}
    return sampling_pb2.SamplingParams(**given)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for reaching a router."""
    add = parser.add_argument
    add("--address", type=host_port, default=DEFAULT_ADDRESS, metavar="H:P", help=f"router ({DEFAULT_ADDRESS})")
    add("--timeout", type=seconds, default=600.0, metavar="S", help="deadline of a request in seconds (600)")
