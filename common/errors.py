"""The one exception tree of Baton. Third-party errors are mapped onto it once, at the edge (`raise ... from`).

    BatonError
    ├── InvalidArgument        a field of a request is out of bounds; names field, value and limit
    ├── NotFound               an unknown model, ticket or sequence
    ├── ResourceExhausted      a bounded queue is full; carries a retry hint
    ├── DeadlineExceeded       the request's own deadline passed
    ├── Cancelled              the client, or the leg beside this one, went away
    ├── Unavailable            a worker died, drains, or cannot be reached; another may serve the request
    │   ├── WorkerDraining     it takes nothing new, or stops
    │   ├── RanksLost          its ranks died, and what they held with them
    │   └── ConnectionLost     nobody answered, or the connection broke: the process may have died
    ├── Preempted              decode gave the sequence's blocks to others; it is to be sent again
    ├── FailedPrecondition     two workers that do not fit together (layout fingerprint, protocol version)
    ├── ModelError             a checkpoint that cannot be served; says which tensor, shape or architecture
    ├── TransferError          a KV transfer failed
    │   ├── PeerLost           the other end of the connection is gone
    │   ├── Truncated          fewer or more bytes than the grant says
    │   ├── DigestMismatch     the bytes are not those that were gathered
    │   └── TransferTimeout    the grant's deadline passed
    └── InternalError          an invariant is broken; the worker that raises it becomes unready

This module knows nothing of gRPC: `common.rpc.status` maps the tree to status codes and back.
"""


class BatonError(Exception):
    """Root of every error that Baton raises on purpose."""


class InvalidArgument(BatonError):
    """A request field is out of bounds. `field` is its path in the request, `limit` says what is allowed."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} = {shown}: {limit}")
        self.field = field
        self.value = shown
        self.limit = limit


class NotFound(BatonError):
    """A name that nobody here knows: a model, a ticket, a sequence."""


class ResourceExhausted(BatonError):
    """A bounded queue is full. `retry_after_s` hints when trying again makes sense (seconds)."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(BatonError):
    """The deadline that the client set has passed."""


class Cancelled(BatonError):
    """The client, or the other leg of the request, went away."""


class Unavailable(BatonError):
    """A worker died, drains or cannot be reached. The request may be served by another."""


class WorkerDraining(Unavailable):
    """The worker takes nothing new, or stops. Nobody is to blame."""


class RanksLost(Unavailable):
    """The ranks of the worker died, and with them what they held of the request."""


class ConnectionLost(Unavailable):
    """There was no connection, or it broke. The process at the other end may have died, or cannot be reached."""


class Preempted(BatonError):
    """During its hand-off, decode took the sequence's blocks for others. No worker is at fault: it is sent again."""


class FailedPrecondition(BatonError):
    """Two workers that do not fit together, or a call in a state that does not allow it."""


class ModelError(BatonError):
    """A checkpoint that cannot be served. The message names the architecture, file, tensor or shape."""


class TransferError(BatonError):
    """A KV transfer failed."""


class PeerLost(TransferError):
    """The other end of a transport connection is gone."""


class Truncated(TransferError):
    """A message is shorter or longer than its grant."""


class DigestMismatch(TransferError):
    """The bytes that arrived are not the bytes that were gathered."""


class TransferTimeout(TransferError):
    """The grant's deadline passed before the bytes were complete."""


class InternalError(BatonError):
    """An invariant is broken. The worker that raises it stops taking requests."""
