"""The runtime without a thread or a process of its own: coroutines on one server, for one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import operator
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from typing_extensions import Unpack

from asyncep.client.errors import OptionError
from asyncep.client.generate import Behind, GenerateClient, ServerApi
from asyncep.client.labels import LabelScores, LabelSet
from asyncep.client.lanes import OnBatch
from asyncep.client.probes import Answerer
from asyncep.client.scorer import Scorer
from asyncep.client.server_facts import ServerFacts, ask_server
from asyncep.client.tokens import TextTokens, Untokenized, chat_surroundings, tokens_for
from asyncep.tasks.arguments import HALF, as_declared, checked_text, checked_types, is_broken, refuse_unknown
from asyncep.tasks.frames import is_array, listed
from asyncep.tasks.prompts import prompts_of
from asyncep.tasks.results import Classification, Ranked, Score, TokenLogProbs
from asyncep.tasks.scoring import offsets_of
from asyncep.tasks.task import Task, TaskOptions, TextScores
from asyncep.tasks.template import Template

RERANK_TEMPLATE = "Query: {query}\n\nDocument: {document}\n\nIs the document relevant to the query, yes or no?\nAnswer:"
# Classifications made ready are kept for the next call with the same options.
_TASKS_KEPT = 32
# So much of the prompt's end is enough to see how a label is divided into tokens after it.
_END_CHARACTERS = 64
# What servers call the tokens that are asked about, when they refuse them.
_OF_TOKENS = "token_ids_logprob"
# Servers keep them in 32 bits.
_LARGEST_ID = 2**31 - 1


class RerankOptions(TypedDict, total=False):
    """Keyword arguments of `Runtime.rerank`.

    ``template``: with ``{query}`` and, once, ``{document}``. ``answers``: the words for relevant and not (default
    ``("yes", "no")``). ``top_n``: how many to return (default all). ``chat``: the model's chat format.
    """

    template: str
    answers: tuple[str, str]
    top_n: int | None
    chat: bool


@dataclass(frozen=True)
class Session:
    """One server, its tokenizer and the lanes to its ranks. `open_session` makes one."""

    scorer: Scorer
    tokens: TextTokens
    client: ServerApi | None
    _prepared: OrderedDict[str, asyncio.Task[Task]] = field(default_factory=OrderedDict, repr=False)

    @property
    def facts(self) -> ServerFacts:
        """What is known of the server."""
        return self.scorer.facts

    async def prepare(self, options: TaskOptions) -> Task:
        """Tokenizes labels, renders the chat format, measures the calibration. Done once for equal options.

        Raises:
            OptionError: options that cannot be used, naming the argument.
            ServerError: the server failed.
        """
        key = repr(options)
        found = self._prepared.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = self._prepared[key] = asyncio.create_task(self._prepare(options))
            if len(self._prepared) > _TASKS_KEPT:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        # One caller that is cancelled does not take the others' away.
        return found.result() if found.done() else await asyncio.shield(found)

    async def _prepare(self, options: TaskOptions) -> Task:
        options.check()
        templates = options.templates()
        if options.chat:
            if self.client is None:
                raise OptionError("chat: needs a server, which has the model's chat template")
            for number, plain in enumerate(templates):
                around = await chat_surroundings(self.client, plain.before, plain.after, options.system)
                templates = (*templates[:number], plain.in_chat(*around), *templates[number + 1 :])
        labels = await self._label_set(options, templates[0])
        task = Task(options, templates, labels, special=not options.chat)
        if not options.calibrate:
            return task
        found = await self.score_texts(list(options.calibrate), task)
        scored = [scores for scores in found if isinstance(scores, TextScores)]
        if len(scored) < len(found):
            raise OptionError("calibrate: a neutral text cannot be scored; is it empty or too long?")
        return replace(task, offsets=offsets_of([task.values(scores.scores) for scores in scored]))

    async def _label_set(self, options: TaskOptions, template: Template) -> LabelSet:
        """The tokens of everything the model may write, as they are where they follow the prompt."""
        words = [word for written in options.written() for word in written]
        # Some tokenizers begin a text as they begin a word: what follows the prompt's end is read off behind it.
        end = template.after[-_END_CHARACTERS:] or "."
        [before, *ids] = await self.tokens.encode(
            [end, *(f"{end}{template.joiner}{word}" for word in words)], special=False
        )
        alone = await self.tokens.encode([f"{template.joiner}{word}" for word in words], special=False)
        found = [
            joined[len(before) :] if joined[: len(before)] == before else single
            for joined, single in zip(ids, alone, strict=True)
        ]
        first: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(words, found, strict=True):
            key = tuple(tokens)
            if not key:
                raise OptionError(f"labels: {word!r} has no tokens")
            if key in first:
                raise OptionError(
                    f"labels: {first[key]!r} and {word!r} have the same tokens, {list(key)}; the model cannot "
                    "tell them apart"
                )
            first[key] = word
        return LabelSet(found, length=options.length)

    async def score_texts(
        self,
        texts: Sequence[str],
        task: Task,
        on_texts: OnBatch[TextScores] | None = None,
        *,
        behind: bool = False,
    ) -> list[TextScores | str]:
        """Scores of each text, or why there are none.

        Args:
            on_texts: told of texts as they are done: their numbers and what became of them.
            behind: nobody waits for it, however few they are.

        Raises:
            ServerError: the server failed.
        """
        results: list[TextScores | str] = [_unusable(text) for text in texts]
        good = [number for number, reason in enumerate(results) if not reason]
        if on_texts and len(good) < len(texts):
            bad = [number for number, reason in enumerate(results) if reason]
            on_texts(bad, [results[number] for number in bad])
        width = len(task.templates)
        with self.scorer.coming(len(good) * width, behind=behind):
            prompts, cut = await prompts_of(
                [texts[number] for number in good], task, self.tokens, self.facts.most_tokens
            )
        answers: list[list[LabelScores | str]] = [[""] * width for _ in good]
        left = [width] * len(good)

        def take(numbers: Sequence[int], found: Sequence[LabelScores | str]) -> None:
            done = []
            for number, answer in zip(numbers, found, strict=True):
                text, place = divmod(number, width)
                answers[text][place] = answer
                left[text] -= 1
                if not left[text]:
                    results[good[text]] = task.join(answers[text], cut[text])
                    done.append(good[text])
            if on_texts and done:
                on_texts(done, [results[number] for number in done])

        await self.scorer.score(prompts, task.label_set, take, behind=behind)
        return results

    async def classify(self, texts: Sequence[str], task: Task) -> list[Classification]:
        """The label of each text; see `Runtime.classify`."""
        return [task.decide(scores) for scores in await self.score_texts(texts, task)]

    async def classify_as(self, texts: Sequence[str], options: TaskOptions) -> list[Classification]:
        """The same, not made ready beforehand."""
        return await self.classify(texts, await self.prepare(options))

    async def logprobs(self, prompts: Sequence[str | Sequence[int]], token_ids: Sequence[int]) -> list[TokenLogProbs]:
        """See `Runtime.logprobs`."""
        found = await self._score_tokens(list(map(_checked, listed("prompts", prompts))), token_ids, "token_ids")
        return [TokenLogProbs((), s) if isinstance(s, str) else TokenLogProbs(s.scores) for s in found]

    async def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = True,
        item_first: bool = False,
    ) -> list[Score]:
        """See `Runtime.score`."""
        checked_types(apply_softmax=(apply_softmax, bool), item_first=(item_first, bool))
        query = _checked(query)
        if isinstance(query, Untokenized):
            raise OptionError(f"query: {query.reason}")
        prompts = [_joined(query, _checked(item), item_first) for item in listed("items", items)]
        found = await self._score_tokens(prompts, label_token_ids, "label_token_ids")
        return [_score(scores, apply_softmax) for scores in found]

    async def rerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> list[Ranked]:
        """See `Runtime.rerank`."""
        refuse_unknown(options, RerankOptions)
        options = as_declared(options, RerankOptions)
        checked_text("query", query)
        template, chat = options.get("template", RERANK_TEMPLATE), options.get("chat", False)
        answers, top_n = options.get("answers", ("yes", "no")), options.get("top_n")
        checked_text("template", template)
        if template.count("{document}") != 1 or "{query}" not in template:
            raise OptionError("template: {document} is needed once and {query} at least once")
        if top_n is not None and top_n < 0:
            raise OptionError(f"top_n: a whole number from 0 on is needed, not {top_n}")
        if len(set(answers)) != 2:
            raise OptionError(f"answers: two different ones are needed, not {answers!r}")
        head, tail = template.split("{document}")
        # Text of a query is never taken for a place: only the template's own braces are.
        around = (head.replace("{query}", query), tail.replace("{query}", query))
        plain = Template.around(*around)
        if chat:
            if self.client is None:
                raise OptionError("chat: needs a server, which has the model's chat template")
            plain = plain.in_chat(*await chat_surroundings(self.client, plain.before, plain.after, None))
        asked = TaskOptions(answers, "{text}")
        try:
            asked.check()
            label_set = await self._label_set(asked, plain)
        except OptionError as error:
            raise OptionError(str(error).replace("labels:", "answers:", 1)) from None
        task = Task(asked, (plain,), label_set, special=not chat)
        documents = listed("documents", documents)
        found = await self.classify(documents, task)
        ranked = [
            Ranked(number, documents[number], None if c.error else c.probabilities[answers[0]], c.error)
            for number, c in enumerate(found)
        ]
        ranked.sort(key=lambda entry: (entry.score is None, -(entry.score or 0.0), entry.index))
        return ranked[:top_n]

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Runtime.tokenize`."""
        texts = listed("texts", texts)
        for number, text in enumerate(texts):
            checked_text(f"texts[{number}]", text)
        found = await self.tokens.encode(texts, special=False)
        for number, ids in enumerate(found):
            if isinstance(ids, Untokenized):
                raise OptionError(f"texts[{number}]: {ids.reason}")
        return found

    async def _score_tokens(
        self, prompts: Sequence[str | Sequence[int]], token_ids: Sequence[int], argument: str
    ) -> list[LabelScores | str]:
        """Log-probabilities of tokens after prompts; a token that there is not is no prompt's error."""
        tokens = _one_token_each(token_ids, argument)
        with self.scorer.coming(len(prompts)):
            ids = await self._ids(prompts)
        found = await self.scorer.score(ids, tokens)
        for reason in found:
            if isinstance(reason, str) and _OF_TOKENS in reason:
                raise OptionError(f"{argument}: {reason}")
        return found

    async def _ids(self, prompts: Sequence[str | Sequence[int]]) -> list[Sequence[int]]:
        """Tokens of prompts that are `_checked`."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await self.tokens.encode(texts))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


@contextlib.asynccontextmanager
async def open_session(
    url: str, *, api_key: str | None = None, certificate: str | None = None, in_flight: int = 2
) -> AsyncIterator[Session]:
    """A session with the server at `url`.

    Args:
        api_key, certificate: see `GenerateClient`.
        in_flight: batches on the way to each rank.

    Raises:
        OptionError: the URL is none.
        ServerError: no server there, or none of SGLang's kind.
    """
    async with GenerateClient(url, api_key=api_key, certificate=certificate) as client:
        facts = await ask_server(client)
        tokens = await tokens_for(client, facts.tokenizer)
        behind = Behind(client) if facts.priorities else None
        async with Scorer(client, facts, in_flight=in_flight, behind=behind) as scorer:
            yield Session(scorer, tokens, client)


@contextlib.asynccontextmanager
async def session_with(answerer: Answerer, tokens: TextTokens, facts: ServerFacts) -> AsyncIterator[Session]:
    """A session with something else than a server."""
    async with Scorer(answerer, facts) as scorer:
        yield Session(scorer, tokens, None)


def _unusable(text: object) -> str:
    """Why a text cannot be scored; empty if it can."""
    if not isinstance(text, str):
        return f"a string is needed, not {type(text).__name__}"
    if not text.strip():
        return "the text is empty"
    return f"the text has {HALF}" if is_broken(text) else ""


def _checked(prompt: Any) -> str | Sequence[int]:
    """A prompt as text or as token ids of Python's own; `Untokenized` for one that is neither."""
    given = prompt.tolist() if is_array(prompt) else prompt
    if isinstance(given, str):
        return Untokenized(f"the text has {HALF}") if is_broken(given) else given
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        return Untokenized(f"a string or a list of token ids is needed, not {type(given).__name__}")
    # The usual case, without a step in Python for each token.
    if set(map(type, given)) <= {int}:
        ids: Sequence[int] = given
    else:
        try:
            ids = [_index(token) for token in given]
        except TypeError:
            return Untokenized("a list of token ids is needed, and not all of it are whole numbers")
    if ids and not (min(ids) >= 0 and max(ids) <= _LARGEST_ID):
        odd = next(token for token in ids if not 0 <= token <= _LARGEST_ID)
        return Untokenized(f"{odd} is no token id")
    return ids


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value")
    return operator.index(value)


