"""The tree of `common.errors` as gRPC status with google.rpc details, and back.

Every error travels with an `ErrorInfo` whose reason is the class's name, so the other end restores the very
class; `InvalidArgument` adds a `BadRequest` and `ResourceExhausted` a `RetryInfo` for clients elsewhere. What
comes without an `ErrorInfo` was said by gRPC itself and is mapped by its code. Knows no service.
"""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from common.errors import (
    BatonError,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    DigestMismatch,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    ModelError,
    NotFound,
    PeerLost,
    Preempted,
    RanksLost,
    ResourceExhausted,
    TransferError,
    TransferTimeout,
    Truncated,
    Unavailable,
    WorkerDraining,
)

ERROR_DOMAIN = "baton"
DETAILS_METADATA_KEY = "grpc-status-details-bin"

CODE_BY_CLASS: dict[type[BatonError], grpc.StatusCode] = {
    BatonError: grpc.StatusCode.UNKNOWN,
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    WorkerDraining: grpc.StatusCode.UNAVAILABLE,
    RanksLost: grpc.StatusCode.UNAVAILABLE,
    ConnectionLost: grpc.StatusCode.UNAVAILABLE,
    Preempted: grpc.StatusCode.ABORTED,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    TransferError: grpc.StatusCode.ABORTED,
    PeerLost: grpc.StatusCode.UNAVAILABLE,
    Truncated: grpc.StatusCode.DATA_LOSS,
    DigestMismatch: grpc.StatusCode.DATA_LOSS,
    TransferTimeout: grpc.StatusCode.ABORTED,
    InternalError: grpc.StatusCode.INTERNAL,
}
# How gRPC's own words begin if a call found no connection.
_NOT_RESOLVED = ("errors resolving", "DNS resolution failed", "Name resolution failure")
_NOT_CONNECTED = "failed to connect"
_CLASS_BY_NAME = {cls.__name__: cls for cls in CODE_BY_CLASS}
# For a status that gRPC itself made, or a server that is not ours.
_CLASS_BY_CODE: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.UNAVAILABLE: ConnectionLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    # Our servers send details with INTERNAL. gRPC says it of a connection that dies in the middle of a message.
    grpc.StatusCode.INTERNAL: ConnectionLost,
}


def code_of(error: BatonError) -> grpc.StatusCode:
    """The status code of an error; that of the nearest known base class for a class made elsewhere."""
    return CODE_BY_CLASS[_known_class(error)]


def to_status(error: BatonError) -> Status:
    """The google.rpc.Status of an error, details included."""
    info = ErrorInfo(reason=_known_class(error).__name__, domain=ERROR_DOMAIN)
    details: list[BadRequest | RetryInfo | ErrorInfo] = [info]
    if isinstance(error, InvalidArgument):
        info.metadata.update({"field": error.field, "value": error.value, "limit": error.limit})
        violation = BadRequest.FieldViolation(field=error.field, description=f"{error.value}: {error.limit}")
        details.insert(0, BadRequest(field_violations=[violation]))
    elif isinstance(error, ResourceExhausted):
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
        details.insert(0, retry)
    status = Status(code=code_of(error).value[0], message=str(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> NoReturn:
    """End the call with the error's status and details. Never returns: gRPC raises its `AbortError`."""
    metadata = ((DETAILS_METADATA_KEY, to_status(error).SerializeToString()),)
    await context.abort(code_of(error), str(error), trailing_metadata=metadata)
    raise AssertionError("abort returned")


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> BatonError:
    """The error that the server raised, in its class; `ConnectionLost` if there was no server to raise one."""
    message = rpc_error.details() or rpc_error.code().name
    for key, value in rpc_error.trailing_metadata() or ():
        if key == DETAILS_METADATA_KEY:
            with contextlib.suppress(DecodeError):  # then it is what its code says
                restored = _restored(message, Status.FromString(value))
                if restored is not None:
                    return restored
    code = rpc_error.code()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument("", "", message)
    return _CLASS_BY_CODE.get(code, BatonError)(message)


def error_from_call(rpc_error: grpc.aio.AioRpcError, address: str) -> BatonError:
    """`error_from_rpc` for what a person called: of what gRPC itself found, in words of ours."""
    if rpc_error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not _is_ours(rpc_error):
        return DeadlineExceeded(f"{address} did not answer in full within the deadline")
    if rpc_error.code() is grpc.StatusCode.UNAVAILABLE and not _is_ours(rpc_error):
        details = rpc_error.details() or ""
        if details.startswith(_NOT_CONNECTED):
            return Unavailable(f"no server at {address}; `baton up` starts one")
        if details.startswith(_NOT_RESOLVED):
            return Unavailable(f"no server at {address}: there is no host of that name")
        return Unavailable(f"the connection to {address} broke: {details}")
    return error_from_rpc(rpc_error)


def _is_ours(rpc_error: grpc.aio.AioRpcError) -> bool:
    """Whether a server of ours said it, and not gRPC."""
    return any(key == DETAILS_METADATA_KEY for key, _ in rpc_error.trailing_metadata() or ())


def error_from_status(status: Status) -> BatonError:
    """The error that `to_status` was given, in its class."""
    with contextlib.suppress(DecodeError):
        restored = _restored(status.message, status)
        if restored is not None:
            return restored
    return BatonError(status.message)


def find_baton_error(error: BaseException) -> BatonError | None:
    """The error itself, or the first of ours in an exception group (which is what a TaskGroup raises)."""
    if isinstance(error, BatonError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = (find_baton_error(inner) for inner in error.exceptions)
        return next((inner for inner in found if inner is not None), None)
    return None


def _known_class(error: BatonError) -> type[BatonError]:
    return next(cls for cls in type(error).__mro__ if cls in CODE_BY_CLASS)


def _restored(message: str, status: Status) -> BatonError | None:
    info, retry = ErrorInfo(), RetryInfo()
    retry_after_s = 1.0
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if info.domain != ERROR_DOMAIN or info.reason not in _CLASS_BY_NAME:
        return None
    error_class = _CLASS_BY_NAME[info.reason]
    if error_class is InvalidArgument:
        return _invalid_argument(info.metadata["field"], info.metadata["value"], info.metadata["limit"])
    if error_class is ResourceExhausted:
        return ResourceExhausted(message, retry_after_s)
    return error_class(message)


def _invalid_argument(field: str, shown_value: str, limit: str) -> InvalidArgument:
    error = InvalidArgument(field, shown_value, limit)
    # The value is a repr already: quoting it again would not be what the server said.
    error.value = shown_value
    error.args = (f"{field} = {shown_value}: {limit}",)
    return error
