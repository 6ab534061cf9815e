"""A user's program: all of the public API, checked by mypy --strict and run against a real server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import polars

import asyncep
from asyncep import (
    Classification,
    InputError,
    JobError,
    JobResult,
    LabelMassWarning,
    OptionError,
    OutputError,
    Ranked,
    Runtime,
    Score,
    ServerError,
    StartError,
    TokenLogProbs,
)


def texts() -> Iterator[str]:
    """What an iterator of texts may be."""
    yield "A goal in the last minute."
    yield "The minister resigned."


def classified(runtime: Runtime) -> list[str]:
    """Lists, iterators and frames."""
    labels = ["sport", "politics"]
    listed: list[Classification] = runtime.classify(list(texts()), labels, examples=[("A late try.", "sport")])
    streamed: Iterator[Classification] = runtime.classify(texts(), labels, calibrate="N/A", length="mean")
    described: list[Classification] = runtime.classify(
        list(texts()), {"sport": "matches and players", "politics": "governments"}, other_below=0.1, truncate="tail"
    )
    several = runtime.classify(list(texts()), [{"label": "sport", "threshold": 0.3}, "politics"], multi_label=True)
    assert all(set(answer.labels) <= {"sport", "politics"} for answer in several)
    assert all(answer.label in ("sport", "politics", "other") for answer in described)
    frame: polars.DataFrame = runtime.classify(polars.DataFrame({"body": list(texts())}), labels, text="body")
    return [answer.label or "" for answer in (*listed, *streamed)] + frame["label"].to_list()


def asked(runtime: Runtime) -> tuple[list[Score], list[Ranked], list[TokenLogProbs]]:
    """Scores, places and log-probabilities."""
    [[yes], [no]] = runtime.tokenize(["y", "n"])
    scores = runtime.score("Is this spam? ", ["Buy now!", "See you."], [yes, no])
    ranked = runtime.rerank("big cats", ["lions hunt", "tax law"], top_n=1)
    return scores, ranked, runtime.logprobs(["The answer is"], [yes, no])


async def awaited(runtime: Runtime) -> list[Classification]:
    """The same from an event loop."""
    first = await runtime.aclassify(list(texts()), ["sport", "politics"])
    scores = await runtime.ascore("Is this spam? ", ["Buy now!"], [5, 6])
    ranked = await runtime.arerank("big cats", ["lions hunt"], answers=("yes", "no"))
    logs = await runtime.alogprobs(["The answer is"], [5, 6])
    assert [len(scores), len(ranked), len(logs)] == [1, 1, 1]
    return [*first, *[answer async for answer in runtime.astream(texts(), ["sport", "politics"])]]


def job(runtime: Runtime, folder: Path) -> JobResult:
    """A file to a file."""
    (folder / "mails.csv").write_text("body,kind\nBuy now!,spam\nSee you at ten.,ham\n")
    done = runtime.classify_file(
        folder / "mails.csv", folder / "out.jsonl", ["spam", "ham"], text="body", gold="kind", keep=["kind"]
    )
    for wrong, output, text in (("gone.csv", "o.jsonl", "body"), ("mails.csv", "out.jsonl", "body")):
        try:
            runtime.classify_file(folder / wrong, folder / output, ["spam", "ham"], text=text)
        except (InputError, OutputError, JobError) as error:
            print(error)
    return done


def connected(url: str) -> int:
    """A server that runs already, with and without `with`; and a model that there is not."""
    with Runtime.connect(url) as first:
        prompts: int = first.totals.prompts
    second: Runtime = Runtime.connect(url).start()
    same: bool = second.url == url
    second.close()
    try:
        Runtime("/no/such/model", dp_size=1, show_start=False).start()
    except StartError as error:
        print(error)
    return prompts if same else -1


async def connected_too(url: str) -> list[int]:
    """The same from an event loop."""
    async with Runtime.connect(url) as runtime:
        return runtime.tokenize(["y"])[0]


def judged(runtime: Runtime) -> int:
    """A warning that a user may want to be an error."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LabelMassWarning)
        labels = ["an improbable label", "another of the kind"]
        runtime.classify(["x"], labels)
        assert seen[0].filename == __file__
        list(runtime.classify((f"text {i}" for i in range(200)), labels))
    return len(seen)


def refused(runtime: Runtime) -> str:
    """An argument that cannot be used is an error that names it; a server that is not there is another."""
    try:
        runtime.classify(["x"], ["only one"])
    except OptionError as error:
        return f"{asyncep.__version__}: {error}"
    except ServerError as error:
        return str(error)
    return ""
