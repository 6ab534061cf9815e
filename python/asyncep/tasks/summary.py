"""What became of the rows: accuracy, confusion, calibration, errors. Pure; adds up over parts and over runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from asyncep.tasks.gold import several
from asyncep.tasks.notable import Notable
from asyncep.tasks.results import Classification

BINS = 10
_ERROR_KINDS = 20
_ERROR_LENGTH = 120
_OUTSIDE_KINDS = 100
_OTHER_VALUES = "(other values)"
_NUMBER = re.compile(r"\d+")


@dataclass
class CalibrationBin:
    """Rows whose chosen label had a probability in one tenth: how many, the sum of it, how often it was right."""

    rows: int = 0
    confidence: float = 0.0
    hits: int = 0


@dataclass(frozen=True)
class LabelFigures:
    """Rows whose true label it is, rows it was predicted for, and rows where both hold."""

    rows: int
    predicted: int
    hits: int

    @property
    def precision(self) -> float | None:
        """Share of its predictions that are right."""
        return self.hits / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Share of its rows that got it."""
        return self.hits / self.rows if self.rows else None

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 for a label that neither occurs nor is predicted."""
        both = self.rows + self.predicted
        return 2 * self.hits / both if both else 0.0


@dataclass
class Summary:
    """Counts over rows.

    Attributes:
        labels: what was chosen from.
        pairs: rows by (true label, predicted label).
        predicted: rows by predicted label, with and without a true one.
        rows, errors: all rows, and those without a label.
        bins: rows with a true label, by the probability of the predicted one.
        reasons: errors by the beginning of their message, numbers in it left out.
        multi: a row may have several labels: `golds`, `predicted` and `hits` count each label of each row.
        golds, hits: with `multi`, rows that have a label, and rows that have it and got it.
        exact, judged_sets: with `multi`, rows that got exactly their labels, and all rows that have true ones.
        outside: rows by true labels that are none of the labels; those beyond the first hundred kinds together.
        mass, mass_rows: sum of the probability that the model writes one of the labels, and of how many rows.
        cut: rows whose text was cut.
        notable: rows worth a look.
        certainty: rows with a label, by tenths of its probability.
    """

    labels: Sequence[str]
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    errors: int = 0
    bins: list[CalibrationBin] = field(default_factory=lambda: [CalibrationBin() for _ in range(BINS)])
    reasons: Counter[str] = field(default_factory=Counter)
    multi: bool = False
    golds: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    exact: int = 0
    judged_sets: int = 0
    outside: Counter[str] = field(default_factory=Counter)
    mass: float = 0.0
    mass_rows: int = 0
    cut: int = 0
    notable: Notable = field(default_factory=Notable)
    certainty: list[int] = field(default_factory=lambda: [0] * BINS)

    def __post_init__(self) -> None:
        self._known = frozenset(self.labels)

    def add_answer(self, row: int, text: str | None, gold: str | None, answer: Classification) -> None:
        """One row's answer.

        Args:
            gold: its true label; with `multi` its labels as `tasks.gold` writes several.
        """
        golds = set(several(gold)) if self.multi and gold is not None else None
        right = golds == set(answer.labels) if self.multi else gold == answer.label
        self.notable.add(row, text, gold, answer, wrong=gold is not None and not right)
        self.cut += bool(answer.cut_characters)
        if answer.probability is not None:
            self.certainty[min(BINS - 1, int(answer.probability * BINS))] += 1
        if answer.label_mass is not None:
            self.mass += answer.label_mass
            self.mass_rows += 1
        if not self.multi:
            self.add(gold, answer.label, answer.probability, answer.error)
            return
        self.rows += 1
        if answer.label is None:
            self._add_error(answer.error)
            return
        self.predicted.update(answer.labels)
        if golds is None:
            return
        self.judged_sets += 1
        self.exact += right
        self.hits.update(golds & set(answer.labels))
        self.golds.update(label if label in self._known else self._add_outside(label, 1) for label in golds)

    def add(
        self, gold: str | None, predicted: str | None, confidence: float | None = None, error: str | None = None
    ) -> None:
        """One row; ``predicted`` is None for a row that failed, ``gold`` where the input has no true label."""
        self.rows += 1
        if gold is not None and gold not in self._known:
            gold = self._add_outside(gold, 1)
        if predicted is None:
            self._add_error(error)
            return
        self.predicted[predicted] += 1
        if gold is None:
            return
        self.pairs[gold, predicted] += 1
        if confidence is not None:
            entry = self.bins[min(BINS - 1, int(confidence * BINS))]
            entry.rows += 1
            entry.confidence += confidence
            entry.hits += gold == predicted

    def merge(self, other: Summary) -> None:
        """Adds another's counts to these."""
        self.pairs.update(other.pairs)
        self.predicted.update(other.predicted)
        self.rows += other.rows
        self.errors += other.errors
        for mine, theirs in zip(self.bins, other.bins, strict=True):
            mine.rows += theirs.rows
            mine.confidence += theirs.confidence
            mine.hits += theirs.hits
        for reason, count in other.reasons.items():
            self._add_reason(reason, count)
        self.golds.update(other.golds)
        self.hits.update(other.hits)
        self.exact += other.exact
        self.judged_sets += other.judged_sets
        for gold, count in other.outside.items():
            self._add_outside(gold, count)
        self.mass += other.mass
        self.mass_rows += other.mass_rows
        self.cut += other.cut
        self.notable.merge(other.notable)
        self.certainty = [mine + theirs for mine, theirs in zip(self.certainty, other.certainty, strict=True)]

    def _add_error(self, error: str | None) -> None:
        self.errors += 1
        # Lengths and positions differ from row to row, the kind of error does not.
        self._add_reason(_NUMBER.sub("#", error or "not said")[:_ERROR_LENGTH], 1)

    def _add_outside(self, gold: str, count: int) -> str:
        """Counts a true label that is none of the labels; a wrong column may have a million of them."""
        known = gold in self.outside or len(self.outside) < _OUTSIDE_KINDS
        name = gold if known else _OTHER_VALUES
        self.outside[name] += count
        return name

    def _add_reason(self, reason: str, count: int) -> None:
        # Messages may quote rows; there must not be ten million kinds of them in memory.
        known = reason in self.reasons or len(self.reasons) < _ERROR_KINDS
        self.reasons[reason if known else "other"] += count

    @property
    def judged(self) -> int:
        """Rows with a true and a predicted label."""
        return self.judged_sets if self.multi else sum(self.pairs.values())

    @property
    def accuracy(self) -> float | None:
        """Share of rows with a true label that got it, or with `multi` exactly theirs; None without any."""
        if not self.judged:
            return None
        if self.multi:
            return self.exact / self.judged
        return sum(count for (gold, predicted), count in self.pairs.items() if gold == predicted) / self.judged

    @property
    def accuracy_error(self) -> float | None:
        """Standard error of `accuracy` as an estimate for rows of the same kind."""
        if (accuracy := self.accuracy) is None:
            return None
        return math.sqrt(accuracy * (1 - accuracy) / self.judged)

    @property
    def macro_f1(self) -> float | None:
        """Mean over labels of the harmonic mean of precision and recall; None without true labels."""
        if not self.judged:
            return None
        scores = [self.judge(label).f1 for label in self.known_labels()]
        return sum(scores) / len(scores)

    def judge(self, label: str) -> LabelFigures:
        """One label's figures, over rows with a true and a predicted label."""
        if self.multi:
            return LabelFigures(self.golds[label], self.predicted[label], self.hits[label])
        rows = sum(count for (gold, _), count in self.pairs.items() if gold == label)
        said = sum(count for (_, predicted), count in self.pairs.items() if predicted == label)
        return LabelFigures(rows, said, self.pairs[label, label])

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error: mean distance of confidence and accuracy over the bins, by rows."""
        total = sum(entry.rows for entry in self.bins)
        if not total:
            return None
        return sum(abs(entry.confidence - entry.hits) for entry in self.bins) / total

    def known_labels(self) -> list[str]:
        """The labels chosen from, then true labels that are none of them."""
        golds = set(self.golds) if self.multi else {gold for gold, _ in self.pairs}
        return [*self.labels, *sorted(golds - set(self.labels))]

    @property
    def mean_mass(self) -> float | None:
        """Mean probability that the model writes one of the labels; None where it is not known."""
        return self.mass / self.mass_rows if self.mass_rows else None

    def as_json(self) -> dict[str, Any]:
        """Counts as JSON can carry them; `from_json` reads them."""
        return {
            "rows": self.rows,
            "errors": self.errors,
            "pairs": [[*pair, count] for pair, count in self.pairs.items()],
            "predicted": dict(self.predicted),
            "bins": [[entry.rows, entry.confidence, entry.hits] for entry in self.bins],
            "reasons": dict(self.reasons),
            "golds": dict(self.golds),
            "hits": dict(self.hits),
            "sets": [self.exact, self.judged_sets],
            "outside": dict(self.outside),
            "mass": [self.mass, self.mass_rows],
            "cut": self.cut,
            "notable": self.notable.as_json(),
            "certainty": self.certainty,
        }

    @classmethod
    def from_json(cls, labels: Sequence[str], counts: dict[str, Any], *, multi: bool = False) -> Summary:
        """What `as_json` wrote."""
        exact, judged_sets = counts["sets"]
        mass, mass_rows = counts["mass"]
        return cls(
            labels,
            Counter({(gold, predicted): count for gold, predicted, count in counts["pairs"]}),
            Counter(counts["predicted"]),
            counts["rows"],
            counts["errors"],
            [CalibrationBin(*entry) for entry in counts["bins"]],
            Counter(counts["reasons"]),
            multi,
            Counter(counts["golds"]),
            Counter(counts["hits"]),
            exact,
            judged_sets,
            Counter(counts["outside"]),
            mass,
            mass_rows,
            counts["cut"],
            Notable.from_json(counts["notable"]),
            list(counts["certainty"]),
        )

    def table(self) -> Table:
        """Confusion table: a row per true label, a column per prediction."""
        table = Table(title="true label (rows) and prediction (columns)")
        table.add_column("")
        for label in self.labels:
            table.add_column(label, justify="right")
        table.add_column("recall", justify="right")
        for gold in self.known_labels():
            counts = [self.pairs[gold, label] for label in self.labels]
            if total := sum(counts):
                recall = f"{self.pairs[gold, gold] / total:.0%}"
                table.add_row(gold, *(str(count or "·") for count in counts), recall)
        return table
