"""Frames of three libraries, in and out."""

from __future__ import annotations

from typing import Any

import pandas
import polars
import pyarrow
import pytest

from asyncep.client.errors import OptionError
from asyncep.tasks.frames import check_frame, library_of, listed, texts_of, with_results
from asyncep.tasks.results import Classification

TEXTS = ["one", "two", None]
RESULTS = [
    Classification("a", {"a": 0.75, "b": 0.25}, {"a": -1.0, "b": -2.0}),
    Classification("b", {"a": 0.5, "b": 0.5}, {"a": -1.0, "b": -1.0}),
    Classification(None, error="a string is needed"),
]
FRAMES = {
    "pandas": pandas.DataFrame({"id": [7, 8, 9], "text": TEXTS}, index=[3, 1, 2]),
    "polars": polars.DataFrame({"id": [7, 8, 9], "text": TEXTS}),
    "pyarrow": pyarrow.table({"id": [7, 8, 9], "text": TEXTS}),
}
COLUMNS = {
    "pandas": pandas.Series(TEXTS, index=[3, 1, 2]),
    "polars": polars.Series(TEXTS),
    "pyarrow": pyarrow.chunked_array([TEXTS]),
}
NAMES = ["label", "probability", "p_a", "p_b", "error"]


def columns(frame: Any) -> dict[str, list[Any]]:
    if isinstance(frame, pandas.DataFrame):
        # pandas has NaN for what is not there.
        return {name: [None if pandas.isna(v) else v for v in frame[name]] for name in frame.columns}
    return frame.to_pydict() if isinstance(frame, pyarrow.Table) else frame.to_dict(as_series=False)


@pytest.mark.parametrize("library", FRAMES)
def test_a_frame_comes_back_with_columns_added(library: str) -> None:
    frame = FRAMES[library]
    assert library_of(frame) == library
    texts = texts_of(frame, "text")
    assert [None if not isinstance(text, str) else text for text in texts] == TEXTS
    found = with_results(frame, RESULTS, ["a", "b"])
    assert type(found) is type(frame)
    values = columns(found)
    assert list(values) == ["id", "text", *NAMES]
    assert values["id"] == [7, 8, 9]
    assert values["label"] == ["a", "b", None]
    assert values["p_b"] == [0.25, 0.5, None]
    assert values["error"] == [None, None, "a string is needed"]
    if library == "pandas":
        assert list(found.index) == [3, 1, 2]


@pytest.mark.parametrize("library", COLUMNS)
def test_a_column_becomes_a_frame_of_results(library: str) -> None:
    column = COLUMNS[library]
    assert len(texts_of(column, "ignored")) == 3
    values = columns(with_results(column, RESULTS, ["a", "b"]))
    assert list(values) == NAMES
    assert values["probability"] == [0.75, 0.5, None]


@pytest.mark.parametrize("library", FRAMES)
def test_columns_that_are_missing_or_in_the_way(library: str) -> None:
    with pytest.raises(OptionError, match=r"text='body': the frame has no such column, only id, text"):
        texts_of(FRAMES[library], "body")
    with pytest.raises(OptionError, match="already has the column"):
        with_results(with_results(FRAMES[library], RESULTS, ["a", "b"]), RESULTS, ["a", "b"])


# What an index may be: none of it says which row a result belongs to.
INDEXES = {
    "repeated": lambda n: [0] * n,
    "repeated names": lambda n: [["a", "b"][i % 2] for i in range(n)],
    "backwards": lambda n: list(range(n))[::-1],
    "strings": lambda n: [f"row {i}" for i in range(n)],
    "missing values": lambda n: [None if i % 2 else float("nan") for i in range(n)],
    "dates": lambda n: pandas.date_range("2026-01-01", periods=n).repeat(2)[:n],
    "two levels, repeated": lambda n: pandas.MultiIndex.from_tuples([(i % 2, "x") for i in range(n)], names=["a", "b"]),
    "categories": lambda n: pandas.CategoricalIndex(["u", "v"] * n)[:n],
}


def answers(texts: list[Any]) -> list[Classification]:
    """An answer for each text that can be told from every other's."""
    return [Classification("a", {"a": i / 1000, "b": 1 - i / 1000}, {}) for i, _ in enumerate(texts)]


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_results_go_to_rows_by_place_whatever_the_index_is(index: str, rows: int) -> None:
    made = INDEXES[index](rows)
    frame = pandas.DataFrame({"text": [f"t{i}" for i in range(rows)], "id": range(rows)}, index=made)
    before = frame.copy()
    found = with_results(frame, answers(texts_of(frame, "text")), ["a", "b"])
    assert found["id"].tolist() == list(range(rows))
    assert found["p_a"].tolist() == [i / 1000 for i in range(rows)]
    assert found.index.equals(frame.index)
    assert list(found.index.names) == list(frame.index.names)
    pandas.testing.assert_frame_equal(frame, before)
    column = with_results(frame["text"], answers(texts_of(frame["text"], "")), ["a", "b"])
    assert column["p_a"].tolist() == [i / 1000 for i in range(rows)]
    assert column.index.equals(frame.index)


