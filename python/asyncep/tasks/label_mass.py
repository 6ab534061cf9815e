"""How much of the probability the labels have: little shows that the prompt does not end where a label follows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from asyncep.tasks.results import Classification

# Below it the model would mostly write something else than a label.
LITTLE_MASS = 0.01
_ADVICE = (
    "it would mostly write something else. Let the prompt end where a label follows, and name labels as the model "
    "would write them"
)
# So many texts of a stream are enough to judge its prompt by.
_ENOUGH = 64


class LabelMassWarning(UserWarning):
    """The model would mostly write something else than a label."""


def little_mass(mass: float | None) -> str | None:
    """What a person should know of the labels' probability; None where it is well, or not known.

    Args:
        mass: probability that the model writes one of the labels, on average.
    """
    if mass is None or mass >= LITTLE_MASS:
        return None
    return f"the model gives the labels {mass:.2g} of the probability: {_ADVICE}"


def warn_of_mass(mass: float | None, depth: int) -> None:
    """The same as a Python warning, always in the same words: Python shows those once for each place in a program.

    Args:
        depth: how many callers above this function the program is.
    """
    if little_mass(mass) is not None:
        words = f"the model gives the labels under {LITTLE_MASS:.0%} of the probability: {_ADVICE}"
        warnings.warn(words, LabelMassWarning, stacklevel=depth + 1)


def mean_mass(results: Sequence[Classification]) -> float | None:
    """Probability that the model writes one of the labels, on average of those where it is known."""
    masses = [result.label_mass for result in results if result.label_mass is not None]
    return sum(masses) / len(masses) if masses else None


@dataclass
class StreamMass:
    """Judges a stream once: by its first texts, or by all of a shorter one."""

    texts: int = 0
    mass: float = 0.0
    told: bool = False

    def add(self, results: Sequence[Classification]) -> None:
        """Results that have come."""
        found = [result.label_mass for result in results if result.label_mass is not None]
        self.texts += len(found)
        self.mass += sum(found)
        if self.texts >= _ENOUGH:
            self.judge()

    def judge(self) -> None:
        """Warns, if it has not been judged yet. The program is in another thread, so the place is this one."""
        if not self.told and self.texts:
            self.told = True
            warn_of_mass(self.mass / self.texts, 0)
