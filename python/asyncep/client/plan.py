"""The order in which prompts are computed when all of them are known beforehand. Pure.

Prompts are sorted, so that those with a common prefix stand together, and cut into one lane a rank with equal FLOPs.
A prefix is then computed once a lane (a cut costs at most one prefix more), if two conditions hold: prompts of one
batch cannot use each other's prefixes, so the first prompt of a prefix, its *lead*, has to be in an earlier batch than
the rest; and that batch has to be finished. Leads therefore go ahead of their company, and the time until their batch
is done is filled with other prompts. Where nothing else is left to do, a batch waits (`Batch.after`), and only then may
one be smaller than the threshold: computing a prefix twice costs more than one small batch.

    sorted   A1 A2 A3 A4 A5 | B1 B2 B3 B4 B5 | C1 …
    batches  A1 B1 C1   D1 E1 F1   A2 A3 A4 A5   B2 B3 …      with a distance of two batches
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Cost(Protocol):
    """What planning needs of the cost model (`asyncep_router.cost.ModelCost` has it)."""

    def flops(self, new: int, cached: int = 0, logits: int = 1) -> int:
        """FLOPs of a pass of `new` tokens after `cached` ones."""
        ...


class TokenCost:
    """The cost where the model's shape is not known: tokens, and nothing for those that are cached."""

    def flops(self, new: int, cached: int = 0, logits: int = 1) -> int:
        """`new` itself."""
        del cached, logits
        return new


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts to be sent together.

    Attributes:
        rows: their numbers, in the order of the plan's prompts.
        flops: what they cost, net of the prefixes that are computed by then.
        after: number of the batch of the same lane that has to be finished before this one is sent; None where any
            order will do.
    """

    rows: tuple[int, ...]
    flops: int
    after: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What each rank computes.

    Attributes:
        lanes: the batches of each rank, in order.
        same_as: for each prompt the number of the first one equal to it; itself if there is none before.
        possible_cached: tokens that come out of the prefix cache when the lanes are run as planned.
    """

    lanes: tuple[tuple[Batch, ...], ...]
    same_as: tuple[int, ...]
    possible_cached: int

    @property
    def flops(self) -> int:
        """FLOPs of all batches."""
        return sum(batch.flops for lane in self.lanes for batch in lane)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a plan is cut.

    Attributes:
        ranks: lanes to make.
        threshold: FLOPs a batch has to reach (T).
        page: tokens in a page of the prefix cache; only whole pages are shared.
        distance: batches in flight on a rank: a lead's company comes at least so many batches later.
        worth: a common prefix counts as one from so many tokens beyond what is shared anyhow.
        most_rows: a batch is closed at so many prompts even below the threshold.
    """

    ranks: int
    threshold: int
    page: int = 16
    distance: int = 2
    worth: int = 64
    most_rows: int = 512


def plan(prompts: Sequence[Sequence[int]], cost: Cost, shape: Shape, *, held: Iterable[Sequence[int]] = ()) -> Plan:
    """Orders and packs prompts.

    Args:
        prompts: token ids; none may be empty.
        held: token sequences that every rank has in its cache already.

    Raises:
        ValueError: an empty prompt, or a shape without ranks, pages or threshold.
    """
    if shape.ranks < 1 or shape.page < 1 or shape.threshold < 1 or shape.distance < 1 or shape.most_rows < 1:
        raise ValueError(f"{shape}: every number has to be at least 1")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: one has no tokens")
    order, same_as = _sorted_unique(prompts)
    rows = _shared(order, [_key(sequence) for sequence in held], cost, shape)
    lanes = tuple(_pack(lane, shape) for lane in _cut(rows, shape.ranks, cost))
    cached = sum(row.shared for lane in lanes for row in lane[1])
    return Plan(tuple(batches for batches, _ in lanes), tuple(same_as), cached)


# A prompt as bytes that sort like its token ids: comparing them is one memcmp.
_ITEM = 4


def _key(prompt: Sequence[int]) -> bytes:
    packed = array("I", prompt)
    packed.byteswap()
    return packed.tobytes()


def _sorted_unique(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[bytes, int]], list[int]]:
    first: dict[bytes, int] = {}
    same_as = [first.setdefault(_key(prompt), number) for number, prompt in enumerate(prompts)]
    return sorted(first.items()), same_as


def _common(left: bytes, right: bytes, page: int) -> int:
    """Tokens of the longest common prefix in whole pages, found by halving."""
    step = page * _ITEM
    low, high = 0, min(len(left), len(right)) // step
    while low < high:
        middle = (low + high + 1) // 2
        # What is below `low` is equal already.
        if left[low * step : middle * step] == right[low * step : middle * step]:
            low = middle
        else:
            high = middle - 1
    return low * page


@dataclass(slots=True)
class _Row:
    """A distinct prompt in sorted order.

    `common`: tokens it shares with the one before. `held`: tokens of it that every rank holds. `lead`: the row that has
    to be computed first, by its place in the order; None if there is none. `shared`: tokens it will find in the cache.
    """

    number: int
    key: bytes
    common: int
    held: int
    cost: Cost
    lead: int | None = None
    shared: int = 0

    @property
    def length(self) -> int:
        return len(self.key) // _ITEM

    @property
    def flops(self) -> int:
        return self.cost.flops(self.length - self.shared, self.shared)


def _shared(order: list[tuple[bytes, int]], held: list[bytes], cost: Cost, shape: Shape) -> list[_Row]:
    rows: list[_Row] = []
    before = b""
    for key, number in order:
        # The last token is computed in any case: its logits are what is asked for.
        usable = (len(key) // _ITEM - 1) // shape.page * shape.page
        kept = max((_common(key, sequence, shape.page) for sequence in held), default=0)
        rows.append(_Row(number, key, min(_common(before, key, shape.page), usable), min(kept, usable), cost))
        before = key
    _find_leads(rows, shape.worth)
    return rows


def _find_leads(rows: list[_Row], worth: int) -> None:
    """Sets `lead` and `shared` of each row of one lane.

    The stack holds the prefixes on the path to the row before: how long, and which row is the first to have it.
    """
    stack: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        depth = row.common if place else 0
        first = place - 1
        while stack and stack[-1][0] > depth:
            first = stack.pop()[1]
        known = stack[-1][0] if stack else 0
        if depth - max(known, row.held) >= worth:
            stack.append((depth, first))
        if stack and stack[-1][0] > row.held:
            row.shared, row.lead = stack[-1]
        else:
            row.shared, row.lead = row.held, None


def _cut(rows: list[_Row], ranks: int, cost: Cost) -> list[list[_Row]]:
    """Consecutive stretches of equal net FLOPs, one a rank; leads are found anew within each."""
    total = sum(row.flops for row in rows)
    lanes: list[list[_Row]] = [[] for _ in range(ranks)]
    done = 0
    for row in rows:
        flops = row.flops
        lanes[min(ranks - 1, (done + flops // 2) * ranks // max(1, total))].append(row)
        done += flops
    return lanes


def _pack(rows: list[_Row], shape: Shape) -> tuple[tuple[Batch, ...], list[_Row]]:
    _find_leads(rows, shape.worth)
    company: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if row.lead is not None:
            company.setdefault(row.lead, []).append(place)
    # Places whose lead is computed (or that need none) by the batch being filled.
    ready = [_turn(place, row, company) for place, row in enumerate(rows) if row.lead is None]
    heapq.heapify(ready)
    opens: list[list[int]] = []  # places that become ready when so many batches are made
    batches: list[Batch] = []
    batch_of: dict[int, int] = {}
    left = len(rows)
    while left:
        number = len(batches)
        if number < len(opens):
            for place in opens[number]:
                heapq.heappush(ready, _turn(place, rows[place], company))
        chosen: list[int] = []
        flops = 0
        while flops < shape.threshold and len(chosen) < shape.most_rows:
            if not ready:
                # Only company of leads in flight is left: wait for the earliest of them rather than make a batch that
                # is too small, unless this one would wait for itself.
                waiting = next((n for n in range(number + 1, len(opens)) if opens[n]), None)
                if waiting is None or waiting - shape.distance >= number:
                    break
                for place in opens[waiting]:
                    heapq.heappush(ready, _turn(place, rows[place], company))
                opens[waiting] = []
                continue
            place = heapq.heappop(ready)[1]
            chosen.append(place)
            flops += rows[place].flops
            batch_of[place] = number
            if place in company:
                slot = number + shape.distance
                opens.extend([] for _ in range(slot + 1 - len(opens)))
                opens[slot].extend(company[place])
        left -= len(chosen)
        leads = [batch_of[lead] for place in chosen if (lead := rows[place].lead) is not None]
        batches.append(Batch(tuple(rows[place].number for place in chosen), flops, max(leads, default=None)))
    return _merge_tail(batches, shape), rows


def _turn(place: int, row: _Row, company: dict[int, list[int]]) -> tuple[int, int]:
    """Company first: its prefix is in the cache now and may not be later. Then new leads, then what shares nothing."""
    return (0 if row.lead is not None else 1 if place in company else 2), place


def _merge_tail(batches: list[Batch], shape: Shape) -> tuple[Batch, ...]:
    """A last batch below the threshold joins the one before, if it need not wait for it."""
    if len(batches) > 1:
        last, other = batches[-1], batches[-2]
        fits = len(last.rows) + len(other.rows) <= 2 * shape.most_rows
        if last.flops < shape.threshold and fits and (last.after is None or last.after < len(batches) - 2):
            afters = [number for number in (last.after, other.after) if number is not None]
            batches[-2:] = [Batch(other.rows + last.rows, other.flops + last.flops, max(afters, default=None))]
    return tuple(batches)
