"""Labels as people write them; several words a label, several labels a text, and texts of which no label is sure."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, log_likelihood, toy_facts

from asyncep.client.errors import OptionError
from asyncep.client.tokens import Untokenized
from asyncep.tasks.arguments import task_options
from asyncep.tasks.gold import as_label, label_text, several
from asyncep.tasks.label_files import Labels, labels_in, read_labels
from asyncep.tasks.label_mass import LabelMassWarning, little_mass, warn_of_mass
from asyncep.tasks.results import Classification
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions
from asyncep.tasks.template import Template, read_template


def classify(texts: list[Any], options: TaskOptions, server: ToyServer | None = None) -> list[Classification]:
    async def run() -> list[Classification]:
        async with session_with(server or ToyServer(), ByteTokens(), toy_facts()) as session:
            return await session.classify_as(texts, options)

    return asyncio.run(run())


def exact(prompt: str, continuation: str) -> float:
    return log_likelihood(list(prompt.encode()), list(continuation.encode()))


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("sport,politics", ("sport", "politics")),
        (' sport , "arts, culture" ', ("sport", "arts, culture")),
        ('"say ""hi""",b,,', ('say "hi"', "b")),
    ],
)
def test_labels_on_a_command_line(line: str, names: tuple[str, ...]) -> None:
    assert labels_in(line).names == names


def test_an_open_quote_among_labels() -> None:
    with pytest.raises(OptionError, match="stands in double quotes"):
        labels_in('a,"b')


KNOWN = Labels(
    ("sport", "arts"), {"sport": "games"}, {"arts": ("arts", "culture")}, {"sport": 0.7}
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "l.json",
            '[{"label": "sport", "description": "games", "threshold": 0.7}, '
            '{"label": "arts", "words": ["arts", "culture"]}]',
        ),
        ("l.json", '{"sport": {"description": "games", "threshold": 0.7}, "arts": {"words": ["arts", "culture"]}}'),
        ("l.yaml", "- label: sport\n  description: games\n  threshold: 0.7\n- label: arts\n  words: [arts, culture]\n"),
        ("l.yml", "sport: {description: games, threshold: 0.7}\narts:\n  words:\n  - arts\n  - culture\n"),
    ],
)
def test_labels_in_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == KNOWN


def test_labels_a_line(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("\ufeffsport\r\n\n arts, culture \n")
    assert read_labels(tmp_path / "l.txt") == Labels(("sport", "arts, culture"))
    assert task_options(tmp_path / "l.txt", {}).labels == ["sport", "arts, culture"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[yes, no]", r"l.yaml\[0\]: a string is needed, not bool; put it in quotes"),
        ("- {label: a, colour: red}", r"l.yaml\[0\]: 'colour' is unknown; there are description"),
        ("- {label: a, threshold: 2}", r"l.yaml\[0\].threshold: a number from 0 to 1"),
        ("- {label: a, words: {}}", r"l.yaml\[0\].words: a list of strings"),
        ("- {description: a}", r"l.yaml\[0\].label: a string is needed, not NoneType"),
        ("just a string", "l.yaml: a list of labels, or an object"),
        ("a: [1", "l.yaml: not YAML"),
        ("a: 5", r"l.yaml.a: a description or an object is needed, not int"),
    ],
)
def test_files_of_labels_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "l.yaml").write_text(text)
    with pytest.raises(OptionError, match=words):
        read_labels(tmp_path / "l.yaml")


def test_python_takes_labels_as_files_have_them() -> None:
    for labels in (
        {"sport": "games", "arts": {"words": "culture"}},
        [{"label": "sport", "description": "games"}, "arts"],
    ):
        found = task_options(labels, {})
        assert list(found.labels) == ["sport", "arts"]
        assert found.descriptions == {"sport": "games"}
    with pytest.raises(OptionError, match="descriptions: some stand with the labels already"):
        task_options({"sport": "games", "arts": ""}, {"descriptions": {"arts": "x"}})


