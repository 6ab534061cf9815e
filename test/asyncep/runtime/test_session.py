"""The runtime's methods on a toy model, held against one label token after another."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import numpy
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, log_likelihood, next_logs, toy_facts

from asyncep.client.errors import OptionError, RejectedError
from asyncep.client.probes import Probe, Reading
from asyncep.runtime.windows import in_order
from asyncep.tasks.session import RERANK_TEMPLATE, Session, session_with
from asyncep.tasks.task import TaskOptions

T = TypeVar("T")


def ask(work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            return await work(session)

    return asyncio.run(run())


def exact(prompt: str, label: str) -> float:
    return log_likelihood(list(prompt.encode()), list(f" {label}".encode()))


def classify(texts: list[Any], options: TaskOptions) -> list[Any]:
    async def work(session: Session) -> list[Any]:
        return await session.classify(texts, await session.prepare(options))

    return ask(work)


def test_classify_takes_the_most_likely_label() -> None:
    labels = ["red", "green", "reddish"]
    for text, found in zip(["x", "y z"], classify(["x", "y z"], TaskOptions(labels, "Is {text}:")), strict=True):
        expected = {label: exact(f"Is {text}:", label) for label in labels}
        assert found.log_probabilities == pytest.approx(expected)
        assert found.label == max(labels, key=expected.__getitem__)
        total = sum(math.exp(score) for score in expected.values())
        assert found.probability == pytest.approx(math.exp(expected[found.label]) / total)
        assert found.error is None
        assert found.tokens > 0


def test_texts_that_cannot_be_classified_have_errors_of_their_own() -> None:
    found = classify(["fine", "", None, "x" * 5000, "refused!", "fine"], TaskOptions(["a", "b"], "{text}"))
    assert [result.error is None for result in found] == [True, False, False, False, False, True]
    for result, words in zip(found[1:5], ["empty", "not NoneType", "context length", "refused"], strict=True):
        assert words in result.error
        assert result.label is None
        assert result.probability is None
    assert found[0] == found[5]


def test_examples_and_calibration() -> None:
    shots = (("hot", "warm"), ("ice", "cold"))
    options = TaskOptions(["warm", "cold"], "Say.\n\nIt: {text}\nIs:", shots, calibrate=("N/A", "?"))
    [found] = classify(["sun"], options)
    prompt = "Say.\n\nIt: hot\nIs: warm\n\nIt: ice\nIs: cold\n\nIt: {}\nIs:"
    raw = {label: exact(prompt.format("sun"), label) for label in options.labels}
    neutral = {label: sum(exact(prompt.format(n), label) for n in ("N/A", "?")) / 2 for label in options.labels}
    assert found.log_probabilities == pytest.approx(raw)
    shifted = {label: raw[label] - neutral[label] for label in options.labels}
    odds = shifted["warm"] - shifted["cold"]
    assert found.probabilities["warm"] == pytest.approx(1 / (1 + math.exp(-odds)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TaskOptions(["a"]), "labels: at least two"),
        (TaskOptions(["a", "a"]), "labels: at least two different"),
        (TaskOptions(["a", "b"], examples=(("x", "c"),)), "examples: .* 'c', which is not among"),
        (TaskOptions(["a", "b"], system="be kind"), "system: .* chat=True"),
        (TaskOptions(["a", "b"], chat=True), "chat: needs a server"),
        (TaskOptions(["a", "b"], "{text}", calibrate=("x" * 5000,)), "calibrate: a neutral text"),
        (TaskOptions(["a", "b"], "no place"), "exactly once"),
    ],
)
def test_options_that_cannot_be_used(options: TaskOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classify(["x"], options)


def test_score_and_logprobs() -> None:
    query, items, tokens = "q:", ["one", "two"], [5, 9, 200]
    softmax = ask(lambda session: session.score(query, items, tokens))
    plain = ask(lambda session: session.score(query, items, tokens, apply_softmax=False, item_first=True))
    ids = ask(lambda session: session.score(list(b"q:"), [list(b"one")], tokens))
    for item, soft, hard in zip(items, softmax, plain, strict=True):
        after, before = (
            next_logs(list((query + item).encode()))[tokens],
            next_logs(list((item + query).encode()))[tokens],
        )
        assert soft.log_probabilities == pytest.approx(list(after))
        assert sum(soft.values) == pytest.approx(1)
        assert hard.values == pytest.approx([math.exp(log) for log in before])
    assert ids[0] == softmax[0]
    [logs, refused] = ask(lambda session: session.logprobs(["text", "no!"], tokens))
    assert logs.log_probabilities == pytest.approx(list(next_logs(list(b"text"))[tokens]))
    assert (refused.error, refused.log_probabilities) == ("refused", ())
    with pytest.raises(OptionError, match="label_token_ids: at least one is needed, and each once"):
        ask(lambda session: session.score(query, items, [1, 1]))
    for wrong in (-1, 1.5, "5", True, None, 2**40):
        with pytest.raises(OptionError, match=f"token_ids: {wrong!r} is no token id"):
            ask(lambda session, wrong=wrong: session.logprobs(["text"], [5, wrong]))  # type: ignore[misc]
    assert ask(lambda session: session.logprobs(["text"], numpy.array(tokens)))[0] == logs
    with pytest.raises(OptionError, match="query, items: give both"):
        ask(lambda session: session.score(query, [[1, 2]], [1]))


def test_rerank_sorts_by_the_probability_of_yes() -> None:
    documents = ["first", "{query} in braces", "bad!", "third"]
    found = ask(lambda session: session.rerank("cats?", documents))
    scores = {}
    for number, document in enumerate(documents):
        prompt = RERANK_TEMPLATE.replace("{query}", "cats?").replace("{document}", document)
        yes, no = exact(prompt, "yes"), exact(prompt, "no")
        scores[number] = 1 / (1 + math.exp(no - yes))
    assert [entry.index for entry in found] == [*sorted({0, 1, 3}, key=lambda n: -scores[n]), 2]
    for entry in found[:3]:
        assert entry.score == pytest.approx(scores[entry.index])
        assert entry.document == documents[entry.index]
    assert found[3].error == "refused"
    assert len(ask(lambda session: session.rerank("cats?", documents, top_n=2))) == 2
    with pytest.raises(OptionError, match=r"template: \{document\}"):
        ask(lambda session: session.rerank("cats?", documents, template="{query}"))


def test_columns_are_lists_by_place_whatever_their_index_says() -> None:
    documents = ["first", "second", "third"]
    column = pandas.Series(documents, index=[2, 0, 0])
    by_list, by_column = (ask(lambda s, d=d: s.rerank("cats?", d)) for d in (documents, column))  # type: ignore[misc]
    assert by_list == by_column
    assert [entry.document for entry in by_column] == [documents[entry.index] for entry in by_column]
    assert ask(lambda session: session.score("q:", column, [5, 9])) == ask(
        lambda session: session.score("q:", documents, [5, 9])
    )
    assert ask(lambda session: session.logprobs(column, [5, 9])) == ask(
        lambda session: session.logprobs(documents, [5, 9])
    )
    frame = pandas.DataFrame({"text": documents})
    with pytest.raises(OptionError, match="prompts: a frame was given"):
        ask(lambda session: session.logprobs(frame, [5, 9]))
    with pytest.raises(OptionError, match="documents: a list is needed, not str"):
        ask(lambda session: session.rerank("cats?", "first"))


def test_half_a_surrogate_pair_hurts_no_other_text() -> None:
    broken, fine = classify(["A \ud83d", "ok"], TaskOptions(["a", "b"], "{text}"))
    assert "surrogate" in broken.error
    assert fine.label is not None


HALF = "A \ud83d"


def test_half_a_surrogate_pair_is_an_error_of_its_row_or_of_its_argument() -> None:
    """Of every method that takes texts."""
    broken, fine = ask(lambda session: session.logprobs([HALF, "ok"], [5]))
    assert "surrogate" in (broken.error or "")
    assert fine.error is None
    scored = ask(lambda session: session.score("q", [HALF, "ok"], [5]))
    assert ["surrogate" in (found.error or "") for found in scored] == [True, False]
    ranked = ask(lambda session: session.rerank("q", [HALF, "ok"]))
    assert [found.index for found in ranked if "surrogate" in (found.error or "")] == [0]
    refused: dict[str, Callable[[Session], Coroutine[Any, Any, Any]]] = {
        "query": lambda session: session.score(HALF, ["x"], [5]),
        "query: ": lambda session: session.rerank(HALF, ["x"]),
        "template": lambda session: session.rerank("q", ["x"], template=f"{HALF}{{query}} {{document}}"),
        "answers": lambda session: session.rerank("q", ["x"], answers=(HALF, "no")),
        r"texts\[1\]": lambda session: session.tokenize(["x", HALF]),
    }
    for name, work in refused.items():
        with pytest.raises(OptionError, match=f"^{name}.*surrogate"):
            ask(work)


@given(
    st.lists(
        st.text(st.characters(exclude_categories=()), max_size=3)
        | st.none()
        | st.integers()
        | st.lists(st.integers(0, 255) | st.integers() | st.booleans() | st.text(max_size=1), max_size=3)
        | st.lists(st.integers(0, 255), max_size=3).map(numpy.array)
        | st.lists(st.integers(0, 255).map(numpy.int64), max_size=3)
    )
)
def test_odd_prompts_are_errors_of_their_own(prompts: list[Any]) -> None:
    found = ask(lambda session: session.logprobs([*prompts, "fine"], [5]))
    assert found[-1].error is None
    for prompt, answer in zip(prompts, found[:-1], strict=True):
        tokens = list(prompt.encode("utf-8", "replace")) if isinstance(prompt, str) else prompt
        if isinstance(tokens, numpy.ndarray):
            tokens = tokens.tolist()
        good = isinstance(tokens, list) and len(tokens) > 0
        for token in tokens if isinstance(tokens, list) else ():
            whole = isinstance(token, int | numpy.int64) and not isinstance(token, bool)
            good = good and whole and 0 <= token < 2**31
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            good = False
        refused = isinstance(tokens, list) and ord("!") in tokens
        assert (answer.error is None) == bool(good and not refused), (prompt, answer)


class Narrow(ToyServer):
    """Has 100 tokens, and says so as a server does."""

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        if any(token >= 100 for probe in probes for token in probe.next_ids):
            raise RejectedError("token_ids_logprob[0]: token id is outside the vocabulary [0, 100)")
        return await super().answer(probes, rank)


def test_an_item_that_is_no_prompt_is_its_rows_error() -> None:
    for query, fine in (("q", "x"), ([5], [6])):
        found = ask(lambda session, q=query, f=fine: session.score(q, [f, None, 5, float("nan"), f], [5]))  # type: ignore[misc]
        assert ["needed, not" in (score.error or "") for score in found] == [False, True, True, True, False]


@pytest.mark.parametrize("prompts", [["a"], ["a", ""], ["", "a", "x" * 5000, HALF], ["no!", "a"]])
def test_a_token_that_there_is_not_is_the_calls_error_whatever_else_is_wrong(prompts: list[str]) -> None:
    async def work(ask: Callable[[Session], Coroutine[Any, Any, Any]]) -> Any:
        async with session_with(Narrow(), ByteTokens(), toy_facts()) as session:
            return await ask(session)

    with pytest.raises(OptionError, match=r"^token_ids: .*outside the vocabulary"):
        asyncio.run(work(lambda session: session.logprobs(prompts, [5, 100])))
    with pytest.raises(OptionError, match=r"^label_token_ids: .*outside the vocabulary"):
        asyncio.run(work(lambda session: session.score("q", prompts, [5, 100])))


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("query: a string", lambda session: session.rerank(5, ["x"])),
        ("documents: a list", lambda session: session.rerank("q", "x")),
        ("template: a string", lambda session: session.rerank("q", ["x"], template=5)),
        ("answers: a list", lambda session: session.rerank("q", ["x"], answers="yes")),
        (r"answers\[1\]: a string", lambda session: session.rerank("q", ["x"], answers=("a", 5))),
        ("answers: two different", lambda session: session.rerank("q", ["x"], answers=("a", "a"))),
        ("answers: ' ' has no letters", lambda session: session.rerank("q", ["x"], answers=("a", " "))),
        ("top_n: a whole number", lambda session: session.rerank("q", ["x"], top_n="2")),
        ("top_n: a whole number from 0", lambda session: session.rerank("q", ["x"], top_n=-1)),
        ("chat: True or False", lambda session: session.rerank("q", ["x"], chat="no")),
        ("tpo_n: no such option", lambda session: session.rerank("q", ["x"], tpo_n=2)),
        ("apply_softmax: True or False", lambda session: session.score("q", ["x"], [5], apply_softmax="no")),
        ("item_first: True or False", lambda session: session.score("q", ["x"], [5], item_first=1)),
        ("query: a string or a list", lambda session: session.score(5, ["x"], [5])),
        ("items: a list", lambda session: session.score("q", "x", [5])),
        ("label_token_ids: a list", lambda session: session.score("q", ["x"], 5)),
        ("prompts: a list", lambda session: session.logprobs("x", [5])),
        (r"texts\[0\]: a string", lambda session: session.tokenize([5])),
        ("texts: a list", lambda session: session.tokenize("x")),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(name: str, work: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name}"):
        ask(work)


@given(st.integers(0, 50), st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_streams_keep_their_order_and_read_no_further_than_they_must(
    items: int, size: int, ahead: int, asynchronous: bool
) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for item in range(items):
            taken += 1
            yield item

    async def asource() -> AsyncIterator[int]:
        for item in source():
            yield item

    async def work(window: list[int]) -> list[int]:
        # Later windows are done first.
        for _ in range(50 - window[0]):
            await asyncio.sleep(0)
        return [item * 10 for item in window]

    async def run() -> None:
        number = 0
        given: Any = asource() if asynchronous else source()
        async for result in in_order(given, work, size=size, ahead=ahead, linger=0.001):
            assert result == number * 10
            # Windows under way, one being filled, as much again read ahead, and the item that waits for room.
            assert taken <= number + (ahead + 2) * size + 1
            number += 1
        assert number == items

    asyncio.run(run())
