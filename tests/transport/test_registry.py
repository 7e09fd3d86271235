"""Which URL opens which backend."""

import pytest

from common.errors import InvalidArgument
from common.transport.inproc import InprocEndpoint
from common.transport.registry import open_endpoint
from common.transport.ucx import UcxEndpoint


async def test_the_scheme_chooses_the_backend() -> None:
    for url, kind in (("inproc://", InprocEndpoint), ("ucx://127.0.0.1:0", UcxEndpoint)):
        endpoint = await open_endpoint(url, "me")
        assert isinstance(endpoint, kind)
        assert endpoint.address.startswith(url.removesuffix(":0"))
        await endpoint.close()


@pytest.mark.parametrize("url", ["nccl://host:1", "host:1", "", "ucx:/host:1"])
async def test_an_unknown_scheme_is_an_invalid_argument(url: str) -> None:
    with pytest.raises(InvalidArgument, match="url"):
        await open_endpoint(url, "me")


@pytest.mark.parametrize("name", ["", "x" * 256])
@pytest.mark.parametrize("url", ["inproc://", "ucx://127.0.0.1:0"])
async def test_a_name_that_does_not_fit_in_a_hello_is_refused(url: str, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        await open_endpoint(url, name)
