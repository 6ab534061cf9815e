"""Requests that wait in the router, arranged so that those sharing a prefix travel together.

A compressed trie over the block hashes of the pending prompts (`block_chain.py`). Every node knows which
ranks are thought to hold its prefix (its *owners*; never fewer than its children's), and requests wait in
queues, here called groups:

- a request belongs to the group of the deepest owned node above it: the longest prefix some rank holds;
- if no node above it is owned, to the group of its topmost node: everything it shares anything with.

So a rank asking for work finds, without looking at single requests: groups it owns, groups nobody owns,
and groups of others to steal from. Whoever takes the first request of a group becomes an owner, which is
what keeps the rest of the group together on that rank. `serve` moves a rank down into the part of the
trie that it just used and up again when that is drained: depth first, so every prefix is computed once
even where a rank's cache holds few.

A group can be *parked* for a rank: its prefix is on the way there but not computed yet. Ranks compute the
prompts of one batch independently of each other, so company of a prompt should come one batch after it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from typing import TYPE_CHECKING

from asyncep_router.errors import IntegrityError
from asyncep_router.ranks import members

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncep_router.fairness import Flow
    from asyncep_router.messages import Request
    from asyncep_router.prefix import PrefixMatch

# Owners beyond the four longest matches are not marked: each may cost a split, and a rank that holds less
# than three others do is not where the request should go.
_MATCH_STEPS = 4


class Entry:
    """A pending request and its place. `seq` is the order of submission; it survives a rank's death.

    `chain`: hashes of its blocks, never empty. `flops`: estimate of its net cost, for weighing groups.
    The rest is the policy's: `match` as of `version` of the view, and in flight `warms`, the blocks it
    computes. `bulk`, `flow_name`, `flow` and `queue`: where `fairness.py` has put it, and `weight` its weight there.
    """

    __slots__ = (
        "bulk",
        "chain",
        "flops",
        "flow",
        "flow_name",
        "group",
        "match",
        "node",
        "queue",
        "request",
        "seq",
        "version",
        "warms",
        "weight",
    )

    def __init__(self, request: Request, seq: int, chain: tuple[int, ...]) -> None:
        self.request = request
        self.seq = seq
        self.chain = chain
        self.flops = 0
        self.match: PrefixMatch | None = None
        self.version = -1
        self.warms: tuple[int, ...] = ()
        self.node: _Node | None = None
        self.group: Group | None = None
        self.bulk: bool | None = None
        self.flow: Flow | None = None
        self.flow_name = ""
        self.weight = 0.0
        self.queue: PrefixQueue | None = None


class _Node:
    """`edge`: block hashes from the parent's depth (exclusive) down to `depth`, in blocks.

    `entries`: prompts that end here. `count`: prompts here and below.
    """

    __slots__ = ("children", "count", "depth", "edge", "entries", "group", "owners", "parent")

    def __init__(self, parent: _Node | None, edge: tuple[int, ...], depth: int) -> None:
        self.parent = parent
        self.edge = edge
        self.depth = depth
        self.children: dict[int, _Node] = {}
        self.entries: dict[int, Entry] = {}
        self.count = 0
        self.owners = 0
        self.group: Group | None = None


class Group:
    """A queue of entries in order of submission, with their FLOPs and prompt tokens.

    `loose`: what they share is the lesser part of them. `parked`: ranks that are computing what they share.
    """

    __slots__ = ("alive", "flops", "loose", "node", "parked", "queue", "tokens")

    def __init__(self, node: _Node) -> None:
        self.node = node
        self.queue: OrderedDict[int, Entry] = OrderedDict()
        self.flops = 0
        self.tokens = 0
        self.loose = False
        self.parked = 0
        self.alive = True

    @property
    def head(self) -> Entry:
        """The entry submitted first; the queue must not be empty."""
        return next(iter(self.queue.values()))

    def drop(self, entry: Entry) -> None:
        """Take an entry out of the queue."""
        del self.queue[entry.seq]
        self.flops -= entry.flops
        self.tokens -= len(entry.request.token_ids)


_Heap = list[tuple[int, int, Group]]  # (seq of a head at some time, tie-breaker, group)


class PrefixQueue:
    """Pending requests among which prefixes decide.

    `block`: tokens a block. `affinity`: share of a prompt from which a held prefix binds it to its owners;
    below that the group is loose, and any rank below T may take from it.
    """

    def __init__(self, block: int, affinity: float) -> None:
        self._block = block
        self._affinity = affinity
        self._root = _Node(None, (), 0)
        self._at: dict[int, _Node] = {}
        self._groups: dict[int, Group] = {}  # by id(node): groups with a node in the trie
        self._heaps: dict[int, _Heap] = {}
        self._free: _Heap = []
        self._loose: _Heap = []
        self._current: dict[int, Group] = {}
        self._tick = 0
        self._parked: dict[int, list[tuple[Group, float]]] = {}
        self.parked = 0
        """Ranks that groups are parked for."""
        self.owned = 0
        """Ranks that may own waiting work; a member may turn out to have none left."""

    def __len__(self) -> int:
        return self._root.count

    # In and out

    def add(self, entry: Entry, match: PrefixMatch) -> None:
        """File an entry; `match` says which ranks hold how much of it."""
        chain = entry.chain
        known = bisect_left(range(len(chain)), True, key=lambda i: chain[i] not in self._at)
        node = self._node_at(chain, known)
        if known < len(chain):
            node = self._grow(node, chain, known)
        for tokens, _ in match.steps[:_MATCH_STEPS]:
            depth = min(tokens // self._block, len(chain))
            if depth:
                self._node_at(chain, depth)
        entry.node = node = self._at[chain[-1]]
        node.entries[entry.seq] = entry
        climb: _Node | None = node
        while climb is not None:
            climb.count += 1
            climb = climb.parent
        self._file(entry)
        for tokens, ranks in reversed(match.steps[:_MATCH_STEPS]):
            depth = min(tokens // self._block, len(chain))
            if depth:
                self._own(self._at[chain[depth - 1]], ranks)

    def remove(self, entry: Entry) -> None:
        """Take an entry out: dispatched or aborted."""
        node = entry.node
        group = entry.group
        if node is None or group is None:
            raise IntegrityError(f"{entry.request.rid!r} is not pending here")
        group.drop(entry)
        del node.entries[entry.seq]
        entry.node = entry.group = None
        climb: _Node | None = node
        while climb is not None:
            climb.count -= 1
            above = climb.parent
            if not climb.count and above is not None:
                self._unlink(climb)
            climb = above

    def serve(self, entry: Entry, rank: int) -> int:
        """`rank` takes the entry and from now on holds its prompt; the next one is best taken near it.

        Returns the FLOPs of the other requests that it now owns in consequence, having owned none of them.
        """
        node = entry.node
        group = entry.group
        if node is None or group is None:
            raise IntegrityError(f"{entry.request.rid!r} is not pending here")
        path = list(self._upwards(node))
        was_free = not group.node.owners
        self.remove(entry)
        claimed = group.flops if was_free else 0
        deepest: Group | None = None
        for step in path:
            if step.count:
                self._own(step, 1 << rank)
                if deepest is None and step.group is not None and step.group.queue:
                    deepest = step.group
        if deepest is not None:
            self._current[rank] = deepest
        return claimed

    def park(self, entry: Entry, rank: int, since: float) -> None:
        """Do not offer the entry's group to `rank` as owned until `unpark`; `since` is told by `parked_groups`."""
        group = entry.group
        if group is None:
            raise IntegrityError(f"{entry.request.rid!r} is not pending here")
        group.parked |= 1 << rank
        self.parked |= 1 << rank
        self._parked.setdefault(rank, []).append((group, since))

    def unpark(self, rank: int) -> None:
        """Offer the rank's parked groups again."""
        bit = 1 << rank
        self.parked &= ~bit
        for group, _ in self._parked.pop(rank, ()):
            group.parked &= ~bit
            if group.alive and group.node.owners & bit:
                self._list(group, only=bit)

    def parked_groups(self, rank: int | None = None) -> Iterator[tuple[Group, float]]:
        """Groups with waiting entries that are parked for a rank, or for any; since when it has been computing."""
        for one in list(self._parked) if rank is None else (rank,):
            for group, since in self._parked.get(one, ()):
                if group.alive and group.queue and group.node.owners >> one & 1:
                    yield group, since

    def groups(self) -> list[Group]:
        """Those with entries, the one that waits longest first."""
        return sorted((group for group in self._groups.values() if group.queue), key=lambda group: group.head.seq)

    def entries(self) -> Iterator[Entry]:
        """All entries, group by group."""
        for group in self._groups.values():
            yield from group.queue.values()

    def forget_rank(self, rank: int) -> None:
        """The rank holds nothing any more."""
        bit = 1 << rank
        self.unpark(rank)
        self._heaps.pop(rank, None)
        self._current.pop(rank, None)
        self.owned &= ~bit
        for group in [group for group in self._groups.values() if group.node.owners & bit]:
            node = group.node
            node.owners &= ~bit
            if node.owners:
                continue
            if node.parent is self._root:
                self._list(group)
                continue
            # Nobody holds this depth any more: its requests wait with those of the next depth up.
            self._dissolve(group)
            above = self._group_above(node)
            self._merge(above, list(group.queue.values()))

    # What to serve next; None if there is nothing of the kind

    def next_owned(self, rank: int, old: float) -> Entry | None:
        """From the groups that `rank` owns: the one it is in, unless another waits since before `old`."""
        oldest = self._top(self._heaps.get(rank), lambda group: bool((group.node.owners & ~group.parked) >> rank & 1))
        if oldest is None:
            self.owned &= ~(1 << rank)
            return None
        current = self._current.get(rank)
        if (
            current is not None
            and current.alive
            and current.queue
            and (current.node.owners & ~current.parked) >> rank & 1
            and oldest.head.request.arrival >= old
        ):
            return current.head
        self._current[rank] = oldest
        return oldest.head

    def next_free(self) -> Entry | None:
        """From the groups that nobody owns, the one waiting longest."""
        group = self._top(self._free, lambda group: not group.node.owners)
        return None if group is None else group.head

    def next_loose(self) -> Entry | None:
        """From groups that are owned but share little."""
        group = self._top(self._loose, lambda group: bool(group.node.owners))
        return None if group is None else group.head

    def next_steal(self, worth: _Valid) -> Entry | None:
        """From the group with the most work per token of its prefix, of those `worth` it: there one more copy pays
        soonest."""
        groups = (group for group in self._groups.values() if group.queue and worth(group))
        group = max(groups, key=_weight, default=None)
        return None if group is None else group.head

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if trie, groups and counts disagree. Walks everything."""
        stack = list(self._root.children.values())
        waiting = 0
        blocks = 0
        while stack:
            node = stack.pop()
            blocks += len(node.edge)
            parent = node.parent
            if parent is None or (node.owners & ~parent.owners and parent is not self._root):
                raise IntegrityError(f"owners {node.owners:b} of a node are not owners of its parent")
            if node.count != len(node.entries) + sum(child.count for child in node.children.values()):
                raise IntegrityError(f"a node counts {node.count} entries and has another number")
            if not node.count:
                raise IntegrityError("an empty node is still in the trie")
            if (node.group is not None) != bool(node.owners or parent is self._root):
                raise IntegrityError("a node has a group exactly if it is owned or topmost")
            for block in node.edge:
                if self._at.get(block) is not node:
                    raise IntegrityError("a block leads to another node")
            for entry in node.entries.values():
                waiting += 1
                expected = node.group or self._group_above(node)
                if entry.group is not expected or entry.seq not in expected.queue:
                    raise IntegrityError(f"{entry.request.rid!r} waits in another group than it should")
            stack.extend(node.children.values())
        if blocks != len(self._at):
            raise IntegrityError(f"{blocks} blocks in the trie, {len(self._at)} in the index")
        if waiting != len(self) or waiting != sum(len(group.queue) for group in self._groups.values()):
            raise IntegrityError(f"{waiting} entries in the trie, {len(self)} counted")
        for group in self._groups.values():
            if list(group.queue) != sorted(group.queue):
                raise IntegrityError("a group is out of order")
            if group.flops != sum(entry.flops for entry in group.queue.values()):
                raise IntegrityError("a group's FLOPs are not its entries'")
            if group.tokens != sum(len(entry.request.token_ids) for entry in group.queue.values()):
                raise IntegrityError("a group's tokens are not its entries'")

    # Trie

    def _upwards(self, node: _Node | None) -> Iterator[_Node]:
        """The node and its ancestors, the root left out."""
        while node is not None and node is not self._root:
            yield node
            node = node.parent

    def _node_at(self, chain: tuple[int, ...], depth: int) -> _Node:
        """The node that ends `depth` blocks into a known chain, split off if need be."""
        if not depth:
            return self._root
        node = self._at[chain[depth - 1]]
        if node.depth == depth:
            return node
        parent = node.parent or self._root
        cut = depth - parent.depth
        upper = _Node(parent, node.edge[:cut], depth)
        parent.children[upper.edge[0]] = upper
        for block in upper.edge:
            self._at[block] = upper
        node.parent, node.edge = upper, node.edge[cut:]
        upper.children[node.edge[0]] = node
        upper.count, upper.owners = node.count, node.owners
        if upper.owners:
            self._new_group(upper)  # both are owned by the same ranks; the requests stay with the deeper one
        elif parent is self._root and node.group is not None:
            group = node.group  # the topmost node's group is now the upper one's
            node.group = None
            self._groups.pop(id(node), None)
            group.node = upper
            upper.group = group
            self._groups[id(upper)] = group
        return upper

    def _grow(self, parent: _Node, chain: tuple[int, ...], known: int) -> _Node:
        leaf = _Node(parent, chain[known:], len(chain))
        parent.children[leaf.edge[0]] = leaf
        for block in leaf.edge:
            self._at[block] = leaf
        if parent is self._root:
            self._new_group(leaf)
        return leaf

    def _unlink(self, node: _Node) -> None:
        parent = node.parent or self._root
        del parent.children[node.edge[0]]
        for block in node.edge:
            del self._at[block]
        if node.group is not None:
            self._dissolve(node.group)

    # Groups

    def _group_above(self, node: _Node) -> Group:
        """The group of the nearest ancestor that has one; the topmost always has."""
        for step in self._upwards(node.parent):
            if step.group is not None:
                return step.group
        raise IntegrityError("a topmost node has no group")

    def _new_group(self, node: _Node) -> Group:
        node.group = group = Group(node)
        self._groups[id(node)] = group
        return group

    def _dissolve(self, group: Group) -> None:
        group.alive = False
        group.node.group = None
        self._groups.pop(id(group.node), None)

    def _file(self, entry: Entry) -> None:
        node = entry.node
        if node is None:
            raise IntegrityError("an entry without a node cannot be filed")
        self._merge(node.group or self._group_above(node), [entry])

    def _merge(self, group: Group, entries: list[Entry]) -> None:
        """Put entries into a group, keeping the order of submission."""
        if not entries:
            return
        queue = group.queue
        was_empty = not queue
        head = -1 if was_empty else next(iter(queue))
        last = next(reversed(queue)) if queue else -1
        for entry in entries:
            queue[entry.seq] = entry
            entry.group = group
            group.flops += entry.flops
            group.tokens += len(entry.request.token_ids)
        if min(entry.seq for entry in entries) < last or len(entries) > 1:
            group.queue = OrderedDict(sorted(queue.items()))
        if was_empty or next(iter(group.queue)) < head:
            self._list(group)

    def _own(self, node: _Node, ranks: int) -> None:
        """Ranks hold the node's prefix, hence every shorter one."""
        for step in self._upwards(node):
            fresh = ranks & ~step.owners
            if not fresh:
                return
            first = not step.owners
            step.owners |= ranks
            group = step.group
            if group is None:
                group = self._new_group(step)
                self._merge(group, self._take_below(step))
            elif group.queue:
                self._list(group, only=None if first else fresh)

    def _take_below(self, node: _Node) -> list[Entry]:
        """Take the entries at and under a node out of the groups above it."""
        taken = []
        stack = [node]
        while stack:
            current = stack.pop()
            if current is not node and current.group is not None:
                continue
            for entry in current.entries.values():
                old = entry.group
                if old is not None:
                    old.drop(entry)
                taken.append(entry)
            stack.extend(current.children.values())
        return taken

    def _list(self, group: Group, only: int | None = None) -> None:
        """Enter a non-empty group where it will be looked for; old listings are dropped when met."""
        if not group.queue:
            return
        head = group.head
        self._tick += 1
        item = (head.seq, self._tick, group)
        owners = group.node.owners
        if not owners:
            self._enter(self._free, item)
            return
        for rank in members(owners if only is None else only):
            self._enter(self._heaps.setdefault(rank, []), item)
        self.owned |= owners
        if only is None:
            shared = group.node.depth * self._block
            group.loose = shared < self._affinity * len(head.request.token_ids)
            if group.loose:
                self._enter(self._loose, item)

    def _enter(self, heap: _Heap, item: tuple[int, int, Group]) -> None:
        heapq.heappush(heap, item)
        if len(heap) > 64 + 4 * len(self._groups):  # mostly listings of groups that are gone
            latest = {id(group): (tick, group) for _, tick, group in heap if group.alive and group.queue}
            heap[:] = [(group.head.seq, tick, group) for tick, group in latest.values()]
            heapq.heapify(heap)

    def _top(self, heap: _Heap | None, valid: _Valid) -> Group | None:
        """The listed group whose head is oldest. A listing's age is a lower bound: heads only get younger,
        and a group that gets an older one is listed anew."""
        while heap:
            seq, _, group = heap[0]
            if not group.alive or not group.queue or not valid(group):
                heapq.heappop(heap)
                continue
            head = next(iter(group.queue))
            if head == seq:
                return group
            self._tick += 1
            heapq.heapreplace(heap, (head, self._tick, group))
        return None


def _weight(group: Group) -> float:
    return group.flops / (group.node.depth if group.node.owners else 1)


if TYPE_CHECKING:
    from collections.abc import Callable

    _Valid = Callable[[Group], bool]