def test_the_prompt_shows_descriptions() -> None:
    options = task_options({"sport": "games, matches", "arts": ""}, {})
    assert "- sport: games, matches\n- arts\n" in options.templates()[0].before
    with pytest.raises(OptionError, match=r"template: labels have descriptions, .* add \{descriptions\}"):
        task_options({"sport": "games", "arts": "x"}, {"template": "{text} {labels}"})


def test_a_label_is_as_probable_as_all_its_words() -> None:
    options = TaskOptions(["warm", "cold"], "It is {text}:", words={"warm": ["warm", "hot", "mild"]})
    [found] = classify(["x"], options)
    warm = math.log(sum(math.exp(exact("It is x:", f" {word}")) for word in ("warm", "hot", "mild")))
    cold = exact("It is x:", " cold")
    assert found.log_probabilities == pytest.approx({"warm": warm, "cold": cold})
    assert found.probabilities["warm"] == pytest.approx(math.exp(warm) / (math.exp(warm) + math.exp(cold)))
    assert found.label_mass == pytest.approx(math.exp(warm) + math.exp(cold))


def test_each_of_several_labels_is_a_question() -> None:
    labels = ["red", "green", "blue"]
    options = TaskOptions(labels, "T: {text}\nIs it {label}?", multi_label=True, threshold={"red": 0.0, "green": 1.0})
    server = ToyServer()
    [found, other] = classify(["x", "y"], options, server)
    for label in labels:
        prompt = f"T: x\nIs it {label}?"
        odds = exact(prompt, " yes") - exact(prompt, " no")
        assert found.probabilities[label] == pytest.approx(1 / (1 + math.exp(-odds)))
        assert found.log_probabilities[label] == pytest.approx(exact(prompt, " yes"))
    assert "red" in found.labels
    assert "green" not in found.labels
    assert ("blue" in found.labels) == (found.probabilities["blue"] >= 0.5)
    assert other != found


def test_calibration_of_several_labels() -> None:
    options = TaskOptions(["red", "blue"], "{text}: {label}?", multi_label=True, calibrate=("N/A", "?"))
    [found] = classify(["x"], options)
    for label in ("red", "blue"):
        odds = {t: exact(f"{t}: {label}?", " yes") - exact(f"{t}: {label}?", " no") for t in ("x", "N/A", "?")}
        shifted = odds["x"] - (odds["N/A"] + odds["?"]) / 2
        assert found.probabilities[label] == pytest.approx(1 / (1 + math.exp(-shifted)))


