"""What a process does once it has started and means to stay."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect garbage rarely from now on, and never look at what start-up left: requests leave no cycles behind.

    A process that has imported SGLang holds so many objects that a full collection takes some tenths of a second; a
    third of the router's time under load went into them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
