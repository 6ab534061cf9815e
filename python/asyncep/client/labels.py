"""Log-likelihoods of labels after prompts, with as few passes as their tokens allow.

A label is read as a continuation of the prompt: its tokens t1 … tn are those of a space and the label, and its score
is log p(t1 | prompt) + … + log p(tn | prompt, t1 … tn-1), the full log-likelihood. It is not divided by the number of
tokens unless asked for: with the division, a long label whose later tokens follow from its first would win by length.

One pass over the prompt scores the first token of every label. Labels of one token are done then. The others need one
short pass for each beginning they have but for their last token (labels that differ only in that share it); the prompt
itself is in the prefix cache by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asyncep.client.errors import OptionError
from asyncep.client.pieces import in_pieces
from asyncep.client.probes import Answerer, Probe, Reading

Length = Literal["sum", "mean"]
# Passes of one request at most, and their tokens: many labels after a batch of long prompts are many times the batch.
_PASSES, _PASS_TOKENS = 1024, 1 << 18


@dataclass(frozen=True, slots=True)
class LabelScores:
    """One prompt's answer.

    Attributes:
        scores: log-likelihood of each label in nats, divided by its tokens where that was asked for.
        passes: (tokens, of them from the prefix cache) of each pass this prompt took.
    """

    scores: tuple[float, ...]
    passes: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return sum(tokens for tokens, _ in self.passes)

    @property
    def cached(self) -> int:
        """How many of them came from the prefix cache."""
        return sum(cached for _, cached in self.passes)


@dataclass(frozen=True, slots=True)
class _Stem:
    """Labels equal but for their last token: they are read from one pass."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    last: tuple[int, ...]


class LabelSet:
    """Labels as token ids, and the passes they take.

    Args:
        ids: the tokens of each label.
        length: ``sum`` for the full log-likelihood, ``mean`` for it divided by the label's tokens.

    Raises:
        OptionError: a label without tokens, or two with the same.
    """

    def __init__(self, ids: Sequence[Sequence[int]], *, length: Length = "sum") -> None:
        self.ids = tuple(tuple(label) for label in ids)
        if not self.ids or not all(self.ids) or len(set(self.ids)) != len(self.ids):
            raise OptionError(f"labels: each needs tokens of its own; {self._twins()}")
        if length not in ("sum", "mean"):
            raise OptionError(f"length={length!r}: use 'sum' or 'mean'")
        self.length: Length = length
        self.first = tuple(dict.fromkeys(label[0] for label in self.ids))
        stems: dict[tuple[int, ...], list[int]] = {}
        for number, label in enumerate(self.ids):
            if len(label) > 1:
                stems.setdefault(label[:-1], []).append(number)
        self._stems = tuple(
            _Stem(stem, tuple(numbers), tuple(self.ids[number][-1] for number in numbers))
            for stem, numbers in stems.items()
        )

    def _twins(self) -> str:
        """What is wrong with the tokens."""
        first: dict[tuple[int, ...], int] = {}
        for number, label in enumerate(self.ids):
            if not label:
                return f"number {number} has no tokens"
            if label in first:
                return f"numbers {first[label]} and {number} have the same tokens, {list(label)}"
            first[label] = number
        return "at least one is needed"

    @property
    def passes(self) -> int:
        """Passes a prompt takes: one over the prompt, and one for each beginning of labels."""
        return 1 + len(self._stems)

    @property
    def tails(self) -> list[int]:
        """Tokens that each of the further passes has beyond the prompt."""
        return [len(stem.ids) for stem in self._stems]

    @property
    def single_token(self) -> bool:
        """Whether one pass a prompt is all."""
        return not self._stems

    @property
    def longest_tail(self) -> int:
        """Tokens that the longest pass has beyond the prompt."""
        return max(self.tails, default=0)

    async def score(
        self, prompts: Sequence[Sequence[int]], answerer: Answerer, rank: int | None = None
    ) -> list[LabelScores]:
        """The labels' scores after each prompt (token ids).

        Raises:
            RejectedError: the server refuses one of them; nothing is known of the others then.
            ServerError: the server failed.
        """
        readings = await answerer.answer([Probe(prompt, self.first) for prompt in prompts], rank)
        if self.single_token:
            at = [self.first.index(label[0]) for label in self.ids]
            return [
                LabelScores(tuple([reading.next[i] for i in at]), ((len(prompt), reading.cached),))
                for prompt, reading in zip(prompts, readings, strict=True)
            ]
        tails = [
            # The stem's first token is known from the pass over the prompt; those after it are read here.
            Probe([*prompt, *stem.ids], stem.last, len(prompt) + 1 if len(stem.ids) > 1 else None)
            for prompt in prompts
            for stem in self._stems
        ]
        more: list[Reading] = []
        for some in in_pieces(tails, lambda probe: len(probe.ids), most=_PASSES, most_size=_PASS_TOKENS):
            more += await answerer.answer(some, rank)
        width = len(self._stems)
        found = []
        for number, (prompt, reading) in enumerate(zip(prompts, readings, strict=True)):
            first = dict(zip(self.first, reading.next, strict=True))
            totals = [first[label[0]] for label in self.ids]
            mine = more[number * width : (number + 1) * width]
            for stem, tail in zip(self._stems, mine, strict=True):
                middle = sum(tail.own)
                for label, last in zip(stem.labels, tail.next, strict=True):
                    totals[label] += middle + last
            if self.length == "mean":
                totals = [total / len(label) for total, label in zip(totals, self.ids, strict=True)]
            passes = [(len(prompt), reading.cached)]
            passes += [(len(prompt) + len(s.ids), t.cached) for s, t in zip(self._stems, mine, strict=True)]
            found.append(LabelScores(tuple(totals), tuple(passes)))
        return found
