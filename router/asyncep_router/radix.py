"""The prefix view on SGLang's radix tree: one tree for all ranks, every node with its set of ranks.

Why one tree (figures of `bench/router_decide.py`, see `docs/internals/router.md`): with a tree per rank a decision
costs one walk per rank, 64 for 64 ranks, and a prefix that r ranks hold is stored r times. In one tree
the walk happens once, and which ranks hold how much falls out of it: rank sets only shrink on the way
down, so the set that drops out at a depth has exactly that depth.

SGLang gives the node, the key with its galloping comparison, page alignment, namespaces, splitting,
inserting, deleting and size accounting (`RadixCache`, simulated, without memory pools). Ours are the
rank sets, recency, and the index from block hash to node that the ranks' events need.

Recency: a use touches the whole path, deepest node first. So in every recency list a node comes after
all of its descendants, the oldest entry is always a leaf, and evicting is a pop from the front: no heap
over all leaves as in `RadixCache.evict`, whose pause would show in the slowest percent of decisions.

Importing this module imports SGLang (7-11 s, 1 GB): do it once, in the router process.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Any

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from typing_extensions import override

from asyncep_router.errors import ConfigError, IntegrityError
from asyncep_router.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, on_device
from asyncep_router.prefix import PrefixMatch
from asyncep_router.ranks import members

# A node, with three attributes more than SGLang's: `ranks` (bits), `hashes` (array('q'), one block hash a
# page, or None while no rank reported this node), `alive` (False once cut from the tree).
Node = Any


class _Span:
    """Stands where SGLang keeps a node's KV indices: it has a length and can be cut, and holds nothing."""

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, cut: slice) -> _Span:
        return _Span(len(range(*cut.indices(self.length))))

    def clone(self) -> _Span:
        return self