def _joined(query: str | Sequence[int], item: str | Sequence[int], item_first: bool) -> str | Sequence[int]:
    """Both of them `_checked`."""
    if isinstance(item, Untokenized):
        return item
    if isinstance(query, str) and isinstance(item, str):
        return item + query if item_first else query + item
    if isinstance(query, str) or isinstance(item, str):
        raise OptionError("query, items: give both as text or both as token ids")
    return [*item, *query] if item_first else [*query, *item]


def _one_token_each(token_ids: Sequence[int], argument: str) -> LabelSet:
    ids = []
    for token in listed(argument, token_ids):
        try:
            ids.append(_index(token))
        except TypeError:
            ids.append(-1)
        if not 0 <= ids[-1] <= _LARGEST_ID:
            raise OptionError(f"{argument}: {token!r} is no token id; whole numbers from 0 on are needed")
    try:
        return LabelSet([[token] for token in ids])
    except OptionError:
        raise OptionError(f"{argument}: at least one is needed, and each once, not {ids}") from None


def _score(scores: LabelScores | str, apply_softmax: bool) -> Score:
    if isinstance(scores, str):
        return Score((), (), scores)
    logs = scores.scores
    highest = max(logs)
    weights = [math.exp(log - highest) for log in logs] if apply_softmax else [math.exp(log) for log in logs]
    total = sum(weights) if apply_softmax else 1.0
    return Score(tuple(weight / total for weight in weights), logs)
