"""Jobs: what the machinery costs, what a kill costs, and what planning gains over sending row by row.

    python bench/jobs.py [--quick] [--rounds N] [--only machinery,kills,sides,callers,spam,batch]

Machinery: synthetic rows through a job with null ranks, in the job's process and behind HTTP; rows/s and memory. Kills:
the same job killed at ten random points and gone on with. Sides: BBC news by the demo's model on two cores, as a job,
row by row through the same server with 64 clients and with one, and through stock SGLang's /v1/score with 64 clients;
each side a server of its own, in turn, caches emptied. Callers: 200 calls of one text at once over one call with all
of them; the first answer of a source that gives a text a second; 1,000 labels over 50. Spam: SpamAssassin end to end.
Batch: 500 rows by the `openai` client, the server killed half-way. Writes `bench/out/jobs.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from job_callers import callers, claims_of_callers
from openai_batch import batch_survives_a_kill
from peer_start import flush_cache
from records import Claim, write
from rich.console import Console
from stock_server import stock_server

from asyncep.commands.demo_data import DATASETS
from asyncep.demo.build import build_demo_model
from asyncep.demo.weights import DemoDataMissing
from asyncep.jobs.report import figures_of
from asyncep.runtime.runtime import Runtime
from asyncep.tasks.template import Template
from asyncep_sgl.process.ports import free_port

SEED = 20261123
CLIENTS = 64
CHARACTERS = 600
HERE = Path(__file__).parent
BBC_LABELS = ["business", "entertainment", "politics", "sport", "technology"]
BBC_TEMPLATE = """\
BBC News sections: business, entertainment, politics, sport, technology.

Business: companies and their profits, jobs, trade, markets, banks, currencies, oil and the economy.
Entertainment: films, television, music, theatre, books, awards, festivals, actors and singers.
Politics: the government, ministers, parties, elections, parliament, laws, taxes and public services.
Sport: football, rugby, cricket, tennis, athletics, players, coaches, matches, clubs and injuries.
Technology: computers, software, the internet, mobile phones, games, gadgets, security and science.

{text}

This article was first published in the section"""
SPAM_LABELS = ["spam", "ham"]
SPAM_TEMPLATE = """\
Every mail is either spam or ham. Spam is unwanted: advertising, get-rich-quick offers, loans, pills, adult sites.
Ham is wanted: mailing lists, replies, news that was subscribed to, messages from people one knows.

{text}

This mail is"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    machinery: int
    over_http: int
    kills: int
    bbc: int
    spam: int
    batch: int


# About a quarter of an hour on two cores.
FULL = Sizes(machinery=1_000_000, over_http=1_000_000, kills=200_000, bbc=600, spam=1000, batch=500)
QUICK = Sizes(machinery=30_000, over_http=30_000, kills=20_000, bbc=48, spam=24, batch=48)


# Machinery


def synthetic(path: Path, rows: int) -> Path:
    """Rows of about 30 tokens, one in ten a repetition."""
    chance = random.Random(SEED)
    words = [f"word{i}" for i in range(500)]
    before = ""
    with path.open("w") as file:
        for number in range(rows):
            text = before if number % 10 == 9 else f"{number} " + " ".join(chance.choices(words, k=6))
            before = text
            file.write(json.dumps({"text": text, "label": "yes" if number % 3 else "no"}) + "\n")
    return path


