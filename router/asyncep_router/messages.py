"""What goes into the frontend and what comes out of it. One request id correlates all of it.

Times are seconds on the caller's clock; the frontend never reads one. Token ids are `array('q')`,
the form SGLang's own messages and radix keys have, so nothing is converted on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from array import array
    from collections.abc import Mapping


class Reason(StrEnum):
    """Why a request went to its rank, for logs and metrics."""

    LONGEST_PREFIX = "longest_prefix"
    """F1: that rank holds more of the prompt than any other rank with room."""
    FILL = "fill"
    """F3: no rank holds it; the fullest rank still below T."""
    LEAST_FLOPS = "least_flops"
    """No rank holds it and no busy rank is below T: the one with the least charged."""
    STEAL = "steal"
    """The ranks that hold it are full and this one would otherwise idle."""
    DEADLINE = "deadline"
    """Its deadline came: the best rank, with or without room."""
    PINNED = "pinned"
    """The caller named the rank."""
    ALONE = "alone"
    """It was set aside, and the caller sends it when nothing else is on the rank."""


@dataclass(slots=True, eq=False)
class Request:
    """A tokenized prompt to be placed.

    `logits`: positions whose logits are computed. `priority`: higher first. `deadline`: at this time it
    is sent whatever the state of the ranks. `pinned`: the one rank it may go to. `namespace`: prompts
    share cached prefixes only within one (LoRA adapter, cache salt). `payload` is the caller's, untouched.

    `client`: whose it is; clients share the ranks fairly. `company`: requests of the list that it came in, itself
    included, and `flow` the list's name within the client, empty for a request by itself.
    """

    rid: str
    token_ids: array[int]
    arrival: float
    logits: int = 1
    priority: int = 0
    deadline: float | None = None
    pinned: int | None = None
    namespace: str | None = None
    payload: Any = None
    client: str = ""
    flow: str = ""
    company: int = 1


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Instruction: send this request to that rank now. It is already charged when it is returned.

    `cached`: tokens of its prompt expected in the rank's cache. `flops`: net of them, what was charged. `bulk`: others
    may still pass it in the rank (`fairness.py`).
    """

    rid: str
    rank: int
    reason: Reason
    cached: int
    flops: int
    waited: float
    request: Request
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class BatchReport:
    """Event: a rank finished a batch. `cached`: tokens it really found in its cache, by request id.

    `flops` and `seconds` are the batch's as the rank counted and measured them.
    """

    rank: int
    rids: tuple[str, ...]
    flops: float = 0.0
    seconds: float = 0.0
    cached: Mapping[str, int] = field(default_factory=dict)
