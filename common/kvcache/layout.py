"""Sizes of KV blocks, which rank owns which KV heads, and which rank sends what to whom.

Heads are numbered globally. A *leg* is what one prefill rank sends to one decode rank for one chunk: K and V of a run
of heads, of the layers and blocks of the chunk. Knows neither memory nor transports; the order of bytes in a leg is
the kernels' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from common.errors import InvalidArgument, TransferError
from common.message_bounds import MAX_RANKS, check_count

HEADER_BYTES = 64  # in front of every leg: its identity and digest
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_FINGERPRINT_BYTES = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a model's KV cache, over all ranks of a worker."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # a name in DTYPE_BYTES

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidArgument(name, value, "must be at least 1")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidArgument("dtype", self.dtype, f"must be one of {sorted(DTYPE_BYTES)}")

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def block_bytes(self, num_heads: int) -> int:
        """Bytes of one block of `num_heads` heads: all layers, K and V."""
        return self.num_layers * 2 * num_heads * self.block_size * self.head_dim * self.itemsize

    def layer_block_bytes(self, num_heads: int) -> int:
        """Bytes of one layer of one block of `num_heads` heads, K and V."""
        return self.block_bytes(num_heads) // self.num_layers

    def leg_bytes(self, num_blocks: int, num_layers: int, num_heads: int) -> int:
        """Bytes of one leg's message, header included."""
        return HEADER_BYTES + num_blocks * num_layers * self.layer_block_bytes(num_heads)

    def max_layer_blocks_per_slot(self, slot_bytes: int, num_heads_on_rank: int, num_legs: int = 1) -> int:
        """Blocks times layers that fit into one rank's slot when its heads arrive in `num_legs` legs."""
        return max(0, slot_bytes - num_legs * HEADER_BYTES) // self.layer_block_bytes(num_heads_on_rank)

    def fingerprint(self, model_digest: bytes, protocol_version: int) -> str:
        """Hex digest that two workers must share to be paired; their tensor-parallel sizes may differ."""
        canonical = (
            f"baton-kv protocol={protocol_version} model={model_digest.hex()} layers={self.num_layers} "
            f"kv_heads={self.num_kv_heads} head_dim={self.head_dim} block_size={self.block_size} "
            f"dtype={self.dtype}"
        )
        return blake2b(canonical.encode(), digest_size=_FINGERPRINT_BYTES).hexdigest()


@dataclass(frozen=True, slots=True)
class Leg:
    """A run of heads that goes from one prefill rank to one decode rank."""

    prefill_rank: int
    decode_rank: int
    first_head: int
    num_heads: int


def heads_of_rank(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """Heads that a rank holds: an equal contiguous share or, with more ranks than heads, a replica of one."""
    if num_kv_heads < 1:
        raise InvalidArgument("num_kv_heads", num_kv_heads, "must be at least 1")
    if tp_size < 1 or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        raise InvalidArgument("tp_size", tp_size, f"must divide {num_kv_heads} KV heads, or be a multiple")
    if not 0 <= rank < tp_size:
        raise InvalidArgument("rank", rank, f"must be below {tp_size}")
    first = rank * num_kv_heads // tp_size
    return range(first, first + max(1, num_kv_heads // tp_size))


def plan_legs(num_kv_heads: int, prefill_tp: int, decode_tp: int) -> list[Leg]:
    """Legs that bring every decode rank each of its heads once, ordered by decode rank and head.

    Where several prefill ranks hold a head, its receivers are dealt out over them in order, so that no
    replica serves more than its share, rounded up. Raises `InvalidArgument` for sizes that do not fit.
    """
    check_count("prefill_tp_size", prefill_tp, MAX_RANKS, least=1)
    check_count("decode_tp_size", decode_tp, MAX_RANKS, least=1)
    legs: list[Leg] = []
    for decode_rank in range(decode_tp):
        for head in heads_of_rank(num_kv_heads, decode_tp, decode_rank):
            sources = _holders(num_kv_heads, prefill_tp, head)
            receivers = _holders(num_kv_heads, decode_tp, head)
            share = (decode_rank - receivers.start) * len(sources) // len(receivers)
            _append_head(legs, sources[share], decode_rank, head)
    return legs


def _holders(num_kv_heads: int, tp_size: int, head: int) -> range:
    """The ranks that hold a head: always a run."""
    held_by_each = len(heads_of_rank(num_kv_heads, tp_size, 0))
    num_holders = max(1, tp_size // num_kv_heads)
    first = head // held_by_each * num_holders
    return range(first, first + num_holders)


def _append_head(legs: list[Leg], prefill_rank: int, decode_rank: int, head: int) -> None:
    """Grow the last leg by one head if it has the same two ends, else start another."""
    if legs and (legs[-1].prefill_rank, legs[-1].decode_rank) == (prefill_rank, decode_rank):
        last = legs.pop()
        legs.append(Leg(prefill_rank, decode_rank, last.first_head, last.num_heads + 1))
    else:
        legs.append(Leg(prefill_rank, decode_rank, head, 1))


class Coverage:
    """What has arrived of one chunk on a decode worker: every head of every rank once, in all layers of all blocks.

    What a chunk needs follows from the layout and the chunk alone, not from the legs that were planned for it.
    """

    def __init__(self, num_kv_heads: int, decode_tp: int, layers: range, block_ids: Sequence[int]) -> None:
        self._layers = layers
        self._block_ids = list(block_ids)
        self._own_heads = [heads_of_rank(num_kv_heads, decode_tp, rank) for rank in range(decode_tp)]
        self._missing = [set(range(len(heads))) for heads in self._own_heads]

    def mark(self, rank: int, local_heads: range, layers: range, block_ids: Sequence[int]) -> None:
        """A rank has written these heads, counted from its own first. Raises `TransferError` for what does not belong
        to the chunk or was written before."""
        if layers != self._layers or list(block_ids) != self._block_ids:
            raise TransferError(f"rank {rank} wrote other layers or blocks than the chunk's")
        written = set(local_heads)
        if not written or not written <= self._missing[rank]:
            first = self._own_heads[rank].start
            raise TransferError(
                f"rank {rank} wrote heads [{first + local_heads.start}, {first + local_heads.stop}), "
                f"which were written before or are not its own"
            )
        self._missing[rank] -= written

    def check_complete(self) -> None:
        """Raises `TransferError` if a head is missing."""
        for rank, missing in enumerate(self._missing):
            if missing:
                heads = sorted(self._own_heads[rank].start + head for head in missing)
                raise TransferError(f"heads {heads} of rank {rank} did not arrive")
