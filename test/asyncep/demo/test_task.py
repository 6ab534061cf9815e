"""The prompts: one shared prefix, an article within its budget, labels of one token."""

from __future__ import annotations

import pytest

from asyncep.demo.news import TOPICS, sample_articles
from asyncep.demo.reference import common_prefix_length
from asyncep.demo.task import ARTICLE_TOKENS, TaskPrompts, label_offsets, predict
from asyncep.demo.weights import load_tokenizer


@pytest.fixture(scope="module")
def prompts() -> TaskPrompts:
    return TaskPrompts.create(load_tokenizer())


def test_prompts_share_a_prefix_and_keep_the_budget(prompts: TaskPrompts) -> None:
    token_ids = prompts.token_ids(sample_articles("evaluate", 10))
    shared = common_prefix_length(token_ids)
    assert 100 < shared <= 600
    # The headline and the question come on top.
    assert max(map(len, token_ids)) <= shared + ARTICLE_TOKENS + 40


def test_labels_are_distinct_single_tokens(prompts: TaskPrompts) -> None:
    assert len(set(prompts.label_token_ids())) == len(TOPICS)


def test_common_prefix_leaves_each_prompt_a_token() -> None:
    assert common_prefix_length([[1, 2, 3], [1, 2]]) == 1
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2, 9]]) == 2
    assert common_prefix_length([[5], [6]]) == 0


def test_offsets_undo_a_preference() -> None:
    scores = [[-1.0, -5.0, -9.0, -9.0, -9.0], [-1.0, -3.0, -9.0, -9.0, -9.0]]
    offsets = label_offsets(scores)
    assert offsets == [-1.0, -4.0, -9.0, -9.0, -9.0]
    assert predict(scores, offsets)[1] == TOPICS[1]
