"""The articles: complete, readable, and never on both sides of a split."""

from __future__ import annotations

from collections import Counter

import pytest

from asyncep.demo.news import TOPICS, all_articles, sample_articles
from asyncep.demo.task import calibration_articles, routing_articles


def test_every_article_is_read() -> None:
    articles = all_articles()
    assert len(articles) == 2225
    assert len({a.name for a in articles}) == 2225
    assert all(a.headline and a.body for a in articles)
    assert not any("\ufffd" in a.text for a in articles)


def test_samples_are_balanced_and_repeatable() -> None:
    sample = sample_articles("evaluate", 30)
    assert Counter(a.topic for a in sample) == dict.fromkeys(TOPICS, 30)
    assert sample == sample_articles("evaluate", 30)
    assert sample != sample_articles("evaluate", 30, seed=1)


def test_too_large_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="per_topic=1000"):
        sample_articles("evaluate", 1000)


def test_no_text_is_used_twice() -> None:
    calibration = {a.text for a in calibration_articles()}
    routing = {a.text for a in routing_articles(30)}
    evaluation = {a.text for a in sample_articles("evaluate", 100)}
    uses = (calibration, routing, evaluation)
    assert len(set().union(*uses)) == sum(len(use) for use in uses)
    assert not {a.text for a in all_articles() if a.part == "evaluate"} & (calibration | routing)
