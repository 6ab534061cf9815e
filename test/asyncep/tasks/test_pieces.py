"""Rows, templates, decisions and summaries: the parts of `asyncep classify` that need no server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep.files.rows import InputError, Row, RowSource
from asyncep.tasks.scoring import decide, offsets_of
from asyncep.tasks.summary import Summary
from asyncep.tasks.template import DEFAULT, Template, TemplateError, read_examples


def test_bad_rows_carry_their_error_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "good", "y": 1}\nnot json\n{"text": 5}\n[1]\n\n{"text": " "}\n{"z": 1}\n\xff\xfe\n{"text": "last"}\n'
    )
    rows = list(RowSource(path, gold_field="y").rows())
    assert [row.number for row in rows] == list(range(8))
    assert [row.text for row in rows if row.text] == ["good", "last"]
    assert rows[0].gold == 1
    reasons = [row.error or "" for row in rows if row.error]
    for words, reason in zip(
        ["not JSON", "string is needed", "object is needed", "empty", "needed", "not JSON"], reasons, strict=True
    ):
        assert words in reason


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('body,label\n"a ""quoted"", text",spam\n"two\nlines",ham\n')
    rows = list(RowSource(path, "body", "label").rows())
    assert rows == [Row(0, 'a "quoted", text', "spam"), Row(1, "two\nlines", "ham")]
    with pytest.raises(InputError, match=r"no column 'text'.*--text-field"):
        RowSource(path).check()


@pytest.mark.parametrize("name", ["missing.jsonl", "table.xlsx"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=name):
        RowSource(tmp_path / name).check()


def test_templates() -> None:
    labels = ["spam", "ham"]
    assert Template.parse(DEFAULT, labels).render("X").endswith("Text: X\nLabel:")
    shown = Template.parse("Choose {labels}.\n\nMail: {text}\nAnswer:", labels, [("buy now", "spam")])
    assert shown.before == "Choose spam, ham.\n\nMail: buy now\nAnswer: spam\n\nMail: "
    for broken in ("no place", "{text} and {text}"):
        with pytest.raises(TemplateError, match="exactly once"):
            Template.parse(broken, labels)


def test_examples_are_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "shots.jsonl"
    # Characters at which str.splitlines would break a line.
    odd = "one\u2028two\x85three\x0bfour"
    path.write_text(json.dumps({"text": odd, "label": "a"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_examples(path, text_field="text", gold_field="label") == [(odd, "a")]
    path.write_text('{"text": "x", "label": "a"}\nbroken\n')
    with pytest.raises(TemplateError, match=r"shots\.jsonl:2: an example needs"):
        read_examples(path, text_field="text", gold_field="label")
    path.write_bytes(b'{"text": "\xe9", "label": "a"}\n')
    with pytest.raises(TemplateError, match="not UTF-8"):
        read_examples(path, text_field="text", gold_field="label")
    with pytest.raises(TemplateError, match="No such file"):
        read_examples(tmp_path / "none", text_field="text", gold_field="label")


def test_braces_in_a_text_are_only_text() -> None:
    assert Template.parse("Text: {text}!", ["a", "b"]).render("{text} {labels} {0}") == "Text: {text} {labels} {0}!"


scores = st.lists(st.floats(-500, 0), min_size=2, max_size=6)


@given(scores)
def test_probabilities_sum_to_one_and_follow_the_scores(row: list[float]) -> None:
    labels = [f"label {i}" for i in range(len(row))]
    decision = decide(row, labels)
    assert math.isclose(sum(decision.probabilities.values()), 1)
    assert decision.log_probabilities[decision.label] == max(row)


@given(st.lists(scores.map(lambda row: row[:2]), min_size=1), st.floats(-100, 100), st.floats(-100, 100))
def test_calibration_takes_out_what_a_label_gets_everywhere(rows: list[list[float]], a: float, b: float) -> None:
    labels = ["x", "y"]
    plain = offsets_of(rows)
    shifted_rows = [[row[0] + a, row[1] + b] for row in rows]
    shifted = offsets_of(shifted_rows)
    for row, moved in zip(rows, shifted_rows, strict=True):
        before, after = decide(row, labels, plain), decide(moved, labels, shifted)
        assert before.probabilities["x"] == pytest.approx(after.probabilities["x"], abs=1e-6)


def test_summary() -> None:
    summary = Summary(["a", "b"])
    for gold, predicted in (("a", "a"), ("a", "b"), ("b", "b"), (None, "a"), ("b", None), ("c", "a")):
        summary.add(gold, predicted)
    assert summary.accuracy == 2 / 4
    assert (summary.rows, summary.errors) == (6, 1)
    assert Summary(["a", "b"]).accuracy is None


def test_summaries_add_up() -> None:
    rows = [("a", "a", 0.95), ("a", "b", 0.51), (None, "b", 0.7), ("b", None, None), ("c", "a", 1.0), ("b", "b", 0.55)]
    whole, left, right = Summary(["a", "b"]), Summary(["a", "b"]), Summary(["a", "b"])
    for number, (gold, predicted, confidence) in enumerate(rows):
        whole.add(gold, predicted, confidence, "reason")
        (left if number % 2 else right).add(gold, predicted, confidence, "reason")
    left.merge(Summary.from_json(["a", "b"], json.loads(json.dumps(right.as_json()))))
    for name in ("pairs", "predicted", "rows", "errors", "reasons"):
        assert getattr(left, name) == getattr(whole, name)
    assert [entry.rows for entry in left.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert left.calibration_error == pytest.approx((abs(0.51 + 0.55 - 1) + abs(0.95 + 1.0 - 1)) / 4)
    assert left.macro_f1 == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


def test_kinds_of_errors_stay_few() -> None:
    summary = Summary(["a", "b"])
    for number in range(1000):
        summary.add(None, None, error=f"row {number} is bad")
    assert summary.reasons == {"row # is bad": 1000}
    for number in range(1000):
        summary.add(None, None, error=f"bad: {'x' * number}")
    assert len(summary.reasons) <= 21
    assert sum(summary.reasons.values()) == 2000