@contextlib.contextmanager
def null_server(tokenizer: Path) -> Iterator[str]:
    """`null_generate.py` on a free port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(HERE / "null_generate.py"), str(port), str(tokenizer)])
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def null_job(
    source: Path, output: Path, tokenizer: Path, url: str | None, kill_at: int | None = None
) -> dict[str, Any]:
    """Runs `null_job.py`; kills it once it has reported `kill_at` rows of its own."""
    command = [sys.executable, str(HERE / "null_job.py"), str(source), str(output), str(tokenizer)]
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command + ([url] if url else []), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(json.loads(text))
            if kill_at is not None and lines[-1].get("new_rows", 0) >= kill_at:
                process.kill()
    return {"status": process.returncode, "lines": lines}


def machinery(work: Path, tokenizer: Path, sizes: Sizes) -> dict[str, Any]:
    """Rows/s, CPU seconds and memory, in process and over HTTP."""
    found: dict[str, Any] = {}
    for side, rows in (("in process", sizes.machinery), ("http", sizes.over_http)):
        source = synthetic(work / "synthetic.jsonl", rows)
        with null_server(tokenizer) if side == "http" else contextlib.nullcontext() as url:
            run = null_job(source, work / "out.jsonl", tokenizer, url)
        if run["status"]:
            raise RuntimeError(f"the job without a model ended with status {run['status']}")
        samples = [line for line in run["lines"] if "rows" in line]
        last = samples[-1]
        # Caches fill in the first half; a leak goes on in the second.
        early = max(line["resident_bytes"] for line in samples if line["rows"] < rows / 2)
        late = max(line["resident_bytes"] for line in samples if line["rows"] >= rows / 2)
        found[side] = {
            "rows": rows,
            "rows_per_s": rows / last["seconds"],
            "cpu_seconds_per_million_rows": last["cpu_seconds"] / rows * 1e6,
            "resident_bytes_first_half": early,
            "resident_bytes_second_half": late,
            "growth": late / early,
            "resident_bytes_by_rows": [
                [line["rows"], line["resident_bytes"]] for line in samples[:: len(samples) // 20 + 1]
            ],
            "once": each_once(work / "out.jsonl", rows),
        }
        (work / "out.jsonl").unlink()
    return found


def each_once(output: Path, rows: int) -> bool:
    """Whether the output has every row once, in order."""
    with output.open("rb") as lines:
        numbers = [json.loads(line)["row"] for line in lines]
    return numbers == list(range(rows))


def kills(work: Path, tokenizer: Path, rows: int, points: int = 10) -> dict[str, Any]:
    """One job, killed `points` times at random, then finished."""
    source, output = synthetic(work / "kills.jsonl", rows), work / "killed.jsonl"
    chance = random.Random(SEED)
    at = []
    for _ in range(points):
        # Early in each run, so that ten of them do not use up the file.
        run = null_job(source, output, tokenizer, None, kill_at=chance.randrange(1, rows // points // 2))
        if output.exists():
            break
        at.append(run["lines"][-1]["rows"])
    finished = null_job(source, output, tokenizer, None)
    return {
        "rows": rows,
        "killed_at_rows": at,
        "status": finished["status"],
        "every_row_once": each_once(output, rows),
        "left_behind": [path.name for path in work.iterdir() if path.name.startswith("killed.jsonl.")],
    }


# Sides


def rows_of(name: str, count: int, relabel: dict[str, str]) -> list[dict[str, Any]]:
    """A sample of a data set, the same each time."""
    rows = list(DATASETS[name]())
    chosen = random.Random(SEED).sample(rows, min(count, len(rows)))
    return [{"text": row["text"][:CHARACTERS], "label": relabel.get(row["label"], row["label"])} for row in chosen]


async def one_by_one(
    url: str, bodies: Sequence[dict[str, Any]], path: str, clients: int, labels: int
) -> tuple[float, list[list[float]]]:
    """Seconds to send each body by itself, and the label probabilities in order."""
    answers: list[list[float]] = [[] for _ in bodies]
    waiting = iter(enumerate(bodies))

    async def client() -> None:
        for number, body in waiting:
            response = await http.post(path, json=body)
            response.raise_for_status()
            found = response.json()
            if path == "/v1/score":
                answers[number] = found["scores"][0]
            else:
                answers[number] = [entry[0] for entry in found["meta_info"]["output_token_ids_logprobs"][0]]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits) as http:
        (await http.post("/flush_cache")).raise_for_status()
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    if any(len(answer) != labels for answer in answers):
        raise RuntimeError(f"{path} did not score every label")
    return seconds, answers


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of all that it has started; its own, the client's, is not in it."""
    total = 0.0
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def accuracy(answers: Sequence[Sequence[float]], rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> float:
    """Share of rows whose best label is the true one."""
    hits = [
        labels[max(range(len(labels)), key=a.__getitem__)] == r["label"] for a, r in zip(answers, rows, strict=True)
    ]
    return sum(hits) / len(hits)


def sides(work: Path, model: Path, count: int, rounds: int) -> dict[str, Any]:
    """Rows/s of every side, all rounds."""
    from tokenizers import Tokenizer

    rows = rows_of("bbc", count, {"tech": "technology"})
    source = work / "bbc.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [tokenizer.encode(f" {label}", add_special_tokens=False).ids for label in BBC_LABELS]
    if any(len(one) != 1 for one in ids):
        raise RuntimeError(f"the labels must be one token each: {ids}")
    label_ids = [one[0] for one in ids]
    template = Template.parse(BBC_TEMPLATE, BBC_LABELS)
    generate = [
        {
            "text": template.render(row["text"]),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": label_ids,
        }
        for row in rows
    ]
    score = [
        {"query": template.before, "items": [row["text"] + template.after], "label_token_ids": label_ids, "model": "m"}
        for row in rows
    ]
    found: dict[str, list[dict[str, float]]] = {}

    def note(side: str, seconds: float, right: float, cpu: float, sent: int, **more: Any) -> None:
        # Processor time of the server's processes says something on a busy machine, too.
        entry = {"rows_per_s": sent / seconds, "seconds": seconds, "accuracy": right, "cpu_seconds_per_row": cpu / sent}
        entry |= more
        found.setdefault(side, []).append(entry)
        print(
            f"  {side}: {entry['rows_per_s']:.2f} rows/s, {cpu / sent:.3f} CPU s/row, accuracy {right:.3f}",
            file=sys.stderr,
            flush=True,
        )

    def ours(number: int) -> None:
        with Runtime(str(model), dp_size=2, log_level="error") as runtime:
            url, own = runtime.url, psutil.Process()

            def job() -> None:
                flush_cache(url)
                output = work / "bbc-out.jsonl"
                before = cpu_seconds(own)
                result = runtime.classify_file(
                    source, output, BBC_LABELS, gold="label", template=BBC_TEMPLATE, overwrite=True
                )
                figures = figures_of(result)
                more = {key: figures[key] for key in ("cached_tokens_share", "possible_cached_share", "tokens_per_s")}
                cpu = cpu_seconds(own) - before
                note("job", result.total("seconds"), result.summary.accuracy or 0.0, cpu, len(rows), **more)

            def rowwise(clients: int) -> None:
                some = generate if clients > 1 else generate[: max(8, len(generate) // 5)]
                before = cpu_seconds(own)
                seconds, answers = asyncio.run(one_by_one(url, some, "/generate", clients, len(label_ids)))
                cpu = cpu_seconds(own) - before
                right = accuracy(answers, rows[: len(some)], BBC_LABELS)
                note(f"row by row, {clients} client(s)", seconds, right, cpu, len(some))

            # Warmed: the first batches of a rank compile kernels for their shapes.
            asyncio.run(one_by_one(url, generate[: max(8, len(generate) // 10)], "/generate", 8, len(label_ids)))
            steps = [job, lambda: rowwise(CLIENTS), lambda: rowwise(1)]
            for step in steps[number % 3 :] + steps[: number % 3]:
                step()

    def theirs(_: int) -> None:
        with stock_server(model) as url:
            asyncio.run(one_by_one(url, score[: max(8, len(score) // 10)], "/v1/score", 8, len(label_ids)))
            before = cpu_seconds(psutil.Process())
            seconds, answers = asyncio.run(one_by_one(url, score, "/v1/score", CLIENTS, len(label_ids)))
            cpu = cpu_seconds(psutil.Process()) - before
            right = accuracy(answers, rows, BBC_LABELS)
            note(f"stock SGLang /v1/score, {CLIENTS} clients", seconds, right, cpu, len(rows))

    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            side(number)
    return {"rows": len(rows), "model": model.name, "sides": found}


def spam(work: Path, model: Path, count: int) -> dict[str, Any]:
    """SpamAssassin through a job, calibrated by ten mails of each kind that are not in the sample, labels not shown."""
    rows = rows_of("spam-assassin", count + 200, {})
    neutral = [row for label in SPAM_LABELS for row in [r for r in rows[count:] if r["label"] == label][:10]]
    source = work / "spam.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    with Runtime(str(model), dp_size=2, log_level="error") as runtime:
        result = runtime.classify_file(
            source,
            work / "spam-out.jsonl",
            SPAM_LABELS,
            gold="label",
            template=SPAM_TEMPLATE,
            calibrate=[row["text"] for row in neutral],
        )
    most = max(sum(row["label"] == label for row in rows[:count]) for label in SPAM_LABELS)
    return {**figures_of(result), "accuracy_of_always_the_same": most / count}


def claims_of(raw: dict[str, Any]) -> list[Claim]:
    """What is claimed of the parts that were run."""
    claims = []
    if found := raw.get("machinery"):
        for side in ("in process", "http"):
            figures = found[side]
            claims += [
                Claim(f"rows/s of the machinery, null ranks, {side}", figures["rows_per_s"], 5000, "rows/s"),
                Claim(f"memory of the second half over the first, {side}", figures["growth"], 1.05, "ratio", False),
                Claim(f"every row once, {side}", float(figures["once"]), 1, "yes"),
            ]
    if found := raw.get("kills"):
        claims += [
            Claim("kill -9 at random points survived", float(len(found["killed_at_rows"])), 10, "kills"),
            Claim("every row once after the kills", float(found["every_row_once"]), 1, "yes"),
        ]
    if found := raw.get("sides"):
        rates = {side: statistics.median(run["rows_per_s"] for run in runs) for side, runs in found["sides"].items()}
        job = rates["job"]
        runs = found["sides"]["job"]
        share = statistics.median(run["cached_tokens_share"] / run["possible_cached_share"] for run in runs)
        claims += [
            Claim("job over stock /v1/score", job / rates[f"stock SGLang /v1/score, {CLIENTS} clients"], 1.5, "ratio"),
            Claim("job over row by row, 64 clients", job / rates[f"row by row, {CLIENTS} client(s)"], 1.2, "ratio"),
            Claim("job over row by row, one client", job / rates["row by row, 1 client(s)"], 1.2, "ratio"),
            Claim("cached share over what is possible", share, 0.95, "ratio"),
        ]
    if found := raw.get("callers"):
        claims += claims_of_callers(found)
    if (found := raw.get("spam")) and "accuracy" in found:
        claims.append(
            Claim("SpamAssassin end to end: rows with errors", float(found["errors"]), 0, "rows", at_least=False)
        )
    if found := raw.get("batch"):
        claims.append(Claim("openai batch over a kill: every row once", float(found["every_row_once"]), 1, "yes"))
    return claims


def main() -> int:
    """Runs the bench; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, one round: shows that it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each side is started (default 3)")
    parser.add_argument(
        "--only", default="machinery,kills,sides,callers,spam,batch", metavar="A,B", help="parts to run"
    )
    options = parser.parse_args()
    sizes, parts = QUICK if options.quick else FULL, options.only.split(",")
    console = Console()
    raw: dict[str, Any] = {}
    model = build_demo_model(variant="sparse")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "machinery" in parts:
            raw["machinery"] = machinery(work, model, sizes)
        if "kills" in parts:
            raw["kills"] = kills(work, model, sizes.kills)
        if "sides" in parts:
            raw["sides"] = sides(work, model, sizes.bbc, 1 if options.quick else options.rounds)
        if "callers" in parts:
            texts = [row["text"] for row in rows_of("bbc", 24 if options.quick else 200, {})]
            raw["callers"] = callers(model, texts, 1 if options.quick else 5)
        if "spam" in parts:
            try:
                raw["spam"] = spam(work, model, sizes.spam)
            except DemoDataMissing as missing:
                raw["spam"] = {"left_out": str(missing)}
                console.print(f"left out: {missing}")
        if "batch" in parts:
            prompts = [row["text"] for row in rows_of("bbc", sizes.batch, {})]
            raw["batch"] = batch_survives_a_kill(model, prompts)
    console.print_json(data=raw)
    claims = claims_of(raw)
    for claim in claims:
        console.print(
            f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.3f} (wanted {claim.wanted})"
        )
    console.print(str(write("jobs-quick" if options.quick else "jobs", seed=SEED, raw=raw, claims=claims)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
