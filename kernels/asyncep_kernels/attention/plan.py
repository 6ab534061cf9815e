"""How a batch is cut into work, decided once per batch and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.attention.cpu_native import NativePlan, native_plan

# A prefix is attended once for several sequences from this many tokens on; below, merging costs what it saves.
MIN_SHARED = 32
# And for sequences with at most this many new tokens; longer ones fill tiles of their own, so merging is lost time.
MAX_SHARING = 64
# Sequences with at most this many keys of their own are padded to a common length and computed together.
MAX_PADDED_KEYS = 96
# Scores (queries x keys) of a padded group are at most this factor above what its sequences need.
PADDING = 1.35
# Sequences in one padded group: beyond, scores leave the L2 cache.
MAX_PADDED_GROUP = 32


class Own(NamedTuple):
    """One sequence's own work: its queries over the keys that are not attended for several at once."""

    query: int
    """First row in ``q``."""
    new: int
    key: int
    """First row among the plan's own keys."""
    prefix: int
    """Own keys before the new tokens'."""


class Padded(NamedTuple):
    """Short sequences computed together, each aligned to the end of a common length."""

    queries: torch.Tensor
    """``(B, n)`` int64: rows of ``q``; some valid row where there is none."""
    keys: torch.Tensor
    """``(B, m)`` int64: rows among the own keys, likewise."""
    missing: torch.Tensor | None
    """``(B, m)`` bool: no key here; None when every length is m."""
    valid: torch.Tensor | None
    """``(valid,)`` int64 into the flattened ``queries``; None when all are."""
    rows: torch.Tensor
    """``(valid,)`` int64: rows of ``q``."""


class Shared(NamedTuple):
    """A prefix several sequences have in common, and all their queries."""

    slots: torch.Tensor
    """``(p,)`` int64 cache rows."""
    rows: torch.Tensor
    """``(n,)`` int64 rows of ``q``, ascending."""


class Cut(NamedTuple):
    """How torch's operators compute a batch."""

    slots: torch.Tensor | None
    """``(own keys,)`` int64 cache rows; None where the own keys are exactly the new tokens, in order."""
    own_keys: int
    singles: tuple[Own, ...]
    padded: tuple[Padded, ...]
    shared: tuple[Shared, ...]


class Plan:
    """A batch and how to compute it; holds no tensor of any layer.

    What an implementation needs is made when it asks.
    """

    def __init__(self, batch: Batch, window: int | None) -> None:
        self.batch = batch
        self.window = window

    @cached_property
    def native(self) -> NativePlan:
        """For the C kernel, which packs a common prefix once whatever follows it."""
        return native_plan(self.batch, _shared_prefixes(self.batch, most_new=None))

    @cached_property
    def cut(self) -> Cut:
        """For torch's operators: sequences computed alone, groups of short ones, and prefixes attended once."""
        return _cut(self.batch, self.window)


def plan(batch: Batch, window: int | None = None) -> Plan:
    """Checks a batch and makes its plan.

    Args:
        batch: at least as many slots as tokens for every sequence.
        window: tokens before itself that a token sees; None for all.

    Raises:
        ValueError: lengths are negative, differ in number, or exceed the slots given.
    """
    if not len(batch.new) == len(batch.prefix) == len(batch.slots):
        raise ValueError(f"{len(batch.new)} new, {len(batch.prefix)} prefix lengths, {len(batch.slots)} slot rows")
    for new, prefix, slots in zip(*batch, strict=True):
        if new < 0 or prefix < 0 or slots.numel() < new + prefix:
            raise ValueError(f"{new} new tokens on a prefix of {prefix} with {slots.numel()} slots")
    longest = max((new + prefix for new, prefix in zip(batch.new, batch.prefix, strict=True)), default=0)
    return Plan(batch, None if window is not None and window >= longest else window)


def _cut(batch: Batch, window: int | None) -> Cut:
    lengths = [new + prefix for new, prefix in zip(batch.new, batch.prefix, strict=True)]
    starts = _starts(batch.new)
    groups = _shared_prefixes(batch, most_new=MAX_SHARING) if window is None else []
    skip = [0] * len(lengths)
    shared = []
    for members, common in groups:
        for index in members:
            skip[index] = common
        rows = torch.cat([torch.arange(starts[index], starts[index] + batch.new[index]) for index in members])
        shared.append(Shared(batch.slots[members[0]][:common].long(), rows))
    own = [batch.prefix[index] - skip[index] for index in range(len(lengths))]
    keys = _starts([prefix + new for prefix, new in zip(own, batch.new, strict=True)])
    sequences = [
        Own(start, new, key, prefix)
        for start, new, key, prefix in zip(starts, batch.new, keys, own, strict=False)
        if new
    ]
    slots = None
    if any(own):
        slots = torch.cat([row[skip[i] : lengths[i]] for i, row in enumerate(batch.slots)]).long()
    short = [each for each in sequences if window is None and each.prefix + each.new <= MAX_PADDED_KEYS]
    groups_of_short = [group for group in _similar(short) if len(group) > 1]
    padded = {each for group in groups_of_short for each in group}
    return Cut(
        slots,
        keys[-1],
        tuple(each for each in sequences if each not in padded),
        tuple(_pad(group) for group in groups_of_short),
        tuple(shared),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each begins, and the end of the last."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _shared_prefixes(batch: Batch, most_new: int | None) -> list[tuple[list[int], int]]:
    """Groups of sequences, of at most ``most_new`` new tokens each, whose first slots agree, and on how many."""
    candidates: dict[int, list[int]] = {}
    for index, (new, prefix, slots) in enumerate(zip(*batch, strict=True)):
        if new > 0 and (most_new is None or new <= most_new) and prefix >= MIN_SHARED:
            candidates.setdefault(int(slots[0]), []).append(index)
    found = []
    for members in candidates.values():
        if len(members) < 2:
            continue
        common = min(batch.prefix[index] for index in members)
        rows = torch.stack([batch.slots[index][:common] for index in members])
        differ = (rows != rows[0]).any(0).nonzero()
        if len(differ):
            common = int(differ[0])
        if common >= MIN_SHARED:
            found.append((members, common))
    return found


def _similar(sequences: Sequence[Own]) -> list[list[Own]]:
    """Sequences grouped so that padding each group costs little."""
    groups: list[list[Own]] = []
    needed = 0
    for each in sorted(sequences, key=lambda s: (s.prefix + s.new, s.new)):
        area = each.new * (each.prefix + each.new)
        if groups and len(groups[-1]) < MAX_PADDED_GROUP:
            group = groups[-1]
            most = max(each.new, *(s.new for s in group))
            if most * (each.prefix + each.new) * (len(group) + 1) <= PADDING * (needed + area):
                group.append(each)
                needed += area
                continue
        groups.append([each])
        needed = area
    return groups


def _pad(group: Sequence[Own]) -> Padded:
    new = torch.tensor([each.new for each in group])
    length = torch.tensor([each.prefix + each.new for each in group])
    n, m = int(new.max()), int(length.max())
    # Position within the sequence of each column; negative where there is none.
    column = torch.arange(n) - (n - new)[:, None]
    queries = torch.tensor([each.query for each in group])[:, None] + column.clamp(min=0)
    place = torch.arange(m) - (m - length)[:, None]
    keys = torch.tensor([each.key for each in group])[:, None] + place.clamp(min=0)
    missing = place < 0
    valid = (column >= 0).flatten().nonzero().flatten()
    return Padded(
        queries,
        keys,
        missing if bool(missing.any()) else None,
        None if valid.numel() == queries.numel() else valid,
        queries.flatten()[valid],
    )
