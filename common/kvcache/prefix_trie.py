"""Which block holds the KV of which prefix: a trie with one block per node, addressed by block hash.

Not a radix tree: a chained hash already names its whole prefix, so one flat dictionary finds any node
without walking edges, and merging runs of blocks into edges would save nothing, yet bring back splitting on
insert and on eviction. Only leaves are evicted, so the ancestors of a node are always there and the longest
match is a binary search. Knows neither reference counts nor tokens: the owner says when a block is idle
(nobody holds it) and when busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import InternalError
from common.kvcache.eviction import EvictionQueue


@dataclass(slots=True, eq=False)
class _Node:
    block_hash: bytes
    block_id: int
    parent: _Node | None
    idle: bool = False
    num_children: int = 0
    last_used: int = 0


class PrefixTrie:
    """Idle leaves are the candidates for eviction."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._by_block: dict[int, _Node] = {}
        self._candidates = EvictionQueue()
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Length of the longest prefix of `hashes` that is here. Does not modify the trie."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in self._nodes:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, block_hash: bytes) -> int | None:
        """The block with this hash. Does not modify the trie."""
        node = self._nodes.get(block_hash)
        return None if node is None else node.block_id

    def insert(self, block_hash: bytes, parent_hash: bytes | None, block_id: int) -> None:
        """Add a busy block below its parent (None: a first block), which must be here and busy as well."""
        if block_hash in self._nodes or block_id in self._by_block:
            raise InternalError(f"block {block_id} or its hash is already in the prefix trie")
        parent = None
        if parent_hash is not None:
            parent = self._nodes.get(parent_hash)
            if parent is None or parent.idle:
                raise InternalError(f"the parent of block {block_id} is idle or not in the prefix trie")
            parent.num_children += 1
        node = _Node(block_hash, block_id, parent)
        self._nodes[block_hash] = node
        self._by_block[block_id] = node

    def mark_busy(self, block_id: int) -> None:
        """A sequence holds the block: it cannot be evicted."""
        self._by_block[block_id].idle = False
        self._candidates.discard(block_id)

    def mark_idle(self, block_id: int) -> None:
        """Nobody holds the block any more; it was last used now."""
        node = self._by_block[block_id]
        self._clock += 1
        node.last_used = self._clock
        node.idle = True
        self._queue_if_candidate(node)

    def evict(self, num_blocks: int) -> list[int]:
        """Forget so many nodes, each time the idle leaf that was last used longest ago; fewer if there are no more.

        Returns their blocks, in that order.
        """
        evicted: list[int] = []
        block_id = self._candidates.pop() if num_blocks > 0 else None
        while block_id is not None:
            evicted.append(block_id)
            node = self._by_block.pop(block_id)
            del self._nodes[node.block_hash]
            parent = node.parent
            if parent is not None:
                parent.num_children -= 1
            if len(evicted) == num_blocks:
                if parent is not None:
                    self._queue_if_candidate(parent)
                break
            if parent is not None and parent.idle and parent.num_children == 0:
                block_id = self._candidates.push_and_pop(parent.block_id, parent.last_used)
            else:
                block_id = self._candidates.pop()
        return evicted

    def _queue_if_candidate(self, node: _Node) -> None:
        if node.idle and node.num_children == 0:
            self._candidates.push(node.block_id, node.last_used)

    def block_ids(self) -> set[int]:
        return set(self._by_block)

    def check_integrity(self, busy_blocks: set[int]) -> None:
        """Verify links, child counts, candidates and that a busy block has only busy ancestors; O(nodes).

        That last one makes every idle block evictable, leaf by leaf.
        """
        children = Counter(id(node.parent) for node in self._nodes.values() if node.parent is not None)
        if len(self._nodes) != len(self._by_block):
            raise InternalError("the prefix trie's two indexes differ in size")
        for node in self._nodes.values():
            where = f"block {node.block_id} of the prefix trie"
            if self._by_block.get(node.block_id) is not node:
                raise InternalError(f"{where} is indexed under another node")
            if node.num_children != children[id(node)]:
                raise InternalError(f"{where} counts {node.num_children} children, has {children[id(node)]}")
            if node.idle == (node.block_id in busy_blocks):
                raise InternalError(f"{where} is marked idle={node.idle}, which is wrong")
            if (node.block_id in self._candidates) != (node.idle and node.num_children == 0):
                raise InternalError(f"{where} is wrongly (not) a candidate for eviction")
            _check_parent(node, self._nodes)


def _check_parent(node: _Node, nodes: dict[bytes, _Node]) -> None:
    parent = node.parent
    if parent is None:
        return
    if nodes.get(parent.block_hash) is not parent:
        raise InternalError(f"the parent of block {node.block_id} was evicted before it")
    if parent.idle and not node.idle:
        raise InternalError(f"block {node.block_id} is busy below the idle block {parent.block_id}")
