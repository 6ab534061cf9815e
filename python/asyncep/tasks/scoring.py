"""From log-probabilities to decisions. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def decide(scores: Sequence[float], labels: Sequence[str], offsets: Sequence[float] | None = None) -> Decision:
    """Chooses among ``labels``.

    Args:
        scores: log-likelihood of each label, in the order of ``labels``, in nats.
        offsets: what to subtract from each score (see `offsets_of`).
    """
    calibrated = _calibrated(scores, offsets)
    highest = max(calibrated)
    weights = [math.exp(score - highest) for score in calibrated]
    total = sum(weights)
    return Decision(
        label=labels[calibrated.index(highest)],
        log_probabilities=dict(zip(labels, scores, strict=True)),
        probabilities={label: weight / total for label, weight in zip(labels, weights, strict=True)},
    )


def decide_each(scores: Sequence[float], labels: Sequence[str], offsets: Sequence[float] | None = None) -> Decision:
    """Decides on each label by itself: its probability is that of yes against no.

    Args:
        scores: log-likelihoods of yes and of no for the first label, then for the second, and so on, in nats.
        offsets: what to subtract from each score.

    Returns:
        A `Decision` whose probabilities do not sum to 1, and whose log-probabilities are those of yes.
    """
    calibrated = _calibrated(scores, offsets)
    pairs = list(zip(calibrated[::2], calibrated[1::2], strict=True))
    probabilities = {label: _logistic(yes - no) for label, (yes, no) in zip(labels, pairs, strict=True)}
    return Decision(
        label=max(probabilities, key=probabilities.__getitem__),
        log_probabilities=dict(zip(labels, scores[::2], strict=True)),
        probabilities=probabilities,
    )


def together(logs: Sequence[float]) -> float:
    """The logarithm of the sum of probabilities that are given by their logarithms."""
    highest = max(logs)
    return highest + math.log(sum(math.exp(log - highest) for log in logs))


def offsets_of(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of each score over calibration texts: what the model prefers whatever it reads.

    Subtracting it is the batch form of contextual calibration (Zhao et al. 2021), in the logarithm.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("calibration needs at least one row that could be scored")
    return tuple(sum(column) / len(scores) for column in zip(*scores, strict=True))


def _calibrated(scores: Sequence[float], offsets: Sequence[float] | None) -> list[float]:
    if offsets is None:
        return list(scores)
    return [score - offset for score, offset in zip(scores, offsets, strict=True)]


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
