"""Frames of three libraries, in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy
import pandas
import polars
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep.client.errors import OptionError
from asyncep.tasks.frames import library_of, listed, tabular, texts_of
from asyncep.tasks.results import Classification
from asyncep.tasks.task import TaskOptions

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
OPTIONS = TaskOptions(["a", "b"])


def taken(data: Any, column: Any = "text") -> Any:
    found = tabular(data, column)
    assert found is not None
    return found


def with_results(data: Any, results: list[Classification], column: Any = "text") -> Any:
    table = taken(data, column)
    table.check(OPTIONS)
    return table.with_results(results, OPTIONS)


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
    found = with_results(frame, RESULTS)
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
    values = columns(with_results(column, RESULTS))
    assert list(values) == NAMES
    assert values["probability"] == [0.75, 0.5, None]


@pytest.mark.parametrize("library", FRAMES)
def test_columns_that_are_missing_or_in_the_way(library: str) -> None:
    with pytest.raises(OptionError, match=r"text='body': the frame has no such column, only id, text"):
        texts_of(FRAMES[library], "body")
    with pytest.raises(OptionError, match="already has the column"):
        with_results(with_results(FRAMES[library], RESULTS), RESULTS)


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
    found = with_results(frame, answers(texts_of(frame, "text")))
    assert found["id"].tolist() == list(range(rows))
    assert found["p_a"].tolist() == [i / 1000 for i in range(rows)]
    assert found.index.equals(frame.index)
    assert list(found.index.names) == list(frame.index.names)
    pandas.testing.assert_frame_equal(frame, before)
    column = with_results(frame["text"], answers(texts_of(frame["text"], "")))
    assert column["p_a"].tolist() == [i / 1000 for i in range(rows)]
    assert column.index.equals(frame.index)


def test_frames_put_together_of_others_keep_each_rows_answer() -> None:
    one = pandas.DataFrame({"text": ["x", "y"]})
    both = pandas.concat([one, one])
    assert with_results(both, answers(["x", "y"] * 2))["p_a"].tolist() == [0, 0.001, 0.002, 0.003]
    picked = both[both["text"] == "y"]
    assert with_results(picked, answers(["y", "y"]))["p_a"].tolist() == [0, 0.001]
    tables = pyarrow.concat_tables([pyarrow.table({"text": ["x", "y"]}), pyarrow.table({"text": ["x"]})]).slice(1)
    assert texts_of(tables, "text") == ["y", "x"]
    assert with_results(tables, answers(["y", "x"]))["p_a"].to_pylist() == [0, 0.001]
    chunks = polars.concat([polars.DataFrame({"text": ["x", "y"]})] * 2, rechunk=False).tail(3)
    assert with_results(chunks, answers(["y", "x", "y"]))["p_a"].to_list() == [0, 0.001, 0.002]
    [batch] = pyarrow.table({"text": ["x", "y"]}).to_batches()
    assert with_results(batch, answers(texts_of(batch, "text")))["p_a"].to_pylist() == [0, 0.001]


def test_columns_of_odd_names_stay() -> None:
    twice = pandas.DataFrame([["x", 1, 2], ["y", 3, 4]], columns=["text", "n", "n"], index=[5, 5])
    found = with_results(twice, answers(["x", "y"]))
    assert list(found.columns) == ["text", "n", "n", *NAMES]
    assert found.iloc[:, 1:3].to_numpy().tolist() == [[1, 2], [3, 4]]
    levels = pandas.DataFrame([["x", 1], ["y", 2]], columns=pandas.MultiIndex.from_tuples([("text", ""), ("n", "m")]))
    found = with_results(levels, answers(["x", "y"]), ("text", ""))
    assert found["p_a"].tolist() == [0, 0.001]
    assert found[("n", "m")].tolist() == [1, 2]
    with pytest.raises(OptionError, match="already has the column"):
        with_results(found, answers(["x", "y"]), ("text", ""))
    named = pandas.DataFrame([["x", 1]], columns=pandas.CategoricalIndex(["text", "n"]))
    assert with_results(named, answers(["x"]))["label"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pandas.DataFrame([["x", "y"]], columns=["text", "text"]), "text='text': 2 columns are called that"),
        (pyarrow.table([["x"], ["y"]], names=["text", "text"]), "text='text': 2 columns are called that"),
        (pandas.DataFrame({"text": ["x"]}).groupby("text"), "not DataFrameGroupBy"),
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
        taken(make({"text": ["x"], name: ["y"]})).check(OPTIONS)
    taken(make({"text": ["x"], f"{name}_": ["y"]})).check(OPTIONS)


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


def reader() -> pyarrow.RecordBatchReader:
    table = FRAMES["pyarrow"]
    return pyarrow.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=2))


@pytest.mark.parametrize(
    ("data", "kind", "read"),
    [
        ({"id": (7, 8, 9), "text": TEXTS}, dict, dict),
        ({"id": numpy.array([7, 8, 9]), "text": polars.Series(TEXTS)}, dict, dict),
        (polars.DataFrame({"id": [7, 8, 9], "text": TEXTS}).lazy(), polars.LazyFrame, lambda f: columns(f.collect())),
        (reader(), pyarrow.Table, columns),
        (datasets.Dataset.from_dict({"id": [7, 8, 9], "text": TEXTS}), datasets.Dataset, lambda f: f.to_dict()),
    ],
    ids=["mapping", "mapping of columns", "lazy", "reader", "dataset"],
)
def test_other_tables(data: Any, kind: type, read: Any) -> None:
    assert taken(data).texts == TEXTS
    found = (
        with_results(data, RESULTS)
        if not isinstance(data, pyarrow.RecordBatchReader)
        else taken(reader()).with_results(RESULTS, OPTIONS)
    )
    assert type(found) is kind
    values = read(found)
    assert list(values) == ["id", "text", *NAMES]
    assert list(values["id"]) == [7, 8, 9]
    assert values["label"] == ["a", "b", None]
    assert values["p_b"] == [0.25, 0.5, None]
    assert values["error"] == [None, None, "a string is needed"]


def test_a_column_of_a_dataset_and_columns_in_mappings() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"]})
    assert taken(dataset["text"]).texts == ["x", "y"]
    assert listed("documents", dataset["text"]) == ["x", "y"]
    found = with_results(dataset["text"], RESULTS[:2])
    assert list(found) == NAMES


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "texts: of a mapping, each key has to be a column's name"),
        ({1: ["x"]}, "texts: of a mapping, each key"),
        ({"body": ["x"]}, "text='text': the mapping has no such column, only body"),
        ({"text": ["x"], "id": [1, 2]}, "texts: columns of different lengths: 'text' has 1, 'id' has 2"),
        ({"text": "x"}, r"texts\['text'\]: a list is needed, not str"),
        ({"text": ["x"], "label": ["y"]}, r"already has the column\(s\) label"),
        (datasets.Dataset.from_dict({"body": ["x"]}), "text='text': the dataset has no such column, only body"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}),
            "DatasetDict is not taken; give one",
        ),
        (datasets.Dataset.from_dict({"text": ["x"]}).to_iterable_dataset(), "IterableDataset is not taken; give an it"),
    ],
)
def test_tables_that_cannot_be_taken(data: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        taken(data).check(OPTIONS)


def test_a_frame_of_another_library_is_refused_and_not_read_by_its_columns() -> None:
    class DataFrame:
        columns = ("text",)

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    DataFrame.__module__ = "modin.pandas"
    with pytest.raises(OptionError, match="texts: a DataFrame of modin is not taken; give one of its columns"):
        tabular(DataFrame(), "text")
    with pytest.raises(OptionError, match="documents: a frame was given; give one of its columns"):
        listed("documents", DataFrame())


def test_arrays() -> None:
    assert tabular(numpy.array(["x", "y"]), "text") is None
    assert listed("texts", numpy.array(["x", "y"])) == ["x", "y"]
    for wrong in (numpy.array([["x"]]), numpy.array([("x", 1)], dtype=[("text", "U1"), ("n", int)]), numpy.array("x")):
        with pytest.raises(OptionError, match="texts: an array of one dimension is needed"):
            listed("texts", wrong)


SEVERAL = TaskOptions(["a", "b"], multi_label=True, truncate="tail")


@pytest.mark.parametrize("data", [*FRAMES.values(), {"text": TEXTS}, datasets.Dataset.from_dict({"text": TEXTS})])
def test_several_labels_are_lists(data: Any) -> None:
    results = [
        Classification("a", {"a": 0.9, "b": 0.1}, labels=("a",), cut_characters=3),
        Classification("b", {"a": 0.1, "b": 0.2}),
        Classification(None, error="a string is needed"),
    ]
    found = taken(data).with_results(results, SEVERAL)
    values = columns_of(found)
    assert [list(v) if v is not None else None for v in values["labels"]] == [["a"], [], None]
    assert [None if v is None or v != v else int(v) for v in values["cut_characters"]] == [3, 0, None]
    assert "label" not in values


def columns_of(frame: Any) -> dict[str, Any]:
    if isinstance(frame, datasets.Dataset):
        return dict(frame.to_dict())
    if isinstance(frame, pandas.DataFrame):
        return {name: list(frame[name]) for name in frame.columns}
    return frame if isinstance(frame, dict) else columns(frame)


texts = st.lists(st.text(max_size=4) | st.none() | st.integers() | st.just(float("nan")), max_size=6)


@given(texts, st.sampled_from(["pandas", "polars", "arrow", "mapping", "lazy", "dataset"]))
def test_every_row_comes_back_once_and_in_place_or_the_call_is_refused(values: list[Any], kind: str) -> None:
    make = {
        "pandas": pandas.DataFrame,
        "polars": polars.DataFrame,
        "arrow": pyarrow.table,
        "mapping": dict,
        "lazy": polars.LazyFrame,
        "dataset": datasets.Dataset.from_dict,
    }[kind]
    try:
        data = make({"text": values, "place": list(range(len(values)))})
    except Exception:
        return  # a column of mixed kinds is not to be had in this library
    table = taken(data)
    assert len(table.texts) == len(values)
    results = [Classification("a", {"a": i / 10, "b": 1 - i / 10}) for i in range(len(values))]
    found = table.with_results(results, OPTIONS)
    found = found.collect() if kind == "lazy" else found
    assert list(found["place"] if kind != "arrow" else found["place"].to_pylist()) == list(range(len(values)))
    assert list(found["p_a"] if kind != "arrow" else found["p_a"].to_pylist()) == [i / 10 for i in range(len(values))]
