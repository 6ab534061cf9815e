"""How much of the probability the labels have: little shows that the prompt does not end where a label follows."""

from __future__ import annotations

import warnings

# Below it the model would mostly write something else than a label.
LITTLE_MASS = 0.01


class LabelMassWarning(UserWarning):
    """The model would mostly write something else than a label."""


def little_mass(mass: float | None) -> str | None:
    """What a person should know of the labels' probability; None where it is well, or not known.

    Args:
        mass: probability that the model writes one of the labels, on average.
    """
    if mass is None or mass >= LITTLE_MASS:
        return None
    return (
        f"the model gives the labels {mass:.2g} of the probability: it would mostly write something else. Let the "
        "prompt end where a label follows, and name labels as the model would write them"
    )


def warn_of_mass(mass: float | None, depth: int) -> None:
    """The same as a Python warning, which Python shows once for each place in a program.

    Args:
        depth: how many callers above this function the program is.
    """
    if (words := little_mass(mass)) is not None:
        warnings.warn(words, LabelMassWarning, stacklevel=depth + 1)
