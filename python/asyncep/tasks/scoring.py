"""From log-probabilities of labels to a decision. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The answer for one row.

    Attributes:
        label: the most probable label after calibration.
        log_probabilities: log-likelihood of each label given the prompt, as the model has it, in nats.
        probabilities: calibrated and normalised over the labels; they sum to 1.
    """

    label: str
    log_probabilities: dict[str, float]
    probabilities: dict[str, float]


def decide(scores: Sequence[float], labels: Sequence[str], offsets: Mapping[str, float] | None = None) -> Decision:
    """Chooses among ``labels``.

    Args:
        scores: log-likelihood of each label, in the order of ``labels``, in nats.
        offsets: what to subtract from each label's score (see `offsets_of`).
    """
    calibrated = [score - (offsets or {}).get(label, 0.0) for score, label in zip(scores, labels, strict=True)]
    highest = max(calibrated)
    weights = [math.exp(score - highest) for score in calibrated]
    total = sum(weights)
    return Decision(
        label=labels[calibrated.index(highest)],
        log_probabilities=dict(zip(labels, scores, strict=True)),
        probabilities={label: weight / total for label, weight in zip(labels, weights, strict=True)},
    )


def offsets_of(scores: Sequence[Sequence[float]], labels: Sequence[str]) -> dict[str, float]:
    """Each label's mean score over calibration texts: what the model prefers whatever it reads.

    Subtracting it is the batch form of contextual calibration (Zhao et al. 2021), in the logarithm.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("calibration needs at least one row that could be scored")
    return {label: sum(row[i] for row in scores) / len(scores) for i, label in enumerate(labels)}
