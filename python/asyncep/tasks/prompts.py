"""Texts in their prompts as token ids; a text that is too long is cut where that is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from asyncep.client.tokens import TextTokens, Untokenized
from asyncep.tasks.task import Task, Truncate

_GAP = " … "
# A cut is guessed from the tokens that are too many; texts are not equally dense throughout.
_CAREFUL = 0.98
_GUESSES = 24


async def prompts_of(
    texts: Sequence[str], task: Task, tokens: TextTokens, most_tokens: int | None
) -> tuple[list[list[int]], list[int]]:
    """The prompts of each text, one after another, and how many characters of each text were left out.

    Only the text itself is cut: never the instruction, nor what the answer is read from.

    Args:
        most_tokens: how many a prompt may have with its label; None if that is not known.
    """
    width = len(task.templates)
    prompts = await _encoded(texts, task, tokens)
    cut = [0] * len(texts)
    how = task.options.truncate
    if how is None or most_tokens is None:
        return prompts, cut
    room = most_tokens - task.label_set.longest_tail
    bare = max(map(len, await _encoded([""], task, tokens)))
    kept = {number: len(text) for number, text in enumerate(texts)}

    def longest(number: int) -> int:
        mine = prompts[number * width : (number + 1) * width]
        # What the server refuses to divide is too long for it, and nothing more is known.
        return max(2 * room if isinstance(ids, Untokenized) else len(ids) for ids in mine)

    # A prompt that does not fit without any text stays as it is, and is refused with its length.
    long = [number for number in range(len(texts)) if longest(number) > room] if room > bare else []
    for guess in range(_GUESSES):
        if not long:
            break
        for number in long:
            share = (room - bare) / (longest(number) - bare) if guess < _GUESSES // 2 else 0.5
            kept[number] = int(kept[number] * min(share * _CAREFUL, 0.999))
        shorter = await _encoded([shortened(texts[number], kept[number], how) for number in long], task, tokens)
        for place, number in enumerate(long):
            prompts[number * width : (number + 1) * width] = shorter[place * width : (place + 1) * width]
            cut[number] = len(texts[number]) - kept[number]
        long = [number for number in long if longest(number) > room]
    return prompts, cut


def shortened(text: str, kept: int, how: Truncate) -> str:
    """So many characters of a text: all but its head, its tail or its middle."""
    if how == "head":
        return text[len(text) - kept :]
    if how == "tail":
        return text[:kept]
    first = (kept + 1) // 2
    return f"{text[:first]}{_GAP}{text[len(text) - (kept - first) :]}"


async def _encoded(texts: Sequence[str], task: Task, tokens: TextTokens) -> list[list[int]]:
    return await tokens.encode(
        [template.render(text) for text in texts for template in task.templates], special=task.special
    )
