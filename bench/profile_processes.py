"""Processor time of each process a request: front, router, ranks, detokenizer, with and without our savings.

    python bench/profile_processes.py [--quick] [--rounds N] [--without NAME ...] [--model tiny|147m] [--profile DIR]

Two ranks serve single texts of 64 clients and lists, of 128 and 512 tokens, nothing shared. The default model has next
to nothing to compute, so that a rank's time too is what its Python costs. Sides take turns: the server as it is,
without any of the savings (`asyncep serve --asyncep-without all`), and without each that `--without` names.
`--profile` samples every process with py-spy and writes what its functions took; figures of such a run are not to be
used. Writes `bench/out/profile_processes.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from models import QWEN3_147M, QWEN3_TINY, random_qwen3, word_tokenizer
from peer_start import flush_cache
from records import Claim, write
from rich.console import Console
from rich.table import Table
from router_sides import processor_seconds_by_role, role

from asyncep.local_server import local_server

SEED = 20261125
CLIENTS = 64
LIST = 64
LABELS = (11, 22, 33, 44)
ROLES = ("front", "router", "rank", "detokenizer")
MODELS = {"tiny": ("qwen3-tiny", QWEN3_TINY), "147m": ("qwen3-147m", QWEN3_147M)}
IDLE_SECONDS = 5.0
PROFILE_RATE = 250
WAITS = ("Poller.poll", "Runner.run ", "Socket.recv_pyobj")


@dataclass(frozen=True)
class Case:
    """Requests of one kind: `form` is single (one text a request), list (of texts) or ids (a list of token ids)."""

    form: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.form} {self.tokens}"


CASES = tuple(Case(form, tokens) for form in ("single", "list", "ids") for tokens in (128, 512))


def processes() -> dict[str, list[psutil.Process]]:
    """What this bench has started, by role."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.Process().children(recursive=True):
        found.setdefault(role(process), []).append(process)
    return found


def seconds() -> dict[str, float]:
    """Processor time so far, by role, of those that every side has, also if it is zero."""
    return dict.fromkeys(ROLES, 0.0) | processor_seconds_by_role(os.getpid())


def bodies(case: Case, prompts: int, tokenizer: Any, seed: int) -> list[bytes]:
    """Requests for so many prompts, of random words (one in five texts begins alike with no other)."""
    rng = random.Random(seed)
    words = sorted({word for word in Path(__file__).read_text().split() if word.isalpha()})
    texts = []
    for number in range(prompts):
        text = f"{seed} {number} " + " ".join(rng.choices(words, k=case.tokens))
        ids = tokenizer.encode(text)[: case.tokens]
        texts.append(ids if case.form == "ids" else tokenizer.decode(ids))
    field = "input_ids" if case.form == "ids" else "text"
    common = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "token_ids_logprob": LABELS}
    if case.form == "single":
        return [orjson.dumps({field: text, **common}) for text in texts]
    return [orjson.dumps({field: texts[at : at + LIST], **common}) for at in range(0, prompts, LIST)]


async def send(url: str, requests: Sequence[bytes], clients: int) -> list[list[float]]:
    """Sends all; returns each prompt's log-probabilities in order.

    Raises:
        aiohttp.ClientResponseError: a request was refused: the figures would mean nothing.
    """
    answers: list[Any] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=clients)

    async def client() -> None:
        for number in waiting:
            headers = {"content-type": "application/json"}
            async with http.post(f"{url}/generate", data=requests[number], headers=headers) as answer:
                answer.raise_for_status()
                answers[number] = orjson.loads(await answer.read())

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        await asyncio.gather(*(client() for _ in range(clients)))
    flat = [each for answer in answers for each in (answer if isinstance(answer, list) else [answer])]
    return [[entry[0] for entry in each["meta_info"]["output_token_ids_logprobs"][0]] for each in flat]


def sampler() -> str:
    """py-spy's program, which lies beside the locked packages.

    Raises:
        SystemExit: there is none.
    """
    found = [str(file.locate()) for file in files("py-spy") or () if file.name == "py-spy"]
    if not found:
        raise SystemExit("--profile: py-spy is not installed; run make setup")
    return found[0]


def top(folded: Path, lines: int = 60) -> str:
    """The functions of a py-spy recording, of the thread that works: alone, and with what they call.

    In parts of the time the thread worked or was kept from its core. Waits in C look to py-spy like work; they are
    told by the functions that wait.
    """
    own: collections.Counter[str] = collections.Counter()
    inclusive: collections.Counter[str] = collections.Counter()
    waits = 0
    for line in folded.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames, samples = stack.split(";"), int(count)
        if any("_bootstrap_inner" in frame for frame in frames):
            continue
        if frames[-1].startswith(WAITS):
            waits += samples
            continue
        own[frames[-1]] += samples
        for frame in set(frames):
            inclusive[frame] += samples
    total = max(1, sum(own.values()))
    parts = [f"{total} samples, and {waits} of waiting"]
    for title, counter in (("alone", own), ("with callees", inclusive)):
        rows = [f"{100 * n / total:5.1f} %  {name}" for name, n in counter.most_common(lines)]
        parts.append("\n".join([title, *rows]))
    return "\n\n".join(parts) + "\n"


