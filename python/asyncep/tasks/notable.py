"""Rows worth a look: the first with errors, the least certain, the most confidently wrong. Pure; adds up over parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from asyncep.tasks.results import Classification

_MOST = 20
_SNIPPET = 160


@dataclass(frozen=True, slots=True)
class NotableRow:
    """One row.

    Attributes:
        row: its number.
        text: its beginning.
        probability: of its label; None with an error.
        label: what it got; None with an error.
        gold: its true label, where it has one.
        error: why it has no label.
    """

    row: int
    text: str
    probability: float | None
    label: str | None
    gold: str | None
    error: str | None = None


@dataclass
class Notable:
    """The rows of each kind, at most twenty.

    Attributes:
        errors: rows without a label, the first of them.
        uncertain: the least probable first.
        wrong: rows whose label is not the true one, the most probable first.
    """

    errors: list[NotableRow] = field(default_factory=list)
    uncertain: list[NotableRow] = field(default_factory=list)
    wrong: list[NotableRow] = field(default_factory=list)

    def add(self, row: int, text: str | None, gold: str | None, answer: Classification, *, wrong: bool) -> None:
        """Looks at one row, whose label may be another than the true one."""
        if answer.label is None:
            if len(self.errors) < _MOST:
                self.errors.append(NotableRow(row, _begun(text or ""), None, None, gold, answer.error))
            return
        found = NotableRow(row, text or "", answer.probability, "; ".join(answer.labels) or answer.label, gold)
        self.uncertain = _first(self.uncertain, [found], 1)
        if wrong:
            self.wrong = _first(self.wrong, [found], -1)

    def merge(self, other: Notable) -> None:
        """Takes another's rows in."""
        self.errors = sorted([*self.errors, *other.errors], key=lambda entry: entry.row)[:_MOST]
        self.uncertain = _first(self.uncertain, other.uncertain, 1)
        self.wrong = _first(self.wrong, other.wrong, -1)

    def as_json(self) -> dict[str, Any]:
        """The rows as JSON can carry them; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Notable:
        """What `as_json` wrote."""
        return cls(**{kind: [NotableRow(**entry) for entry in found] for kind, found in rows.items()})


def _first(mine: list[NotableRow], others: list[NotableRow], sign: int) -> list[NotableRow]:
    """The first of both by probability, rising or falling. As a rule there are no others that belong there."""
    if len(mine) == _MOST:
        last = _place(mine[-1], sign)
        others = [entry for entry in others if _place(entry, sign) < last]
    if not others:
        return mine
    shown = [replace(entry, text=_begun(entry.text)) for entry in others]
    return sorted([*mine, *shown], key=lambda entry: _place(entry, sign))[:_MOST]


def _place(entry: NotableRow, sign: int) -> tuple[float, int]:
    return sign * (entry.probability or 0.0), entry.row


def _begun(text: str) -> str:
    shown = " ".join(text[: 2 * _SNIPPET].split())
    return shown if len(shown) <= _SNIPPET else shown[: _SNIPPET - 1] + "…"
