"""Requests for every RPC, from a seed: noise, messages with any values in their fields, and damaged ones.

Nothing that is made here names an address beyond loopback, however it was damaged. Pure: knows no channel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Final

from baton.v1 import decode_pb2, inference_pb2, kv_pb2, prefill_pb2, worker_pb2
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.fuzz.dialogues import DIALOGUES, Dialogue

# Draining a worker is what its RPC is for: anybody who reaches the port may, so far.
_LEFT_OUT: Final = {"/baton.v1.Worker/Drain"}
_INTEGERS: Final = (0, 1, 2, 3, 7, 63, 64, 65, 255, 4095, 4096, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1)
_FLOATS: Final = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
_TEXTS: Final = ("", "x", "def f(x):", "\x00", "é\u202e\U0001f600", "%s%n", "../../etc", "{{ 1 }}", "a" * 300)
# Port 1 of this machine refuses; nothing else that parses as an address is ever made.
_GRPC_ADDRESSES: Final = ("127.0.0.1:1", "", "no address", "127.0.0.1:99999", "\x00", "[::1]:1")
_RANK_ADDRESSES: Final = (
    "ucx://127.0.0.1:1",
    "",
    "no address",
    "ucx://",
    "inproc://x",
    "nccl://127.0.0.1:1",
    "ucx://[::1]:1",
)
MAX_LARGE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its full name, what its requests are, and whether there may be several in one call."""

    path: str
    request_class: type[Message]
    is_stream: bool


@dataclass(frozen=True, slots=True)
class Names:
    """What a peer would know: values that get a message past the first checks."""

    worker_id: str = ""
    incarnation: str = ""
    layout_fingerprint: str = ""
    model: str = ""
    ticket: kv_pb2.Ticket = dataclass_field(default_factory=kv_pb2.Ticket)  # of the decode worker, for anybody


def _methods_of(service: ServiceDescriptor) -> list[Method]:
    methods = [
        Method(f"/{service.full_name}/{method.name}", GetMessageClass(method.input_type), method.client_streaming)
        for method in service.methods
    ]
    return [method for method in methods if method.path not in _LEFT_OUT]


_EVERYWHERE: Final = [
    *_methods_of(health_pb2.DESCRIPTOR.services_by_name["Health"]),
    *_methods_of(reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]),
]
_WORKER: Final = [*_methods_of(worker_pb2.DESCRIPTOR.services_by_name["Worker"]), *_EVERYWHERE]
METHODS: Final = {
    "router": [*_methods_of(inference_pb2.DESCRIPTOR.services_by_name["Inference"]), *_EVERYWHERE],
    "prefill": [*_methods_of(prefill_pb2.DESCRIPTOR.services_by_name["Prefill"]), *_WORKER],
    "decode": [*_methods_of(decode_pb2.DESCRIPTOR.services_by_name["Decode"]), *_WORKER],
}