def test_texts_of_which_no_label_is_sure() -> None:
    options = TaskOptions(["a", "b"], "{text}:", other_below=1.0, other="neither")
    found = classify(["x", "y", ""], options)
    assert [answer.label for answer in found] == ["neither", "neither", None]
    assert found[0].labels == ("neither",)
    assert found[0].probability == max(found[0].probabilities.values())
    assert options.outcomes == ("a", "b", "neither")
    sure = classify(["x"], TaskOptions(["a", "b"], "{text}:", other_below=0.0))
    assert sure[0].label in ("a", "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"multi_label": True, "examples": [("x", "a")]}, "examples: not with multi_label"),
        ({"multi_label": True, "words": {"a": ["b"]}}, "words: not with multi_label"),
        ({"multi_label": True, "other_below": 0.5}, "other_below: not with multi_label"),
        ({"multi_label": True, "template": "{text}"}, r"template: \{label\} is needed"),
        ({"threshold": 0.5}, "threshold: only with multi_label"),
        ({"multi_label": True, "threshold": 1.5}, "threshold: a number from 0 to 1 is needed, not 1.5"),
        ({"multi_label": True, "threshold": {"c": 0.5}}, "threshold: 'c' is not among the labels"),
        ({"other_below": math.nan}, "other_below: a number from 0 to 1 is needed, not nan"),
        ({"other_below": 0.5, "other": " "}, "other: ' ' has no letters"),
        ({"words": {"a": []}}, "words: 'a': at least one word is needed"),
        ({"descriptions": {"c": "x"}}, "descriptions: 'c' is not among the labels"),
        ({"truncate": "left"}, "truncate: invalid enum value 'left'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        task_options(["a", "b"], options)


def test_words_that_the_model_cannot_tell_apart() -> None:
    with pytest.raises(OptionError, match="labels: 'x' and 'x' have the same tokens"):
        classify(["t"], TaskOptions(["a", "b"], "{text}", words={"a": ["x"], "b": ["x"]}))


@pytest.mark.parametrize(
    ("template", "end", "label"),
    [
        ("{text}\nLabel:", "\nLabel:", " a"),
        ("{text}\nLabel: ", "\nLabel:", " a"),
        ("{text}\nLabel:\n", "\nLabel:\n", "a"),
        ("{text}\nLabel:\t", "\nLabel:\t", "a"),
        ("{text}\nLabel:  ", "\nLabel: ", " a"),
        ("{text}", "", " a"),
        ("{text} ", "", " a"),
    ],
)
def test_a_space_stands_before_a_label_where_the_model_would_write_one(template: str, end: str, label: str) -> None:
    parsed = Template.parse(template, ["a", "b"], [("shown", "b")])
    assert parsed.after == end
    assert f"{parsed.joiner}a" == label
    # As text, nothing but the place of a space has changed.
    assert parsed.render("x") == f"{parsed.before}x{end}"
    assert f"x{end}{parsed.joiner}".rstrip(" ") == template.replace("{text}", "x").rstrip(" ")
    server = ToyServer()
    [found] = classify(["x"], TaskOptions(["aa", "bb"], template), server)
    prompt = "x" + end
    assert found.log_probabilities["aa"] == pytest.approx(exact(prompt, f"{parsed.joiner}aa"))


def test_a_label_is_the_first_of_the_next_turn_in_a_chat() -> None:
    plain = Template.parse("{text}\nLabel:", ["a", "b"])
    assert plain.in_chat("<user>", "</user>\n<assistant>\n").joiner == ""
    assert plain.in_chat("<user>", "</user><assistant>").joiner == ""
    assert plain.in_chat("USER: ", " ASSISTANT: ") == Template("USER: ", " ASSISTANT:", " ")


@given(st.text(min_size=300, max_size=2500), st.sampled_from(["head", "tail", "middle"]), st.integers(60, 400))
def test_only_the_text_is_cut_and_no_more_than_it_must(text: str, how: Any, most: int) -> None:
    server = ToyServer()
    text = "".join(character for character in text if character != "!") or "x"

    async def run() -> Classification:
        async with session_with(server, ByteTokens(), toy_facts(most_tokens=most)) as session:
            [found] = await session.classify_as([text], TaskOptions(["aa", "ab"], "Say: {text}\nNow:", truncate=how))
            return found

    found = asyncio.run(run())
    if not text.strip() or len(text.encode("utf-8", "replace")) == 0 or found.error == "the text is empty":
        return
    assert found.label in ("aa", "ab")
    prompts = [bytes(prompt) for prompt in server.prompts]
    shown = min(prompts, key=len)
    assert shown.startswith(b"Say: ")
    assert shown.endswith(b"\nNow:")
    assert all(len(prompt) <= most for prompt in prompts)
    inner = shown[len(b"Say: ") : -len(b"\nNow:")].decode()
    kept = len(text) - found.cut_characters
    if not found.cut_characters:
        assert inner == text
        return
    if how == "tail":
        assert inner == text[:kept]
    elif how == "head":
        assert inner == text[len(text) - kept :]
    else:
        first, _, last = inner.partition(" … ") if " … " not in text else (text[: (kept + 1) // 2], "", "")
        assert text.startswith(first)
        assert text.endswith(last)
    # Characters have one to four bytes here, so a guess by their mean is rough.
    assert kept >= 0.2 * (most - 30) / 4


def test_a_prompt_that_leaves_no_room_is_an_error() -> None:
    async def run() -> Classification:
        async with session_with(ToyServer(), ByteTokens(), toy_facts(most_tokens=30)) as session:
            [found] = await session.classify_as(["x"], TaskOptions(["a", "b"], "y" * 40 + "{text}", truncate="tail"))
            return found

    assert "the prompt has" in (asyncio.run(run()).error or "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (1, "1"),
        (1.5, "1.5"),
        (True, "true"),
        ("", None),
        (None, None),
        (math.nan, None),
        ("x", "x"),
        (0, "0"),
    ],
)
def test_true_labels_as_text(value: Any, text: str | None) -> None:
    assert label_text(value) == text


@pytest.mark.parametrize(
    ("gold", "labels", "label"),
    [
        ("1.0", {"1", "2"}, "1"),
        ("1.0", {"1.0", "1"}, "1.0"),
        (" sport ", {"sport"}, "sport"),
        ("True", {"true"}, "true"),
        ("true", {"True"}, "True"),
        ("Sport", {"sport"}, "Sport"),
        ("inf", {"1"}, "inf"),
        ("1e3", {"1000"}, "1000"),
    ],
)
def test_true_labels_written_otherwise(gold: str, labels: set[str], label: str) -> None:
    assert as_label(gold, labels) == label


@given(st.lists(st.text(min_size=1).map(str.strip).filter(bool), max_size=4))
def test_several_true_labels(labels: list[str]) -> None:
    text = label_text(labels)
    assert text is not None
    assert several(text) == labels
    assert several("a; b;;") == ["a", "b"]
    assert several("[not json") == ["[not json"]
    assert json.loads(text) == labels


def test_examples_end_as_the_model_is_to_end() -> None:
    options = TaskOptions(["pos", "neg"], "{text}\nIs:", (("fine", "pos"),), words={"pos": ["good", "great"]})
    assert "fine\nIs: good\n\n" in options.templates()[0].before


@pytest.mark.parametrize("multi", [False, True])
def test_what_stands_for_a_place_may_look_like_another(multi: bool) -> None:
    labels = ["{text}", "{labels}", "{description}"]
    described = {"{text}": "it has {text} in it, and {label}", "{labels}": "", "{description}": "x"}
    options = TaskOptions(labels, descriptions=described, multi_label=multi)
    options.check()
    for template in options.templates():
        assert template.render("THE TEXT").count("THE TEXT") == 1
    if multi:
        assert '"{text}" (it has {text} in it, and {label}) apply' in options.templates()[0].after


def test_labels_without_a_description_are_asked_about_plainly() -> None:
    first, second = TaskOptions(["a", "b"], descriptions={"a": "x"}, multi_label=True).templates()
    assert '"a" (x) apply' in first.after
    assert '"b" apply' in second.after


HALF = "\ud800"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", [HALF, "b"]),
        ("template", HALF + "{text}"),
        ("calibrate", HALF),
        ("examples", [(HALF, "a")]),
        ("descriptions", {"a": HALF}),
        ("words", {"a": [HALF]}),
        ("other", HALF),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name(name: str, value: Any) -> None:
    labels, options = (value, {}) if name == "labels" else (["a", "b"], {name: value})
    with pytest.raises(OptionError, match=f"{name}: half of a surrogate pair"):
        task_options(labels, options)
    with pytest.raises(OptionError, match="system: half of a surrogate pair"):
        task_options(["a", "b"], {"chat": True, "system": HALF})


class Strict(ByteTokens):
    """Refuses to divide long texts, as servers do."""

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        found = await super().encode(texts, special=special)
        return [Untokenized("too long") if len(ids) > 300 else ids for ids in found]


def test_texts_that_the_server_does_not_divide_are_cut_too() -> None:
    async def run() -> Classification:
        async with session_with(ToyServer(), Strict(), toy_facts(most_tokens=100)) as session:
            [found] = await session.classify_as(["x" * 5000], TaskOptions(["a", "b"], "{text}:", truncate="head"))
            return found

    found = asyncio.run(run())
    assert found.label is not None
    assert found.cut_characters > 4900


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_break_of_a_file_is_not_the_prompts(tmp_path: Path, end: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"Text: {text}\n\nLabel:" + end.encode())
    assert read_template(tmp_path / "t.txt") == "Text: {text}\n\nLabel:"


def test_a_warning_where_labels_have_next_to_no_probability() -> None:
    assert little_mass(None) is None
    assert little_mass(0.01) is None
    assert "gives the labels 0.0099 of the probability" in (little_mass(0.0099) or "")
    with pytest.warns(LabelMassWarning, match="gives the labels under 1%") as seen:
        warn_of_mass(0.0, 0)
    assert len(seen) == 1
