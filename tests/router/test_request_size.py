"""Requests are as large as the model can make use of, and no larger."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2

from common.errors import InvalidArgument
from common.rpc.status import error_from_rpc
from services.router.validation import MAX_CHARS_PER_TOKEN, longest_request_bytes
from tests.router.cluster import running_cluster


async def test_what_is_larger_than_any_request_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        model = await cluster.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        most = longest_request_bytes(model.context_length)
        for num_bytes, code in ((most + 1, "INVALID_ARGUMENT"), (2 * most + 1, "RESOURCE_EXHAUSTED")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.generate(inference_pb2.GenerateRequest(text="a" * num_bytes))
            assert caught.value.code().name == code
        error = error_from_rpc(caught.value)
        assert not isinstance(error, InvalidArgument)


async def test_the_longest_text_that_may_fit_is_looked_at(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        model = await cluster.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        text = "a" * (model.context_length * MAX_CHARS_PER_TOKEN)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(inference_pb2.GenerateRequest(text=text))
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidArgument)
        assert error.field == "text"
        assert "tokens" in error.value
