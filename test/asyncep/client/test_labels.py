"""Label scores from few passes, held against one token after another."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import ToyServer, log_likelihood

from asyncep.client.errors import OptionError
from asyncep.client.labels import LabelSet

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    st.lists(tokens, min_size=1, max_size=4),
    st.lists(tokens, min_size=1, max_size=6, unique_by=tuple),
    st.sampled_from(["sum", "mean"]),
)
def test_full_log_likelihood_of_any_labels(prompts: list[list[int]], labels: list[list[int]], length: str) -> None:
    server = ToyServer()
    label_set = LabelSet(labels, length=length)  # type: ignore[arg-type]
    scored = asyncio.run(label_set.score(prompts, server))
    for prompt, found in zip(prompts, scored, strict=True):
        for label, score in zip(labels, found.scores, strict=True):
            expected = log_likelihood(prompt, label)
            assert score == pytest.approx(expected / len(label) if length == "mean" else expected)
    stems = {tuple(label[:-1]) for label in labels if len(label) > 1}
    assert len(server.prompts) == len(prompts) * (1 + len(stems))
    assert label_set.single_token == (not stems)
    assert [found.tokens for found in scored] == [len(p) * (1 + len(stems)) + sum(map(len, stems)) for p in prompts]


@pytest.mark.parametrize("labels", [[[]], [], [[1], [1]], [[1, 2], [3], [1, 2]]])
def test_labels_that_cannot_be_told_apart(labels: list[list[int]]) -> None:
    with pytest.raises(OptionError, match="labels: each needs tokens of its own"):
        LabelSet(labels)


def test_unknown_length_handling() -> None:
    with pytest.raises(OptionError, match="length='median': use 'sum' or 'mean'"):
        LabelSet([[1]], length="median")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [5, 50, 1000])
def test_labels_cost_a_pass_for_each_beginning(count: int) -> None:
    """However many labels begin alike, and whatever their last token is."""
    stems = [[stem] for stem in range(5)]
    labels = LabelSet([[*stems[number % 5], 100 + number] for number in range(count)])
    assert labels.passes == 1 + 5
    assert LabelSet([[number] for number in range(count)]).passes == 1
