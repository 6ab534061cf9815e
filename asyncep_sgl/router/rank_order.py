"""Which of a rank's waiting requests go into its next batch first: high priorities, and of each, quick before bulk.

The router keeps a rank supplied with the batch after the one it computes. A request that comes later than that batch
was sent still goes before it: the rank sorts what waits each time it makes a batch. The order travels in SGLang's
``priority``, which means nothing to a rank that does not schedule by it.
"""

from __future__ import annotations

import time
from typing import Any

# Nothing is passed any more once it has waited so long on its rank.
MOST_SECONDS = 10.0


def ranks_take_orders(schedule: Any) -> bool:
    """Whether a rank's order is the router's: with SGLang's own scheduling by priorities it is not.

    Args:
        schedule: SGLang's server arguments, or those of them that `get_schedule` gives.
    """
    return not (schedule.enable_priority_scheduling or schedule.abort_on_priority_when_disabled)


def urgency(priority: int, bulk: bool) -> int:
    """What a rank sorts by, highest first: priorities, and within each quick before bulk."""
    return 2 * priority - bulk


def is_bulk(order: int | None) -> bool:
    """Whether an `urgency` is of bulk. What the router did not send has none."""
    return order is not None and order % 2 == 1


def sort_waiting(waiting_queue: list[Any]) -> None:
    """Sorts a rank's waiting ``Req``s in place; those of one urgency stay in SGLang's order."""
    if any(req.priority != waiting_queue[0].priority for req in waiting_queue):
        # SGLang's clock for these.
        old = time.perf_counter() - MOST_SECONDS
        waiting_queue.sort(key=lambda req: (not 0 < req.time_stats.wait_queue_entry_time < old, -(req.priority or 0)))
