"""``asyncep demo``: real news articles, classified by a real MoE on ranks that share one copy of its experts."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from asyncep.commands.demo_model import build_with_progress
from asyncep.demo.build import read_report
from asyncep.demo.news import TOPICS, Article, sample_articles
from asyncep.jobs.progress import shown_progress
from asyncep.jobs.report import figures_of
from asyncep.jobs.spec import JobResult
from asyncep.runtime.runtime import Runtime
from asyncep_router.keys import key_from

_REFERENCE_ARTICLES = 40


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns 0 when it went through."""
    parser = argparse.ArgumentParser(
        "asyncep demo",
        description="Build the demo model, serve it, classify BBC news articles and compare with the dense model.",
    )
    parser.add_argument("--dp-size", type=int, default=2, metavar="N", help="ranks (default 2)")
    parser.add_argument(
        "--articles-per-topic",
        type=int,
        default=_REFERENCE_ARTICLES,
        metavar="N",
        help="articles of each of the five topics (default 40)",
    )
    options = parser.parse_args(arguments)
    if options.articles_per_topic < 1:
        parser.error(f"--articles-per-topic {options.articles_per_topic}: at least 1 is needed")
    console = Console()
    try:
        articles = sample_articles("evaluate", options.articles_per_topic)
    except ValueError as error:
        parser.error(f"--articles-per-topic {options.articles_per_topic}: {error}")

    console.rule("1. the model: SmolLM2-135M-Instruct as a Mixture-of-Experts")
    model = build_with_progress(None, "sparse", console)
    report = read_report(model)
    if report is None:
        raise RuntimeError(f"{model} has no report although it was just built")
    console.print(
        f"{report.experts} experts a layer, {report.top_k} active; the busiest expert takes "
        f"{report.unevenness:.1f}x the mean load"
    )

    console.rule(f"2. the server: {options.dp_size} ranks, one copy of the experts")
    # Imported late: torch takes seconds, and a wrong flag should not wait for it.
    from asyncep.demo.weights import working_dtype

    dtype = str(working_dtype()).removeprefix("torch.")
    with Runtime(str(model), dp_size=options.dp_size, dtype=dtype) as runtime:
        status = _status(runtime.url)
        console.print(_ranks_table(status))

        console.rule(f"3. classifying {len(articles)} articles")
        result = _classify(runtime, articles, console)
        # Memory is looked at again after the work: nothing may have been copied on the way.
        status = _status(runtime.url)
    summary, figures = result.summary, figures_of(result)
    console.print(summary.table())

    console.rule("4. the same prompts through the dense model (Transformers)")
    with console.status("computing"):
        from asyncep.demo.reference import dense_reference_accuracy

        dense = dense_reference_accuracy(articles)
    console.print(f"accuracy {summary.accuracy:.3f}, of the dense model {dense:.3f}")
    line = {
        "accuracy": summary.accuracy,
        "accuracy_dense_reference": dense,
        "requests": summary.rows,
        "requests_per_s": round(figures["rows_per_s"], 2),
        "tokens_per_s": figures["tokens_per_s"],
        "cached_tokens_share": round(figures["cached_tokens_share"], 3),
        "ranks": len(status["ranks"]),
        "expert_bytes_model": report.expert_bytes * working_dtype().itemsize // 2,  # bf16 as stored
        "expert_bytes_resident_per_host": status["resident_bytes"],
    }
    print(json.dumps(line))
    return 0


def _classify(runtime: Runtime, articles: list[Article], console: Console) -> JobResult:
    """The job: articles as a file, labelled by the runtime."""
    # The tokenizer that cuts articles to their budget comes with Transformers, which takes seconds to import.
    from asyncep.demo.task import GUIDE, LABELS, TaskPrompts, calibration_articles
    from asyncep.demo.weights import load_tokenizer

    prompts = TaskPrompts.create(load_tokenizer())

    def after_guide(article: Article) -> str:
        return prompts.text(article).removeprefix(GUIDE)

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "articles.jsonl", Path(folder) / "labelled.jsonl"
        lines = [
            json.dumps({"text": after_guide(article), "topic": LABELS[article.topic].strip()}) for article in articles
        ]
        source.write_text("\n".join(lines))
        with shown_progress(console, lambda: len(articles), None) as bar:
            return runtime.classify_file(
                source,
                output,
                [LABELS[topic].strip() for topic in TOPICS],
                gold="topic",
                template=f"{GUIDE}{{text}}",
                calibrate=[after_guide(article) for article in calibration_articles()],
                on_progress=bar.tell,
            )


def _status(url: str) -> dict[str, Any]:
    key = key_from(None, "ASYNCEP_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.get(f"{url}/asyncep/status", headers=headers, timeout=httpx.Timeout(30, connect=10))
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def _ranks_table(status: dict[str, Any]) -> Table:
    table = Table(title="experts in memory")
    for column in ("rank", "experts owned", "bytes owned", "bytes read", "bytes left to others"):
        table.add_column(column, justify="right")
    for rank in status["ranks"]:
        cells = (rank["rank"], rank["experts"], rank["expert_bytes"], rank["bytes_read"], rank["bytes_skipped"])
        table.add_row(*(f"{cell:,}" for cell in cells))
    table.caption = f"{status['resident_bytes']:,} bytes resident on this host for {len(status['ranks'])} ranks"
    return table