class MessageMaker:
    """Makes serialized requests; the same generator makes the same ones."""

    def __init__(self, rng: random.Random, names: Names) -> None:
        self._rng = rng
        self._names = names
        self._kinds: Sequence[tuple[Callable[[Method], bytes], int]] = (
            (self._noise, 15),
            (self._made, 45),
            (self._damaged, 38),
            (self._large, 2),
        )

    def call(self, method: Method) -> list[bytes]:
        """The requests of one call. A stream that has to begin with something mostly does."""
        dialogue = DIALOGUES.get(method.path)
        if dialogue is not None and self._rng.random() < 0.6:
            return [self._on_loopback(method, each) for each in self._almost_right(dialogue)]
        num_requests = self._rng.randint(0, 6) if method.is_stream else 1
        return [self._request(method) for _ in range(num_requests)]

    def _almost_right(self, dialogue: Dialogue) -> list[bytes]:
        """What a peer says that keeps to the rules, but for a value, some bytes, or a message too few or too many."""
        said = dialogue(self._rng, self._names.ticket)
        if self._rng.random() < 0.6:
            self._set_one(self._rng.choice(said))
        payloads = [each.SerializeToString() for each in said]
        match self._rng.randrange(8):
            case 0:
                payloads.pop(self._rng.randrange(len(payloads)))
            case 1:
                payloads.append(self._rng.choice(payloads))
            case 2:
                at = self._rng.randrange(len(payloads))
                payloads[at] = self._damage(payloads[at])
            case 3:
                self._rng.shuffle(payloads)
        return payloads

    def _set_one(self, message: Message) -> None:
        """Any value to one field, at any depth."""
        present: list[Any] = [field for field, _ in message.ListFields()]
        inner = [field for field in present if field.message_type is not None and not field.is_repeated]
        if inner and self._rng.random() < 0.8:
            self._set_one(getattr(message, self._rng.choice(inner).name))
            return
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if fields:
            chosen = self._rng.choice(fields)
            message.ClearField(chosen.name)
            self._set(message, chosen, 1)

    def _request(self, method: Method) -> bytes:
        kinds, weights = zip(*self._kinds, strict=True)
        (make,) = self._rng.choices(kinds, weights)
        return self._on_loopback(method, make(method))

    def _on_loopback(self, method: Method, payload: bytes) -> bytes:
        """The request, unless damage has made another address of one that somebody would dial."""
        if method.request_class is not prefill_pb2.PrefillRequest:
            return payload
        try:
            request = prefill_pb2.PrefillRequest.FromString(payload)
        except DecodeError:
            return payload
        ticket, own = request.ticket, self._names.ticket
        if ticket.handoff_address in (own.handoff_address, *_GRPC_ADDRESSES) and all(
            address in (*own.rank_addresses, *_RANK_ADDRESSES) for address in ticket.rank_addresses
        ):
            return payload
        request.ticket.CopyFrom(kv_pb2.Ticket(ticket_id=ticket.ticket_id, handoff_address=_GRPC_ADDRESSES[0]))
        request.ticket.rank_addresses.append(_RANK_ADDRESSES[0])
        return request.SerializeToString()

    def _noise(self, _: Method) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 3, 17, 300)))

    def _made(self, method: Method) -> bytes:
        message = method.request_class()
        self._fill(message, 0)
        return message.SerializeToString()

    def _damaged(self, method: Method) -> bytes:
        """A made one with bytes changed, cut out, doubled, or its end missing."""
        return self._damage(self._made(method))

    def _damage(self, whole: bytes) -> bytes:
        payload = bytearray(whole)
        for _ in range(self._rng.randint(1, 6)):
            at = self._rng.randrange(len(payload) + 1)
            match self._rng.randrange(4):
                case 0:
                    payload[at : at + 1] = self._rng.randbytes(1)
                case 1:
                    del payload[at : at + self._rng.randint(1, 8)]
                case 2:
                    payload[at:at] = payload[at : at + 16]
                case _:
                    del payload[at:]
        return bytes(payload)

    def _large(self, method: Method) -> bytes:
        """An unknown field of many bytes, a repeated field of many entries, or deep nesting."""
        size = self._rng.choice((1 << 14, 1 << 18, MAX_LARGE_BYTES))
        match self._rng.randrange(3):
            case 0:
                return self._made(method) + _field(1000, self._rng.randbytes(size))
            case 1:
                entry = _field(self._rng.randint(1, 15), _field(self._rng.randint(1, 8), self._rng.randbytes(2)))
                return entry * (size // len(entry))
            case _:
                nested = b""
                for _ in range(200):
                    nested = _field(self._rng.randint(1, 3), nested)
                return nested

    def _fill(self, message: Message, depth: int) -> None:
        oneofs = {
            oneof.name: self._rng.choice([each.name for each in oneof.fields]) for oneof in message.DESCRIPTOR.oneofs
        }
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        for field in fields:
            chosen = field.containing_oneof
            if chosen is not None and oneofs[chosen.name] != field.name:
                continue
            if self._rng.random() < (0.15 if depth else 0.05):
                continue
            self._set(message, field, depth)

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        holder: Any = message
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            values = getattr(holder, field.name)
            for _ in range(self._rng.choice((0, 0, 1, 3))):
                key = self._scalar(entry.fields_by_name["key"])
                values[key] = self._scalar(entry.fields_by_name["value"])
        elif field.is_repeated:
            values = getattr(holder, field.name)
            for _ in range(self._rng.choice((0, 1, 1, 2, 5, 70))):
                if entry is not None:
                    if depth < 4:
                        self._fill(values.add(), depth + 1)
                else:
                    values.append(self._scalar(field))
        elif entry is not None:
            if depth < 6:
                getattr(holder, field.name).SetInParent()
                self._fill(getattr(holder, field.name), depth + 1)
        else:
            setattr(holder, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self._rng.random() < 0.5
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._text(field.name)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._rng.randbytes(self._rng.choice((0, 1, 32, 200)))
        if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
            return self._rng.choice(_FLOATS)
        if field.type == FieldDescriptor.TYPE_ENUM:
            return self._rng.choice((0, 1, 2, 77))
        return self._integer(field)

    def _integer(self, field: FieldDescriptor) -> int:
        bits = 32 if field.type in _NARROW else 64
        if self._rng.random() < 0.6:
            return self._rng.choice((1, 2, 3, 5, 30, 60, 100, 1000))  # what gets past checks
        return self._rng.choice(_INTEGERS) & ((1 << (bits - 1)) - 1 if field.type in _SIGNED else (1 << bits) - 1)

    def _text(self, name: str) -> str:
        known = {
            "handoff_address": self._rng.choice(_GRPC_ADDRESSES),
            "rank_addresses": self._rng.choice(_RANK_ADDRESSES),
            "layout_fingerprint": self._names.layout_fingerprint,
            "decode_worker_id": self._names.worker_id,
            "decode_incarnation": self._names.incarnation,
            "session_id": f"fuzz-{self._rng.randrange(4)}",
            "model": self._names.model,
            "role": self._rng.choice(("user", "assistant", "system", "x")),
        }
        if name in known and (name.endswith(("address", "addresses")) or self._rng.random() < 0.9):
            return known[name]
        return self._rng.choice(_TEXTS)


_NARROW: Final = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32}
_SIGNED: Final = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64}


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field as protobuf writes it."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
