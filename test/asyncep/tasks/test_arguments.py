"""Whatever a Python caller gives: it is used as meant, or refused by its name before anything is computed."""

from __future__ import annotations

import decimal
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import pandas
import polars
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncep import Runtime
from asyncep.client.errors import OptionError
from asyncep.runtime.flags import in_python
from asyncep.tasks.arguments import FileOptions, as_declared, path_of, task_options
from asyncep.tasks.task import PromptOptions, TaskOptions

NAMES = sorted(PromptOptions.__annotations__)
ODD = [
    *(None, True, 0, 1.5, math.nan, 10**400, decimal.Decimal(1), object(), int, len),
    *(
        "",
        "sport",
        b"sport",
        "\ud83d",
        [],
        [None],
        [1, 2],
        ["a"],
        ["a", "b"],
        ("a", "b"),
        ["a", "\ud83d"],
        [["a", "b"]],
    ),
    *([["a", "b"]], [("x", "a")], [("x", "a", "b")], [("x", 5)], {"a", "b"}, {"a": 1}, {}, iter("ab"), range(2)),
    *(numpy.array(["a", "b"]), numpy.array([1, 2]), numpy.array([["a"]]), numpy.float64(1)),
    *(pandas.Series(["a", "b"]), pandas.DataFrame({"a": ["b"]}), polars.Series(["a", "b"]), pyarrow.array(["a", "b"])),
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def tried(name: str, value: Any) -> TaskOptions | None:
    """The options, or None where the argument was refused by its name."""
    labels, options = (value, {}) if name == "labels" else (["a", "b"], {name: value})
    refused = ""
    try:
        return task_options(labels, options)  # type: ignore[arg-type]
    except OptionError as error:
        refused = str(error)
    assert refused.startswith(name), refused
    # The words are ours; only the value itself may have these characters.
    for character in "$`":
        assert character not in refused or character in repr(value)
    return None


def test_the_keywords_are_the_options() -> None:
    assert set(NAMES) == {field.name for field in fields(TaskOptions)} - {"labels"}


@pytest.mark.parametrize("name", ["labels", *NAMES])
def test_odd_arguments(name: str) -> None:
    for value in ODD:
        found = tried(name, value)
        if found is not None and name in ("labels", "calibrate"):
            assert all(isinstance(text, str) for text in getattr(found, name))


@given(name=st.sampled_from(["labels", *NAMES]), value=anything)
@example(name="length", value="$")
@example(name="truncate", value="`")
@example(name="labels", value=("`", "`"))
def test_any_argument(name: str, value: Any) -> None:
    tried(name, value)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("sport", {}, "labels: a list is needed, not str"),
        (["a", 5], {}, r"labels\[1\]: a string is needed, not int"),
        (numpy.array([1, 2]), {}, r"labels\[0\]: a string is needed, not numpy.int64"),
        (["a", "b"], {"template": 5}, "template: a string or None is needed, not int"),
        (["a", "b"], {"template": "no place"}, "template: {text} is needed exactly once; it stands there 0 times"),
        (["a", "b"], {"chat": "yes"}, "chat: True or False is needed, not str"),
        (["a", "b"], {"system": 5}, "system: a string or None is needed, not int"),
        (["a", "b"], {"length": "max"}, "length: invalid enum value 'max'"),
        (["a", "b"], {"examples": [("x",)]}, r"examples\[0\]: a list of length 2 is needed, not 1"),
        (
            ["a", "b"],
            {"exampels": []},
            "exampels: no such option; there are calibrate, chat, descriptions, examples, length",
        ),
    ],
)
def test_what_is_said(labels: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        task_options(labels, options)


@pytest.mark.parametrize("labels", [numpy.array(["a", "b"]), pandas.Series(["a", "b"]), polars.Series(["a", "b"])])
def test_columns_of_labels_are_lists(labels: Any) -> None:
    assert list(task_options(labels, {}).labels) == ["a", "b"]


FILE = {"text": "t", "gold": None, "keep": ["a"], "restart": False, "overwrite": False, "input_format": None}
FILE |= {"limit": None, "shard": (0, 1), "output_format": None, "encoding": None, "delimiter": None, "quote": ""}
FILE |= {"header": True}


def test_how_files_are_read_is_said_by_the_right_types() -> None:
    assert set(FILE) == set(FileOptions.__annotations__)
    as_declared(FILE, FileOptions)
    for name in FILE:
        for wrong in (5, 1.5, b"x", {"a": "b"}, object()):
            if name == "limit" and wrong == 5:
                continue
            with pytest.raises(OptionError, match=f"^{name}"):
                as_declared({**FILE, name: wrong}, FileOptions)
    with pytest.raises(OptionError, match="keep: a list is needed, not str"):
        as_declared({**FILE, "keep": "id"}, FileOptions)


@pytest.mark.parametrize("given", [5, None, b"in.csv", "", ["in.csv"]])
def test_what_is_no_path(given: Any) -> None:
    with pytest.raises(OptionError, match=r"^report: a path is needed, not "):
        path_of("report", given)
    assert path_of("report", "a/b") == path_of("report", Path("a/b")) == Path("a/b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 5}, "model: a checkpoint's folder or a hub name"),
        ({"dp_size": "two"}, "dp_size: a whole number is needed, not str"),
        ({"dp_size": 0}, "dp_size: at least one rank"),
        ({"dp_size": True}, "dp_size: a whole number"),
        ({"start_seconds": "long"}, "start_seconds: a number"),
        ({"show_start": "no"}, "show_start: True or False"),
    ],
)
def test_a_runtimes_own_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"^{words}"):
        Runtime(**{"model": "m", **arguments})


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("--port 5: taken", "port 5: taken"),
        ("asyncep serve: --dp-sise: did you mean --dp-size?", "asyncep serve: dp_sise: did you mean dp_size?"),
        ("--model-path x: no config.json there", "model x: no config.json there"),
        ("--dtype: give it (--asyncep-copies too)", "dtype: give it (--asyncep-copies too)"),
        ("--x-y: see asyncep serve --help", "x_y: see asyncep serve --help"),
        ("not ready; its last words:\n[log] use --port", "not ready; its last words:\n[log] use --port"),
    ],
)
def test_flags_are_arguments_in_python(said: str, shown: str) -> None:
    assert in_python(said) == shown
