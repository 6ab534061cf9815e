"""``asyncep.Runtime``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, overload

from typing_extensions import Unpack

from asyncep.client.errors import OptionError
from asyncep.files.kinds import FileFormat, ReadOptions
from asyncep.files.rows import RowSource
from asyncep.files.wording import PYTHON
from asyncep.jobs.estimate import Estimate
from asyncep.jobs.run import OnProgress, run_job
from asyncep.jobs.spec import JobResult, JobSpec
from asyncep.runtime.life import Life
from asyncep.runtime.windows import in_order
from asyncep.tasks.arguments import FileOptions, LabelsGiven, as_declared, path_of, task_options
from asyncep.tasks.frames import is_array, is_frame, listed, tabular
from asyncep.tasks.label_mass import StreamMass, mean_mass, warn_of_mass
from asyncep.tasks.results import Classification, Ranked, Score, TokenLogProbs
from asyncep.tasks.session import RerankOptions, Session
from asyncep.tasks.task import PromptOptions, TaskOptions


class Runtime(Life):
    """A prefill-only model to ask from Python.

    The ranks run in an ``asyncep serve`` of the runtime's own, on a port of this host that only it knows, not in this
    process: what the server does to be fast and to survive (experts shared by all ranks, ranks started again when they
    die, nothing left behind) is the launcher's work, and its signal handlers, forked processes and imports of 10 s are
    nothing to have in a notebook. The server ends with the runtime, and with this process however that ends.

    It starts with ``with`` (or `start`), and ends with it (or `close`). Every method has an async twin whose name
    begins with ``a``; both may be used together, from any thread and any loop.

    Args:
        model: checkpoint folder or hub name.
        dp_size: ranks.
        start_seconds: how long the ranks may take to come up.
        show_start: print to standard error that the ranks are starting, every ten seconds what they print, and when
            they are ready.
        **options: any other flag of ``asyncep serve``, with underscores: ``dtype="float32"``,
            ``asyncep_kernels="sglang"``; True for a flag without value, a list for one with several, None to leave it
            out.

    Example:
        >>> with Runtime(MODEL, dp_size=2, log_level="error") as runtime:      # doctest: +SKIP
        ...     [answer] = runtime.classify(["A goal in the last minute."], ["sport", "politics"])
        ...     print(answer.label, f"{answer.probability:.2f}")
        sport 0.98
    """

    # Classification

    @overload
    def classify(
        self, texts: Sequence[str], labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> list[Classification]: ...

    @overload
    def classify(
        self, texts: Iterator[str], labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> Iterator[Classification]: ...

    @overload
    def classify(
        self, texts: object, labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> Any: ...

    def classify(
        self, texts: object, labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> Any:
        """The most probable label of each text.

        Args:
            texts: a list or array of strings; an iterator or generator of them, read as needed and never held whole; or
                a table: a frame or column of pandas, polars (lazy ones too), Arrow or Hugging Face's datasets, or
                columns in a mapping.
            labels: at least two strings; or with what is known of them, as `read_labels` says: a mapping from label to
                description, or a list with objects. One of several tokens is scored by its full log-likelihood.
            text: the table's column with the texts.
            **options: of `PromptOptions`: ``template``, ``examples``, ``calibrate`` (neutral texts, one or a list),
                ``chat``, ``system``, ``length``, ``descriptions``, ``words``, ``multi_label``, ``threshold``,
                ``other_below``, ``other``, ``truncate``.

        Returns:
            For a list, a list of `Classification` in its order. For an iterator, an iterator of them: the first comes
            soon after the first text, however slow the source is; what the source raises comes after the answers to
            the texts before. For a table, the same with the columns ``label``, ``probability``, ``p_LABEL`` and
            ``error`` added (with `multi_label`, ``labels`` in place of the first two). A text that cannot be classified
            has an error in place of its label; the others are not affected.

        Warns:
            LabelMassWarning: the model gives the labels under 1 % of the probability.

        Raises:
            OptionError: an argument that cannot be used, named.
            ServerError: the server failed.

        Example:
            >>> results = runtime.classify(["A late goal.", ""], ["sport", "politics"], calibrate="N/A")
            >>> results[0].label in ("sport", "politics"), results[1].error
            (True, 'the text is empty')
            >>> stream = runtime.classify((f"text {i}" for i in range(3)), ["sport", "politics"])
            >>> sum(1 for result in stream if result.probability > 0)
            3
        """
        session, loop = self._need()
        wanted = task_options(labels, options)
        table = tabular(texts, text)
        if table is not None:
            table.check(wanted)
            return table.with_results(_judged(loop.run(session.classify_as(table.texts, wanted))), wanted)
        if isinstance(texts, Sequence | Set) or is_array(texts) or not isinstance(texts, Iterable):
            return _judged(loop.run(session.classify_as(_strings(texts), wanted)))
        return loop.iterate(_stream(session, texts, wanted))

    @overload
    async def aclassify(
        self, texts: Sequence[str], labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> list[Classification]: ...

    @overload
    async def aclassify(
        self, texts: object, labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> Any: ...

    async def aclassify(
        self, texts: object, labels: LabelsGiven, *, text: str = "text", **options: Unpack[PromptOptions]
    ) -> Any:
        """`classify` for a caller with an event loop: lists and frames. For iterators there is `astream`.

        Example:
            >>> async def main():
            ...     [result] = await runtime.aclassify(["A late goal."], ["sport", "politics"])
            ...     return sorted(result.probabilities)
            >>> asyncio.run(main())
            ['politics', 'sport']
        """
        session, loop = self._need()
        wanted = task_options(labels, options)
        table = tabular(texts, text)
        if table is not None:
            table.check(wanted)
            found = _judged(await loop.start(session.classify_as(table.texts, wanted)))
            return table.with_results(found, wanted)
        return _judged(await loop.start(session.classify_as(_strings(texts), wanted)))

    def astream(
        self, texts: Iterable[str] | AsyncIterable[str], labels: LabelsGiven, **options: Unpack[PromptOptions]
    ) -> AsyncIterator[Classification]:
        """`classify` of an iterator for a caller with an event loop: results come in the order of the texts.

        Args:
            texts: an async iterator is read in the runtime's own loop, not in the caller's.

        Example:
            >>> async def main():
            ...     return [r.error async for r in runtime.astream(iter(["a", "b"]), ["sport", "politics"])]
            >>> asyncio.run(main())
            [None, None]
        """
        session, loop = self._need()
        wrong = is_frame(texts) or isinstance(texts, str | bytes | Mapping | Set)
        if wrong or not isinstance(texts, Iterable | AsyncIterable):
            raise OptionError(f"texts: an iterator of strings is needed, not {type(texts).__name__}")
        return loop.aiterate(_stream(session, texts, task_options(labels, options)))

    def classify_file(
        self,
        source: str | Path,
        output: str | Path,
        labels: LabelsGiven,
        *,
        text: str = "text",
        gold: str | None = None,
        keep: Sequence[str] = (),
        limit: int | None = None,
        shard: tuple[int, int] = (0, 1),
        restart: bool = False,
        overwrite: bool = False,
        report: str | Path | None = None,
        input_format: str | None = None,
        output_format: str | None = None,
        encoding: str | None = None,
        delimiter: str | None = None,
        quote: str = '"',
        header: bool = True,
        on_begin: Callable[[Estimate], None] | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[PromptOptions],
    ) -> JobResult:
        """A job: labels the rows of a file; what ``asyncep classify`` does.

        It can be killed at any point. Called again with the same arguments it goes on, until `output` is there with
        each row once.

        Args:
            source, output: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` files, each also with
                ``.gz`` or ``.zst``.
            text, gold, keep: fields with the text, the true label (for accuracy), and what to carry over.
            limit: only the first so many rows.
            shard: (i, n), from (0, 1): only the i-th of n parts of them.
            restart: forget what an unfinished run has done.
            overwrite: write over an `output` and a `report` that are there already; never over `source`.
            report: where to write an HTML report; None for none.
            input_format, output_format: such as ``csv`` or ``jsonl.gz``, where the files' names do not say it.
            encoding: of a file of text; by default UTF-8, or what a byte-order mark says.
            delimiter, quote, header: of CSV and TSV. The delimiter is found by the columns; without a header the
                columns are called 1, 2, …
            on_begin: told what the job will cost, before it begins; from another thread.
            on_progress: told now and then, from another thread.
            **options: those of `classify`.

        Returns:
            Counts and figures; `asyncep.jobs.report` makes a report of it.

        Raises:
            InputError, OptionError: an argument or file that cannot be used, named.
            JobError: another process works on it, or it was begun with other arguments.
            ServerError: the server failed; what is done is kept.

        Example:
            >>> _ = Path("mails.csv").write_text("body\\nBuy now!\\nSee you at ten.\\n")
            >>> job = runtime.classify_file("mails.csv", "labelled.jsonl", ["spam", "ham"], text="body")
            >>> job.summary.rows, job.summary.errors
            (2, 0)
        """
        session, loop = self._need()
        given: dict[str, Any] = {"text": text, "gold": gold, "keep": keep, "restart": restart, "overwrite": overwrite}
        given |= {"limit": limit, "shard": shard, "input_format": input_format, "output_format": output_format}
        given |= {"encoding": encoding, "delimiter": delimiter, "quote": quote, "header": header}
        files = as_declared(given, FileOptions)
        known = None if input_format is None else FileFormat.named(input_format, PYTHON.input_format)
        reading = ReadOptions(known, encoding, delimiter, quote, header)
        spec = JobSpec(
            RowSource(
                *(path_of("source", source), text, gold, tuple(keep), files["limit"], files["shard"], reading),
                words=PYTHON,
            ),
            path_of("output", output),
            task_options(labels, options),
            restart=restart,
            overwrite=overwrite,
            report=None if report is None else path_of("report", report),
            reads=(("labels", labels),) if isinstance(labels, Path) else (),
            form=None if output_format is None else FileFormat.named(output_format, PYTHON.output_format),
        )
        for name, told in (("on_begin", on_begin), ("on_progress", on_progress)):
            if told is not None and not callable(told):
                raise OptionError(f"{name}: a function is needed, not {type(told).__name__}")
        result = loop.run(run_job(spec, session, on_progress=on_progress, on_begin=on_begin))
        warn_of_mass(result.summary.mean_mass, 2)
        return result

    # Scores

    def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = True,
        item_first: bool = False,
    ) -> list[Score]:
        """How probable each label token is after the query and each item; SGLang's ``score``.

        Args:
            query, items: all text or all token ids; each item is joined to the query as it stands.
            label_token_ids: the tokens to score, each once.
            apply_softmax: normalise over the label tokens; otherwise probabilities over the whole vocabulary.
            item_first: the item stands before the query.

        Returns:
            A `Score` for each item, in order.

        Raises:
            OptionError: an argument that cannot be used, named.
            ServerError: the server failed.

        Example:
            >>> [[yes], [no]] = runtime.tokenize(["y", "n"])
            >>> [score] = runtime.score("Is this spam? ", ["Buy now!"], [yes, no])
            >>> round(sum(score.values), 6)
            1.0
        """
        session, loop = self._need()
        work = session.score(query, items, label_token_ids, apply_softmax=apply_softmax, item_first=item_first)
        return loop.run(work)

    async def ascore(
        self,
        query: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = True,
        item_first: bool = False,
    ) -> list[Score]:
        """`score` for a caller with an event loop.

        Example:
            >>> async def main():
            ...     return await runtime.ascore("Is this spam? ", ["Buy now!", "See you."], [5, 6])
            >>> len(asyncio.run(main()))
            2
        """
        session, loop = self._need()
        work = session.score(query, items, label_token_ids, apply_softmax=apply_softmax, item_first=item_first)
        return await loop.start(work)

    def rerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> list[Ranked]:
        """Documents by how probable it is that the model calls them relevant to the query.

        Args:
            documents: strings; each is asked about once, the query's part of the prompt computed once a rank.
            **options: ``template`` with ``{query}`` and, once, ``{document}``; ``answers``, the words for relevant and
                not (default ``("yes", "no")``); ``top_n``, how many to return; ``chat``, the model's chat format.

        Returns:
            A `Ranked` for each, the most relevant first, those with an error last.

        Raises:
            OptionError: an argument that cannot be used, named.
            ServerError: the server failed.

        Example:
            >>> ranked = runtime.rerank("big cats", ["lions", "tax law"], top_n=1)
            >>> len(ranked), ranked[0].document in ("lions", "tax law")
            (1, True)
        """
        session, loop = self._need()
        return loop.run(session.rerank(query, documents, **options))

    async def arerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> list[Ranked]:
        """`rerank` for a caller with an event loop.

        Example:
            >>> async def main():
            ...     return await runtime.arerank("big cats", ["lions", "tax law"], top_n=1)
            >>> [ranked] = asyncio.run(main())
            >>> ranked.document in ("lions", "tax law")
            True
        """
        session, loop = self._need()
        return await loop.start(session.rerank(query, documents, **options))

    def logprobs(self, prompts: Sequence[str | Sequence[int]], token_ids: Sequence[int]) -> list[TokenLogProbs]:
        """Log-probability of each token as the next one after each prompt.

        Args:
            prompts: text or token ids.
            token_ids: the tokens, each once.

        Returns:
            A `TokenLogProbs` for each prompt, in order; its values, in nats, in the order of `token_ids`.

        Raises:
            OptionError: no tokens, or one twice.
            ServerError: the server failed.

        Example:
            >>> [answer] = runtime.logprobs(["The answer is"], [5, 6, 7])
            >>> len(answer.log_probabilities), max(answer.log_probabilities) <= 0
            (3, True)
        """
        session, loop = self._need()
        return loop.run(session.logprobs(prompts, token_ids))

    async def alogprobs(self, prompts: Sequence[str | Sequence[int]], token_ids: Sequence[int]) -> list[TokenLogProbs]:
        """`logprobs` for a caller with an event loop.

        Example:
            >>> async def main():
            ...     return await runtime.alogprobs(["The answer is"], [5, 6, 7])
            >>> [answer] = asyncio.run(main())
            >>> len(answer.log_probabilities)
            3
        """
        session, loop = self._need()
        return await loop.start(session.logprobs(prompts, token_ids))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the model reads it, without special tokens.

        Raises:
            OptionError: one is no text, or the server refuses it, as too long; names it.

        Example:
            >>> len(runtime.tokenize(["one text", "another"]))
            2
        """
        session, loop = self._need()
        return loop.run(session.tokenize(texts))


async def _stream(
    session: Session, texts: Iterable[str] | AsyncIterable[str], options: TaskOptions
) -> AsyncIterator[Classification]:
    task, mass = await session.prepare(options), StreamMass()

    async def work(window: list[str]) -> list[Classification]:
        found = await session.classify(window, task)
        mass.add(found)
        return found

    async with contextlib.aclosing(in_order(texts, work)) as results:
        async for result in results:
            yield result
    mass.judge()


def _judged(results: list[Classification]) -> list[Classification]:
    """The same, after a warning where the model would mostly write something else than a label."""
    warn_of_mass(mean_mass(results), 3)
    return results


def _strings(texts: Any) -> Sequence[str]:
    if is_array(texts):
        return listed("texts", texts)
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise OptionError(f"texts: a list of strings or a frame is needed, not {type(texts).__name__}")
    return texts