class SharedRadixTree(RadixCache):  # type: ignore[misc]  # SGLang is not followed by mypy
    """A `PrefixView`. Not thread-safe.

    `budget_tokens`: tokens stored at most, shared prefixes counted once. `page_size` as the ranks have it.
    """

    def __init__(self, budget_tokens: int, page_size: int = 1) -> None:
        if budget_tokens < 1:
            raise ConfigError(f"budget_tokens={budget_tokens!r}: must be at least 1")
        if page_size < 1:
            raise ConfigError(f"page_size={page_size!r}: must be at least 1")
        self._budget = budget_tokens
        self._recent: OrderedDict[Node, None] = OrderedDict()
        self._held: dict[int, OrderedDict[Node, None]] = {}
        self._tokens: dict[int, int] = {}
        self._capacity: dict[int, int] = {}
        self._by_hash: dict[int, Node] = {}
        self._version = 0
        self.unplaced_events = 0
        """Events about blocks that the view does not know (forgotten, or of another namespace)."""
        super().__init__(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=None,
                page_size=page_size,
            )
        )
        self.root_node.ranks = 0
        self.root_node.hashes = None

    # PrefixView

    @property
    def version(self) -> int:
        return self._version

    @property
    def total_tokens(self) -> int:
        return int(self.evictable_size_)

    def match(self, token_ids: array[int], namespace: str | None = None) -> PrefixMatch:
        """One walk, no copies but the windows compared; see `PrefixView.match`."""
        page = self.page_size
        key = RadixKey(token_ids, namespace)
        end = len(token_ids) // page * page
        node = self.root_node
        offset = 0
        holding = -1  # all ranks hold the empty prefix
        steps: list[tuple[int, int]] = []
        while offset < end:
            child = node.children.get(key.child_key_at(offset, page))
            if child is None:
                break
            dropped = holding & ~child.ranks
            if dropped and offset:
                steps.append((offset, dropped))
            holding &= child.ranks
            if not holding:
                break
            same = child.key.match_at(key, offset, page)
            offset += same
            if same < len(child.key):
                break
            node = child
        if offset and holding:
            steps.append((offset, holding))
        steps.reverse()
        return PrefixMatch(tuple(steps))

    def insert(self, rank: int, token_ids: array[int], namespace: str | None = None) -> int:
        key = RadixKey(token_ids, namespace).page_aligned(self.page_size)
        if not len(key):
            return 0
        _, node = self._insert_helper(self.root_node, key, _Span(len(key)))
        added = self._hold(rank, node)
        self._shrink(rank)
        return added

    def tokens_of(self, rank: int) -> int:
        return self._tokens.get(rank, 0)

    def set_capacity(self, rank: int, tokens: int | None) -> None:
        if tokens is None:
            self._capacity.pop(rank, None)
            return
        if tokens < 0:
            raise ConfigError(f"capacity of rank {rank}={tokens!r}: must be at least 0")
        self._capacity[rank] = tokens
        self._shrink(rank)

    def evict(self, tokens: int) -> int:  # RadixCache's takes pool parameters; there are no pools here
        before = self.total_tokens
        while self._recent and before - self.total_tokens < tokens:
            node = next(iter(self._recent))
            for rank in members(node.ranks):
                self._forget(rank, node)
            self._cut(node)
        return before - self.total_tokens

    def clear(self, rank: int) -> None:
        # Front to back is leaves first, so nodes nobody else holds can be cut on the way.
        for node in list(self._held.get(rank, ())):
            self._drop(rank, node)

    def remove_rank(self, rank: int) -> None:
        self.clear(rank)
        self._held.pop(rank, None)
        self._tokens.pop(rank, None)
        self._capacity.pop(rank, None)

    def apply_event(self, rank: int, event: KVEvent) -> None:
        if isinstance(event, AllBlocksCleared):
            self.clear(rank)
        elif not on_device(event):
            return
        elif isinstance(event, BlockStored):
            self._stored(rank, event)
        else:
            self._removed(rank, event)

    def check_integrity(self) -> None:
        tokens: dict[int, int] = {}
        total = 0
        seen: set[Node] = set()
        stack = [(child, -1) for child in self.root_node.children.values()]
        while stack:
            node, above = stack.pop()
            seen.add(node)
            total += len(node.key)
            if not node.ranks or node.ranks & ~above:
                raise IntegrityError(f"rank set {node.ranks:b} under {above:b}: empty or not a subset")
            if len(node.key) % self.page_size:
                raise IntegrityError(f"a node of {len(node.key)} tokens with pages of {self.page_size}")
            for rank in members(node.ranks):
                tokens[rank] = tokens.get(rank, 0) + len(node.key)
                if node not in self._held[rank]:
                    raise IntegrityError(f"rank {rank} lacks a node of its own")
            for block in node.hashes or ():
                if self._by_hash.get(block) is not node:
                    raise IntegrityError(f"block {block} leads to another node")
            stack.extend((child, node.ranks) for child in node.children.values())
        held = {rank: count for rank, count in self._tokens.items() if count}
        if tokens != held:
            raise IntegrityError(f"tokens per rank: counted {tokens}, booked {held}")
        if total != self.total_tokens or total > self._budget:
            raise IntegrityError(f"tokens: counted {total}, booked {self.total_tokens}, of {self._budget}")
        if seen != set(self._recent):
            raise IntegrityError(f"{len(seen)} nodes in the tree, {len(self._recent)} in the recency list")
        if sum(len(node.hashes or ()) for node in seen) != len(self._by_hash):
            raise IntegrityError("the index of block hashes holds blocks that no node has")
        for order in (self._recent, *self._held.values()):
            position = {node: place for place, node in enumerate(order)}
            for node, place in position.items():
                if node.parent is not self.root_node and position[node.parent] < place:
                    raise IntegrityError("a node is older than its descendant")

    # Holding and dropping

    def _hold(self, rank: int, node: Node) -> int:
        """Mark the path to `node` as held and just used by `rank`. Returns the tokens new to it."""
        bit = 1 << rank
        held = self._held.setdefault(rank, OrderedDict())
        recent = self._recent
        added = 0
        root = self.root_node
        while node is not root:
            if not node.ranks & bit:
                node.ranks |= bit
                added += len(node.key)
            held[node] = None
            held.move_to_end(node)
            recent[node] = None
            recent.move_to_end(node)
            node = node.parent
        if added:
            self._tokens[rank] = self._tokens.get(rank, 0) + added
        self._version += 1
        return added

    def _shrink(self, rank: int) -> None:
        """Keep to the rank's capacity and to the budget of the whole."""
        capacity = self._capacity.get(rank)
        if capacity is not None:
            while self._tokens.get(rank, 0) > capacity:
                self._drop(rank, next(iter(self._held[rank])))
        if self.total_tokens > self._budget:
            self.evict(self.total_tokens - self._budget)

    def _forget(self, rank: int, node: Node) -> None:
        """Take one node from one rank; the caller sees to its descendants."""
        node.ranks &= ~(1 << rank)
        del self._held[rank][node]
        self._tokens[rank] -= len(node.key)

    def _drop(self, rank: int, node: Node) -> None:
        """As `_forget`, for a node none of whose descendants `rank` holds; cuts what nobody holds."""
        self._forget(rank, node)
        self._version += 1
        if not node.ranks:
            self._cut(node)

    def _cut(self, leaf: Node) -> None:
        """Remove a leaf that no rank holds from the tree."""
        del self._recent[leaf]
        for block in leaf.hashes or ():
            del self._by_hash[block]
        self._version += 1
        self._delete_leaf(leaf)

    # SGLang's own steps, completed

    @override
    def _insert_helper(
        self, node: Node, key: RadixKey, value: _Span, priority: int = 0, inserted_len: int = 0
    ) -> tuple[int, Node]:
        prefix_len, last = super()._insert_helper(node, key, value, priority, inserted_len)
        if not hasattr(last, "ranks"):  # a new leaf; split nodes got theirs in `_split_node`
            last.ranks = 0
            last.hashes = None
        return prefix_len, last

    @override
    def _split_node(self, key: RadixKey, child: Node, split_len: int) -> Node:
        upper = super()._split_node(key, child, split_len)
        upper.ranks = child.ranks
        upper.hashes = None
        if child.hashes is not None:
            pages = split_len // self.page_size
            upper.hashes, child.hashes = child.hashes[:pages], child.hashes[pages:]
            for block in upper.hashes:
                self._by_hash[block] = upper
        # The upper part must come after the lower in every list, and its ancestors after it.
        for rank in members(upper.ranks):
            self._touch(self._held[rank], upper)
        if child in self._recent:
            self._touch(self._recent, upper)
        return upper

    def _touch(self, order: OrderedDict[Node, None], node: Node) -> None:
        while node is not self.root_node:
            order[node] = None
            order.move_to_end(node)
            node = node.parent

    # Events

    def _stored(self, rank: int, event: BlockStored) -> None:
        if event.cache_salt is not None or event.lora_name is not None:
            self.unplaced_events += 1  # its namespace cannot be told from the event
            return
        if event.block_size != self.page_size:
            raise ConfigError(
                f"rank {rank} has pages of {event.block_size} tokens, the router was told {self.page_size}"
            )
        start = self.root_node
        if event.parent_block_hash is not None:
            known = self._by_hash.get(event.parent_block_hash)
            if known is None:
                self.unplaced_events += 1
                return
            start = self._ending_with(known, event.parent_block_hash)
        key = RadixKey(array("q", event.token_ids))
        _, node = self._insert_helper(start, key, _Span(len(key)))
        self._hold(rank, node)
        self._name_blocks(node, start, event.block_hashes)
        self._shrink(rank)

    def _name_blocks(self, last: Node, start: Node, hashes: list[int]) -> None:
        """Give the pages between `start` (exclusive) and `last` their hashes, from the end upwards."""
        end = len(hashes)
        node = last
        while node is not start and end > 0:
            pages = len(node.key) // self.page_size
            if node.hashes is None:
                # Hashes name contents, so all ranks agree on them. One that is taken already belongs to
                # another namespace with the same tokens; that node keeps it.
                mine = hashes[end - pages : end]
                if not any(block in self._by_hash for block in mine):
                    node.hashes = array("q", mine)
                    for block in mine:
                        self._by_hash[block] = node
            end -= pages
            node = node.parent

    def _ending_with(self, node: Node, block: int) -> Node:
        """The node whose last page is `block`, split off if need be."""
        pages = node.hashes.index(block) + 1
        if pages == len(node.hashes):
            return node
        return self._split_node(node.key, node, pages * self.page_size)

    def _removed(self, rank: int, event: BlockRemoved) -> None:
        bit = 1 << rank
        placed = False
        for block in event.block_hashes:
            node = self._by_hash.get(block)
            if node is None:
                continue  # often cut a moment ago, together with a block before it
            placed = True
            if not node.ranks & bit:
                continue
            before = node.hashes.index(block)
            if before:
                self._split_node(node.key, node, before * self.page_size)
                # `_split_node` leaves the lower part, which begins with `block`, in the old object.
            self._drop_subtree(rank, node)
        self.unplaced_events += not placed

    def _drop_subtree(self, rank: int, node: Node) -> None:
        bit = 1 << rank
        stack, order = [node], []
        while stack:
            current = stack.pop()
            order.append(current)
            stack.extend(child for child in current.children.values() if child.ranks & bit)
        for current in reversed(order):
            self._drop(rank, current)


def new_view(budget_tokens: int, page_size: int = 1) -> SharedRadixTree:
    """A `PrefixView` on SGLang's tree."""
    return SharedRadixTree(budget_tokens, page_size)


__all__ = ["SharedRadixTree", "TreeNode", "new_view"]