def test_frames_put_together_of_others_keep_each_rows_answer() -> None:
    one = pandas.DataFrame({"text": ["x", "y"]})
    both = pandas.concat([one, one])
    assert with_results(both, answers(["x", "y"] * 2), ["a", "b"])["p_a"].tolist() == [0, 0.001, 0.002, 0.003]
    picked = both[both["text"] == "y"]
    assert with_results(picked, answers(["y", "y"]), ["a", "b"])["p_a"].tolist() == [0, 0.001]
    tables = pyarrow.concat_tables([pyarrow.table({"text": ["x", "y"]}), pyarrow.table({"text": ["x"]})]).slice(1)
    assert texts_of(tables, "text") == ["y", "x"]
    assert with_results(tables, answers(["y", "x"]), ["a", "b"])["p_a"].to_pylist() == [0, 0.001]
    chunks = polars.concat([polars.DataFrame({"text": ["x", "y"]})] * 2, rechunk=False).tail(3)
    assert with_results(chunks, answers(["y", "x", "y"]), ["a", "b"])["p_a"].to_list() == [0, 0.001, 0.002]
    [batch] = pyarrow.table({"text": ["x", "y"]}).to_batches()
    assert with_results(batch, answers(texts_of(batch, "text")), ["a", "b"])["p_a"].to_pylist() == [0, 0.001]


def test_columns_of_odd_names_stay() -> None:
    twice = pandas.DataFrame([["x", 1, 2], ["y", 3, 4]], columns=["text", "n", "n"], index=[5, 5])
    found = with_results(twice, answers(["x", "y"]), ["a", "b"])
    assert list(found.columns) == ["text", "n", "n", *NAMES]
    assert found.iloc[:, 1:3].to_numpy().tolist() == [[1, 2], [3, 4]]
    levels = pandas.DataFrame([["x", 1], ["y", 2]], columns=pandas.MultiIndex.from_tuples([("text", ""), ("n", "m")]))
    found = with_results(levels, answers(texts_of(levels, ("text", ""))), ["a", "b"])  # type: ignore[arg-type]
    assert found["p_a"].tolist() == [0, 0.001]
    assert found[("n", "m")].tolist() == [1, 2]
    with pytest.raises(OptionError, match="already has the column"):
        with_results(found, answers(["x", "y"]), ["a", "b"])
    named = pandas.DataFrame([["x", 1]], columns=pandas.CategoricalIndex(["text", "n"]))
    assert with_results(named, answers(["x"]), ["a", "b"])["label"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pandas.DataFrame([["x", "y"]], columns=["text", "text"]), "text='text': 2 columns are called that"),
        (pyarrow.table([["x"], ["y"]], names=["text", "text"]), "text='text': 2 columns are called that"),
        (polars.DataFrame({"text": ["x"]}).lazy(), r"the frame is lazy; collect\(\) it first"),
        (pandas.DataFrame({"text": ["x"]}).groupby("text"), "not DataFrameGroupBy"),
        (pyarrow.RecordBatchReader.from_batches(pyarrow.schema([]), []), "not RecordBatchReader"),
    ],
)
@pytest.mark.filterwarnings("ignore::polars.exceptions.PerformanceWarning")
def test_what_has_no_column_of_texts_is_refused(data: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        texts_of(data, "text")


@pytest.mark.parametrize("library", FRAMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_column_in_the_way_is_found_before_anything_is_computed(library: str, name: str) -> None:
    make = {"pandas": pandas.DataFrame, "polars": polars.DataFrame, "pyarrow": pyarrow.table}[library]
    with pytest.raises(OptionError, match=f"already has the column.s. {name};"):
        check_frame(make({"text": ["x"], name: ["y"]}), ["a", "b"])
    check_frame(make({"text": ["x"], f"{name}_": ["y"]}), ["a", "b"])


def test_arguments_as_lists() -> None:
    column = pandas.Series(["x", "y"], index=[1, 0])
    for values in (
        ["x", "y"],
        ("x", "y"),
        column,
        column.to_numpy(),
        iter("xy"),
        polars.Series(["x", "y"]),
        column.array,
    ):
        assert listed("documents", values) == ["x", "y"]
    assert listed("documents", pyarrow.chunked_array([["x"], ["y"]])) == ["x", "y"]
    for wrong in ("xy", b"xy", {"x": 1}, {"x", "y"}, None, 5):
        with pytest.raises(OptionError, match="documents: a list is needed"):
            listed("documents", wrong)
    for library, frame in FRAMES.items():
        with pytest.raises(OptionError, match="documents: a frame was given"):
            listed("documents", frame)
        assert library


def test_lists_are_no_frames() -> None:
    assert library_of(["text"]) is None
    assert library_of(iter("text")) is None
