"""Frames of three libraries, in and out."""

from __future__ import annotations

from typing import Any

import pandas
import polars
import pyarrow
import pytest

from asyncep.batching.errors import OptionError
from asyncep.runtime.frames import library_of, texts_of, with_results
from asyncep.runtime.results import Classification

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


def test_lists_are_no_frames() -> None:
    assert library_of(["text"]) is None
    assert library_of(iter("text")) is None