def profiled(url: str, case: Case, requests: Sequence[bytes], clients: int, out: Path, side: str) -> None:
    """One more load, with py-spy looking on."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        recorders = []
        for name, members in processes().items():
            for member in members[:1] if name in ROLES else ():
                raw = Path(directory) / name
                command = [sampler(), "record", "-p", str(member.pid), "-r", str(PROFILE_RATE), "-d", "600"]
                command += ["-f", "raw", "-F", "-o", str(raw)]
                recorders.append(
                    (name, raw, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                )
        time.sleep(1)  # py-spy says nothing when it has attached
        asyncio.run(send(url, requests, clients))
        for name, raw, recorder in recorders:
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
            if raw.exists():
                (out / f"{side}-{case.name}-{name}.txt".replace(" ", "-")).write_text(top(raw))


class Bench:
    """Serves every case by every side, round after round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        name, shape = MODELS[options.model]
        self.model = random_qwen3(name, shape)
        self.tokenizer, self.tokenizer_path = word_tokenizer(shape["vocab_size"])
        self.prompts = 64 if options.quick else options.prompts
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.idle: dict[str, list[dict[str, float]]] = {}
        self.answers: dict[str, dict[str, list[list[float]]]] = {}

    def side(self, name: str, without: Sequence[str], number: int) -> None:
        """One start of one side: every case warmed, then measured."""
        flags = ["--dp-size", "2", "--tokenizer-path", str(self.tokenizer_path)]
        if without:
            flags += ["--asyncep-without", ",".join(without)]
        with local_server(str(self.model), flags) as url:
            for case in self.options.cases:
                clients = CLIENTS if case.form == "single" else 4
                asyncio.run(send(url, bodies(case, self.prompts, self.tokenizer, SEED + 1), clients))
                flush_cache(url)
                requests = bodies(case, self.prompts, self.tokenizer, SEED)
                before, began = seconds(), time.perf_counter()
                answers = asyncio.run(send(url, requests, clients))
                took = time.perf_counter() - began
                used = {name: total - before.get(name, 0.0) for name, total in seconds().items()}
                row = {f"{name}_ms": 1000 * spent / self.prompts for name, spent in used.items()}
                row["all_ms"] = sum(row.values())
                row["prompts_per_s"] = self.prompts / took
                self.runs.setdefault(case.name, {}).setdefault(name, []).append(row)
                self.answers.setdefault(case.name, {}).setdefault(name, answers)
                print(f"  {name}, {case.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), file=sys.stderr)
                if self.options.profile and number == 0:
                    flush_cache(url)
                    profiled(url, case, requests, clients, Path(self.options.profile), name)
            before = seconds()
            time.sleep(0.5 if self.options.quick else IDLE_SECONDS)
            span = 0.5 if self.options.quick else IDLE_SECONDS
            idle = {each: 100 * (total - before[each]) / span for each, total in seconds().items()}
            self.idle.setdefault(name, []).append(idle)

    def run(self) -> None:
        """Rounds with the order of sides turning."""
        sides: list[tuple[str, Sequence[str]]] = [("ours", ())]
        if not self.options.profile:
            sides.append(("without all", ("all",)))
        sides += [(f"without {name}", (name,)) for name in self.options.without]
        for number in range(self.options.rounds):
            for name, without in sides[number % len(sides) :] + sides[: number % len(sides)]:
                self.side(name, without, number)

    def median(self, case: str, side: str, key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in self.runs[case][side])

    def claims(self) -> list[Claim]:
        """What the savings are worth, that they change no answer, and that nothing polls."""
        found = []
        for case, by_side in self.runs.items():
            if "without all" not in by_side:
                continue
            ratio = self.median(case, "without all", "all_ms") / self.median(case, "ours", "all_ms")
            found.append(Claim(f"processor time a prompt without the savings over with them, {case}", ratio, 1.0, ""))
            apart = max(
                abs(a - b)
                for name in by_side
                for mine, theirs in zip(self.answers[case]["ours"], self.answers[case][name], strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )
            # Batches form by timing, and bf16 rounds by batch.
            found.append(Claim(f"largest difference of a log-probability, {case}", apart, 0.2, "nats", at_least=False))
        for each in ROLES:
            used = [row[each] for row in self.idle["ours"]]
            if used:
                found.append(
                    Claim(f"processor idle, {each}", statistics.median(used), 3.0, "% of a core", at_least=False)
                )
        return found

    def between_prompts(self) -> dict[str, float]:
        """How far log-probabilities of different prompts lie apart, on average: what mixed-up answers would show."""
        return {
            case: statistics.fmean(
                abs(a - b)
                for mine, next_one in itertools.pairwise(by_side["ours"])
                for a, b in zip(mine, next_one, strict=True)
            )
            for case, by_side in self.answers.items()
        }

    def table(self) -> Table:
        table = Table(title="processor time a prompt, ms (medians)")
        for column in ("requests", "side", *ROLES, "all", "prompts/s"):
            table.add_column(column)
        for case, by_side in self.runs.items():
            for name in by_side:
                figures = [self.median(case, name, f"{each}_ms") for each in ROLES]
                rest = (self.median(case, name, "all_ms"), self.median(case, name, "prompts_per_s"))
                table.add_row(case, name, *(f"{f:.2f}" for f in figures), f"{rest[0]:.2f}", f"{rest[1]:.0f}")
        return table


def main() -> int:
    """Run, print, write. Returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 prompts a case, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1024, help="of each case and round")
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="also measure without this saving")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--profile", metavar="DIR", help="write py-spy's profiles of each process there")
    options = parser.parse_args()
    options.cases = [case for case in CASES if not options.cases or case.name in options.cases]
    if options.quick:
        options.rounds = 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bench = Bench(options)
    bench.run()
    claims = bench.claims()
    Console().print(bench.table())
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value:.4g} (wanted {claim.wanted:g})")
    raw = {"model": options.model, "prompts": bench.prompts, "runs": bench.runs, "idle_percent": bench.idle}
    raw["between_prompts"] = bench.between_prompts()
    print(write("profile_processes", seed=SEED, raw=raw, claims=claims))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
