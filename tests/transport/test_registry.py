"""Which URL opens which backend."""

import pytest
import torch

from common.errors import FailedPrecondition, InvalidArgument
from common.transport.inproc import InprocEndpoint
from common.transport.registry import open_endpoint
from common.transport.ucx import UcxEndpoint


async def test_the_scheme_chooses_the_backend() -> None:
    for url, kind in (("inproc://", InprocEndpoint), ("ucx://127.0.0.1:0", UcxEndpoint)):
        endpoint = await open_endpoint(url, "me")
        assert isinstance(endpoint, kind)
        assert endpoint.address.startswith(url.removesuffix(":0"))
        await endpoint.close()


@pytest.mark.parametrize("url", ["tcp://host:1", "host:1", "", "ucx:/host:1"])
async def test_an_unknown_scheme_is_an_invalid_argument(url: str) -> None:
    with pytest.raises(InvalidArgument, match="url"):
        await open_endpoint(url, "me")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("url", ["ucx://127.0.0.1:0", "nccl://127.0.0.1:0"])
async def test_without_a_gpu_its_memory_is_a_failed_precondition(url: str) -> None:
    with pytest.raises(FailedPrecondition, match="GPU"):
        await open_endpoint(url, "me", memory="cuda")


@pytest.mark.parametrize("memory", ["gpu", "cuda:", "cuda:x", "host:0"])
async def test_memory_of_another_kind_is_an_invalid_argument(memory: str) -> None:
    for url in ("ucx://127.0.0.1:0", "nccl://127.0.0.1:0"):
        with pytest.raises(InvalidArgument, match="memory"):
            await open_endpoint(url, "me", memory=memory)


@pytest.mark.parametrize("name", ["", "x" * 256])
@pytest.mark.parametrize("url", ["inproc://", "ucx://127.0.0.1:0"])
async def test_a_name_that_does_not_fit_in_a_hello_is_refused(url: str, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        await open_endpoint(url, name)
