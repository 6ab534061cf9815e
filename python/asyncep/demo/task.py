"""The demo's task: file a news article under one of five topics, by the next-token log-probability of each.

Every prompt is the same guide to the five sections, then an article: its text cut to a budget of tokens, its
headline last, where a small model reads it best, and a sentence that the name of a section completes. The
label with the highest calibrated log-probability is the answer. There are no worked examples: on the develop
part this wording does better without them (0.85 to 0.89) than with five to twenty (0.60 to 0.86), which
draw the model's attention from the article to the examples' answers.

**Calibration.** A small model prefers some labels whatever it reads. For each label the mean log-probability
over fifty articles of the ``fit`` part (ten of each topic, their topics not shown) is subtracted: five
numbers per model, measured alike for the dense reference and for the served model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncep.demo.news import TOPICS, Article, sample_articles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

GUIDE = """\
BBC News sections: Business, Entertainment, Politics, Sport, Technology.

Business: companies and their profits, jobs, trade, markets, banks, currencies, oil and the economy.
Entertainment: films, television, music, theatre, books, awards, festivals, actors and singers.
Politics: the government, ministers, parties, elections, parliament, laws, taxes and public services.
Sport: football, rugby, cricket, tennis, athletics, players, coaches, matches, clubs and injuries.
Technology: computers, software, the internet, mobile phones, games, gadgets, security and science.

"""
QUESTION = "This article was first published in the section"
ARTICLE_TOKENS = 100
CALIBRATION_PER_TOPIC = 10
_FIT_PER_TOPIC = 40

# The completions scored at the end of the prompt: one token each, checked by label_token_ids.
LABELS = {
    "business": " Business",
    "entertainment": " Entertainment",
    "politics": " Politics",
    "sport": " Sports",
    "tech": " Technology",
}
# Scored at the end of the prompt: one token each, checked by label_token_ids.
LABELS = {
    "business": " business",
    "entertainment": " entertainment",
    "politics": " politics",
    "sport": " sport",
    "tech": " technology",
}


@dataclass(frozen=True, slots=True)
class TaskPrompts:
    """Renders prompts and labels for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    shared_prefix: str

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase) -> TaskPrompts:
        return cls(tokenizer, GUIDE)

    def text(self, article: Article) -> str:
        """The whole prompt for one article, ending just before the label."""
        body = self.tokenizer(article.body.replace("\n", " ")).input_ids[:ARTICLE_TOKENS]
        # A cut inside a multi-byte character leaves a replacement character behind.
        excerpt = self.tokenizer.decode(body).rstrip("\ufffd").strip()
        return f"{self.shared_prefix}{excerpt}\nHeadline: {article.headline}\n\n{QUESTION}"

    def token_ids(self, articles: Sequence[Article]) -> list[list[int]]:
        """The prompts as a server tokenizes them."""
        ids: list[list[int]] = self.tokenizer([self.text(a) for a in articles]).input_ids
        return ids

    def label_token_ids(self) -> list[int]:
        """The one token of each label, in the order of ``TOPICS``."""
        ids = [self.tokenizer(LABELS[topic]).input_ids for topic in TOPICS]
        if any(len(label) != 1 for label in ids) or len({label[0] for label in ids}) != len(TOPICS):
            raise ValueError(f"the labels must be distinct single tokens, not {dict(zip(TOPICS, ids, strict=True))}")
        return [label[0] for label in ids]


def calibration_articles() -> list[Article]:
    """The fifty articles whose mean scores are the label offsets; disjoint from all other uses."""
    return [a for group in _fit_groups().values() for a in group[:CALIBRATION_PER_TOPIC]]


def routing_articles(per_topic: int) -> list[Article]:
    """Articles on which routers and experts are fitted; disjoint from calibration."""
    if per_topic > _FIT_PER_TOPIC - CALIBRATION_PER_TOPIC:
        raise ValueError(f"per_topic={per_topic}: at most {_FIT_PER_TOPIC - CALIBRATION_PER_TOPIC}")
    groups = _fit_groups().values()
    return [a for group in groups for a in group[CALIBRATION_PER_TOPIC : CALIBRATION_PER_TOPIC + per_topic]]


def label_offsets(scores: Sequence[Sequence[float]]) -> list[float]:
    """Mean log-probability per label, from the scores of ``calibration_articles()``: [articles][labels]."""
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


def predict(scores: Sequence[Sequence[float]], offsets: Sequence[float]) -> list[str]:
    """The topic of each row of label log-probabilities: the largest after subtracting the offsets."""
    predictions = []
    for row in scores:
        calibrated = [score - offset for score, offset in zip(row, offsets, strict=True)]
        predictions.append(TOPICS[max(range(len(TOPICS)), key=calibrated.__getitem__)])
    return predictions


def accuracy(predictions: Sequence[str], articles: Sequence[Article]) -> float:
    """The share of articles whose predicted topic is the gold one."""
    hits = [p == article.topic for p, article in zip(predictions, articles, strict=True)]
    return sum(hits) / len(hits)


def _fit_groups() -> dict[str, list[Article]]:
    groups: dict[str, list[Article]] = {topic: [] for topic in TOPICS}
    for article in sample_articles("fit", _FIT_PER_TOPIC, seed=0):
        groups[article.topic].append(article)
    return groups
