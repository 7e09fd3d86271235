"""The KV blocks of sequences: reserved, verified, offered to the prefix cache, held until nobody writes to them. Pure.

A plan or a transfer *holds* the sequences that it touches. The blocks of a sequence that is gone are released with its
last hold; until then it is *dying*. Who gets blocks, and who gives way for them, is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common.errors import InternalError, InvalidArgument
from common.kvcache.block_hash import hash_block, hash_blocks, root_hash, tenant_salt
from common.kvcache.kv_cache_manager import KVCacheManager, KVCacheStats, SequenceBlocks
from common.worker.sequence import SequenceRequest
from services.decode.request import DecodeSequence, SequenceState


class BlockLedger:
    """Blocks of one incarnation of the ranks after the other; `make_kv` makes an empty cache for each."""

    def __init__(self, make_kv: Callable[[], KVCacheManager], model_digest: bytes) -> None:
        self._make_kv = make_kv
        self._kv = make_kv()
        self._model_digest = model_digest
        self._dying: set[DecodeSequence] = set()

    @property
    def block_size(self) -> int:
        return self._kv.block_size

    @property
    def has_dying(self) -> bool:
        """Whether blocks come back by themselves, within a step or a transfer."""
        return bool(self._dying)

    def stats(self) -> KVCacheStats:
        return self._kv.stats()

    def check_fits(self, request: SequenceRequest) -> None:
        """Alone in the pool, the sequence must be able to reach its last step (whose token needs no block)."""
        num_tokens = self._kv.num_blocks * self._kv.block_size + 1
        limit = num_tokens - request.num_prompt_tokens
        if limit < 1:
            shown = len(request.token_ids)
            raise InvalidArgument("sequence.token_ids", shown, f"at most {num_tokens - 1} tokens fit into the KV cache")
        if request.sampling.max_tokens > limit:
            raise InvalidArgument(
                "sampling.max_tokens", request.sampling.max_tokens, f"at most {limit}: the KV cache holds no more"
            )

    def admit(self, request: SequenceRequest) -> tuple[SequenceBlocks, list[bytes]]:
        """What is cached of a sequence, held from now on, and the hashes of its full blocks."""
        salt = tenant_salt(request.tenant, self._model_digest)
        hashes = hash_blocks(request.token_ids, self._kv.block_size, salt)
        max_cached = (len(request.token_ids) - 1) // self._kv.block_size
        return self._kv.admit(hashes, max_cached_blocks=max_cached), hashes

    def extend(self, seq: DecodeSequence, num_blocks: int) -> bool:
        """Give the sequence so many blocks in all; False, without effect, if there are too few."""
        return self._kv.extend(seq.blocks, num_blocks)

    def fill_handoff(self, seq: DecodeSequence, num_active: int) -> bool:
        """Give the sequence all blocks of its hand-off, or none. Leaves a block for each active sequence to grow
        into: a newcomer must not force a preemption at once."""
        num_new = seq.num_handoff_blocks - len(seq.blocks.block_ids)
        return num_new + num_active <= self._kv.num_available and self._kv.extend(seq.blocks, seq.num_handoff_blocks)

    def verify(self, seq: DecodeSequence, blocks: Iterable[int]) -> None:
        """Blocks of a hand-off are in place; a leading run of them that is final is offered to the prefix cache."""
        seq.verified.update(blocks)
        while seq.num_verified in seq.verified:
            seq.verified.remove(seq.num_verified)
            seq.num_verified += 1
        self._commit_handoff(seq)

    def finalize(self, seq: DecodeSequence, num_blocks: int) -> None:
        """So many leading blocks are what the model computes: before that, they must not be cached."""
        if num_blocks > seq.num_final:
            seq.num_final = num_blocks
            self._commit_handoff(seq)

    def commit_computed(self, seq: DecodeSequence) -> None:
        """Offer the full blocks of the prompt that are in place to the prefix cache."""
        self._kv.commit(seq.blocks, seq.hashes, min(seq.num_computed // self._kv.block_size, len(seq.hashes)))

    def commit_all(self, seq: DecodeSequence) -> None:
        """Offer every full block to the prefix cache: a next turn, or the sequence itself, may come back to it.

        A plan in flight writes behind these blocks only.
        """
        if seq.num_computed < seq.num_handoff_tokens:
            self.commit_computed(seq)
            return
        block_size = self._kv.block_size
        num_full = (seq.num_computed + seq.num_stepped) // block_size
        parent = seq.hashes[-1] if seq.hashes else root_hash(tenant_salt(seq.request.tenant, self._model_digest))
        for index in range(len(seq.hashes), num_full):
            parent = hash_block(parent, seq.token_ids[index * block_size : (index + 1) * block_size])
            seq.hashes.append(parent)
        self._kv.commit(seq.blocks, seq.hashes, num_full)

    def _commit_handoff(self, seq: DecodeSequence) -> None:
        self._kv.commit(seq.blocks, seq.hashes, min(seq.num_verified, seq.num_final, len(seq.hashes)))

    def hold(self, seq: DecodeSequence) -> None:
        """Something may touch the sequence's blocks from now on."""
        seq.num_holds += 1

    def drop_hold(self, seq: DecodeSequence) -> None:
        """It touches them no more."""
        seq.num_holds -= 1
        assert seq.num_holds >= 0
        if seq.num_holds == 0 and seq in self._dying:  # not in it if the ranks were lost since
            self._dying.remove(seq)
            self._kv.release(seq.blocks)

    def release(self, seq: DecodeSequence) -> None:
        """The sequence is gone: its blocks are free with its last hold."""
        if seq.num_holds:
            self._dying.add(seq)
        else:
            self._kv.release(seq.blocks)

    def forget_all(self) -> None:
        """The ranks are gone and with them every block's content."""
        self._kv = self._make_kv()
        self._dying.clear()

    def check_integrity(self) -> None:
        """Verify blocks and holds from scratch. Raises `InternalError`."""
        self._kv.check_integrity()
        if any(seq.state is not SequenceState.GONE or seq.num_holds == 0 for seq in self._dying):
            raise InternalError("a sequence that is not held waits for its last hold")
