"""What the client makes of answers that are no messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from baton.v1 import inference_pb2, inference_pb2_grpc

from cli.client import connect
from common.errors import Unavailable
from common.rpc.server import RpcServer
from loadtest.targets.base import TargetSpec
from loadtest.targets.baton import open_baton
from tests.rpc.garbage import GARBAGE, with_garbage


class _Garbled(inference_pb2_grpc.InferenceServicer):
    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        return cast(inference_pb2.GetModelInfoResponse, GARBAGE)

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield cast(inference_pb2.GenerateResponse, GARBAGE)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    server.add(with_garbage(inference_pb2_grpc.add_InferenceServicer_to_server), _Garbled(), "baton.v1.Inference")
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(0.0)


async def test_an_answer_that_is_no_message_is_said_to_be_none(address: str) -> None:
    async with connect(address) as client:
        with pytest.raises(Unavailable, match=f"{address} sent what cannot be decoded"):
            async for _ in client.generate(inference_pb2.GenerateRequest(text="hi"), 20.0):
                pass
        with pytest.raises(Unavailable, match=f"{address} sent what cannot be decoded"):
            await client.model_info(20.0)


async def test_so_it_is_for_a_load_test(address: str) -> None:
    async with open_baton(TargetSpec("baton", address)) as target:
        with pytest.raises(Unavailable, match="cannot be decoded"):
            await target.generate(b"", 20.0, lambda num_tokens: None)
