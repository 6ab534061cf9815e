"""What a job will cost, before it begins: passes a row takes, and their FLOPs. Read off its first rows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice

from asyncep.client.plan import Cost
from asyncep.client.scorer import common_beginning
from asyncep.files.rows import RowSource
from asyncep.tasks.prompts import prompts_of
from asyncep.tasks.session import Session
from asyncep.tasks.task import Task

_ROWS = 64
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Estimate:
    """A job's cost.

    Attributes:
        rows: all of them.
        tokens: of a prompt, on average of the first rows; 0 if none could be read.
        prompts: prompts of a row: one, or one a label.
        passes: passes of a prompt: one, and one for each beginning of labels of several tokens.
        cost: of a row, net of the shared beginning, in FLOPs (tokens where the model's shape is not known).
        first_cost: what of it the first pass takes.
        in_flops: whether the costs are FLOPs.
    """

    rows: int
    tokens: float
    prompts: int
    passes: int
    cost: float
    first_cost: float
    in_flops: bool

    def in_words(self, peak: float | None = None) -> str:
        """One line for a person.

        Args:
            peak: FLOPs a second at best of what it runs on.
        """
        words = [f"{self.rows:,} rows, prompts of about {self.tokens:,.0f} tokens"]
        if self.prompts > 1:
            words.append(f"{self.prompts:,} prompts a row (one a label)")
        if self.passes > 1:
            times = self.cost / self.first_cost if self.first_cost else 1.0
            words.append(
                f"{self.passes:,} passes a prompt (labels of several tokens), {times:.3g} times the cost of one"
            )
        if self.in_flops and self.tokens:
            total = self.cost * self.rows
            least = f", {_duration(total / peak)} at the peak of this machine" if peak else ""
            words.append(f"about {flops_in_words(total)}{least}")
        return "; ".join(words)


async def estimated(source: RowSource, rows: int, session: Session, task: Task) -> Estimate:
    """The cost of a job.

    Args:
        rows: how many the source has.
    """
    texts = await asyncio.to_thread(_first_texts, source)
    prompts, _ = await prompts_of(texts, task, session.tokens, session.facts.most_tokens)
    facts, width = session.facts, len(task.templates)
    shared = len(common_beginning(prompts)) // facts.page * facts.page
    first = tails = 0
    for start in range(0, len(prompts), width):
        mine = [prompt for prompt in prompts[start : start + width] if prompt]
        # Of a text's prompts the first computes what it shares with the others.
        own = len(common_beginning(mine)) // facts.page * facts.page if len(mine) > 1 else 0
        for number, prompt in enumerate(mine):
            cached = min(max(shared, own if number else 0), len(prompt) - 1)
            first += facts.cost.flops(len(prompt) - cached, cached)
            tails += _tail_cost(facts.cost, len(prompt), task)
    count = max(1, len(texts))
    return Estimate(
        rows,
        sum(map(len, prompts)) / max(1, len(prompts)),
        width,
        task.label_set.passes,
        (first + tails) / count,
        first / count,
        facts.counts_flops,
    )


def _first_texts(source: RowSource) -> list[str]:
    return [row.text for row in islice(source.rows(), _ROWS) if row.text is not None]


def flops_in_words(count: float) -> str:
    """With a prefix: 1.23 TFLOP."""
    power = 0
    while power + 1 < len(_PREFIXES) and count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_PREFIXES[power]}FLOP"


def _tail_cost(cost: Cost, prompt: int, task: Task) -> int:
    return sum(cost.flops(length, prompt) for length in task.label_set.tails)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
