"""Every class of the error tree has a code and survives the way to a status and back."""

from __future__ import annotations

import grpc
import pytest

from common import errors
from common.errors import BatonError, Cancelled, InvalidArgument, ResourceExhausted, Unavailable
from common.rpc.status import CODE_BY_CLASS, DETAILS_METADATA_KEY, code_of, error_from_rpc, error_from_status, to_status
from tests.rpc.garbage import GARBAGE

ALL_CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BatonError)]


def make_error(error_class: type[BatonError]) -> BatonError:
    return InvalidArgument("n", 99, "1 to 16") if error_class is InvalidArgument else error_class("what happened")


def as_rpc_error(error: BatonError) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((DETAILS_METADATA_KEY, to_status(error).SerializeToString()))
    return grpc.aio.AioRpcError(code_of(error), grpc.aio.Metadata(), trailing, str(error))


@pytest.mark.parametrize("error_class", ALL_CLASSES)
def test_every_class_of_the_tree_survives(error_class: type[BatonError]) -> None:
    assert error_class in CODE_BY_CLASS
    error = make_error(error_class)
    restored = error_from_rpc(as_rpc_error(error))
    assert type(restored) is error_class
    assert str(restored) == str(error)


def test_a_class_made_elsewhere_travels_as_its_base() -> None:
    class Special(Unavailable):
        pass

    assert type(error_from_rpc(as_rpc_error(Special("x")))) is Unavailable


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ConnectionLost),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.INTERNAL, errors.ConnectionLost),  # a connection that broke in the middle of a message
        (grpc.StatusCode.UNKNOWN, BatonError),
    ],
)
def test_what_grpc_says_itself_is_mapped_by_code(code: grpc.StatusCode, expected: type[BatonError]) -> None:
    empty = grpc.aio.Metadata()
    assert type(error_from_rpc(grpc.aio.AioRpcError(code, empty, empty, "details"))) is expected


def test_details_that_are_no_message_are_left_out() -> None:
    trailing = grpc.aio.Metadata((DETAILS_METADATA_KEY, GARBAGE))
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailing, "draining")
    restored = error_from_rpc(error)
    assert (type(restored), str(restored)) == (errors.ConnectionLost, "draining")
    status = to_status(Unavailable("draining"))
    status.details[0].value = GARBAGE
    assert type(error_from_status(status)) is BatonError
