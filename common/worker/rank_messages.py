"""Messages between a front and one of its ranks besides step plans: start-up, and moving KV bytes.

Start-up and steps travel on the step channel, in order. KV messages travel on the KV channel: the front numbers each
operation with `op_id`, the rank answers each exactly once (a receive twice: posted, then done).
"""

import msgspec

from common.worker.step_plan import AddRow, RemoveRow, StepMessage, StepPlan, StepResult


class StartRank(StepMessage, frozen=True, array_like=True, tag=True):
    """Everything a rank needs to know; first message on the step channel.

    `dtype`: `auto`, `float32`, `bfloat16` or `float16`. `group_address`: rendezvous of the worker's ranks
    (`host:port`). `num_blocks`: KV blocks of `block_size` tokens. `num_slots` staging slots of `slot_bytes` each.
    `transport_url`: where to listen, or only to connect from unless `listens`. `peer_name`: how this rank names
    itself to peers. `corrupt_every`: fault injection for tests, flips a bit in every n-th leg that is sent (0:
    never). `first_device`: rank i takes the device `first_device` + i. `random_weights`: draw them instead of
    reading them. `captures_steps`: most steps have one token a row, so a GPU captures those.
    `captured_chunk_tokens`: it captures steps with up to so many tokens of prompts too (0: none), beside such rows
    if it captures these.
    """

    rank: int
    tp_size: int
    group_address: str
    model_dir: str
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_rows: int
    max_step_tokens: int
    num_slots: int
    slot_bytes: int
    transport_url: str
    transport_progress: str
    peer_name: str
    corrupt_every: int = 0
    first_device: int = 0
    random_weights: bool = False
    captures_steps: bool = False
    captured_chunk_tokens: int = 0
    listens: bool = True


class RankReady(StepMessage, frozen=True, array_like=True, tag=True):
    """The rank has its weights and its memory. `transport_address` is what peers connect to."""

    rank: int
    transport_address: str
    layout_fingerprint: str
    num_parameters: int
    kv_bytes: int


class RankFailed(StepMessage, frozen=True, array_like=True, tag=True):
    """The rank cannot start or go on; it exits after this. `kind` is a class name of `common.errors`."""

    rank: int
    kind: str
    detail: str


class KVMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on the KV channel."""

    op_id: int


class ConnectPeer(KVMessage, frozen=True, array_like=True, tag=True):
    """Connect to a decode rank, or do nothing if the connection stands. `secret`: what the hello bears."""

    address: str
    secret: bytes
    timeout_s: float


class ConnectDone(KVMessage, frozen=True, array_like=True, tag=True):
    """`lane`: scheme and lane, such as `ucx:tcp`. `error_kind` is empty on success."""

    lane: str
    error_kind: str = ""
    detail: str = ""


class SendLeg(KVMessage, frozen=True, array_like=True, tag=True):
    """Gather heads and layers of blocks into [offset, offset + num_bytes) of a staging slot, then send that to a peer.

    `first_local_head` counts this rank's own KV heads. `step_id` is a plan that the rank has been or will be sent; the
    gather begins when that step has stored the layers (-1: they are there).
    """

    address: str
    secret: bytes
    slot: int
    offset: int
    num_bytes: int
    tag: int
    block_ids: list[int]
    first_local_head: int
    num_heads: int
    first_layer: int
    num_layers: int
    step_id: int
    timeout_s: float


class SendDone(KVMessage, frozen=True, array_like=True, tag=True):
    """The slot may be reused if `slot_free`; if not, a `SlotDrained` with this op_id follows when it may.

    `send_ns`: gather and bytes on the wire."""

    gather_ns: int
    send_ns: int
    slot_free: bool
    error_kind: str = ""
    detail: str = ""


class PostReceive(KVMessage, frozen=True, array_like=True, tag=True):
    """Post a receive for one leg into [offset, offset + num_bytes) of a staging slot.

    When it is complete and its digest is right, it is scattered to the given heads and layers of the blocks.
    Answered by `ReceivePosted`, and if that has no error by `ReceiveDone` in the end.
    """

    peer_name: str
    peer_secret: bytes
    slot: int
    offset: int
    num_bytes: int
    tag: int
    block_ids: list[int]
    first_local_head: int
    num_heads: int
    first_layer: int
    num_layers: int
    connect_timeout_s: float


class ReceivePosted(KVMessage, frozen=True, array_like=True, tag=True):
    """Only after this may the tag be told to the peer. With an error nothing was posted."""

    error_kind: str = ""
    detail: str = ""


class Scattered(msgspec.Struct, frozen=True, array_like=True):
    """What a rank wrote into its KV blocks: heads, counted from its own first, and layers of blocks."""

    first_local_head: int
    num_heads: int
    first_layer: int
    num_layers: int
    block_ids: list[int]


class ReceiveDone(KVMessage, frozen=True, array_like=True, tag=True):
    """The leg is in the KV blocks (`scattered`), or it failed (`error_kind`, a class name of `common.errors`).

    After a failure, cancel the receive to learn what became of the slot.
    `transfer_ns`: from the message's arrival to complete. `verify_ns`: digest and scatter."""

    transfer_ns: int
    verify_ns: int
    error_kind: str = ""
    detail: str = ""
    scattered: Scattered | None = None


class CancelReceive(KVMessage, frozen=True, array_like=True, tag=True):
    """Take back the receive that `op_id` posted. Its KV blocks are never written after the answer."""

    timeout_s: float


class CancelDone(KVMessage, frozen=True, array_like=True, tag=True):
    """`outcome` is a `CancelOutcome` value. After `in_doubt` a `SlotDrained` with the same op_id follows."""

    outcome: str


class SlotDrained(KVMessage, frozen=True, array_like=True, tag=True):
    """The connection behind an operation in doubt is closed and drained: its part of the slot is reusable."""


class GetTransportStats(KVMessage, frozen=True, array_like=True, tag=True):
    """Ask for counters."""


class TransportStatsReply(KVMessage, frozen=True, array_like=True, tag=True):
    """`common.transport.base.TransportStats`, field by field."""

    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int
    stale_messages: int
    connections: int


FrontStepMessage = StartRank | AddRow | RemoveRow | StepPlan
RankStepMessage = RankReady | RankFailed | StepResult
FrontKVMessage = ConnectPeer | SendLeg | PostReceive | CancelReceive | GetTransportStats
RankKVMessage = ConnectDone | SendDone | ReceivePosted | ReceiveDone | CancelDone | SlotDrained | TransportStatsReply
