"""On a machine with GPUs: is every kernel right, and is AsyncEP as a whole? Writes bench/out/gpu_check.{md,json}.

    python bench/gpu_check.py [--model MODEL] [--parts kernels arrival transport attention serving]
    python bench/gpu_check.py --rehearse       the same script without a GPU: Triton's interpreter, a tiny model

Ends with 1 if a check failed. What a machine cannot run is reported as not run, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    # Before Triton is imported by anything: it decides then.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gpu_cases import Case, case, error, expected, run
from records import OUT, machine

from asyncep_kernels.moe.configs import SCHEMES, UNSUPPORTED, Scheme

# Largest error over largest output, as `asyncep_kernels.moe.triton` promises.
BOUND = 0.02
# e4m3's next number is 6 to 12 % away: where the device rounds a product the other way, an output moves.
FP8_BOUND = 0.04
# The served log-probabilities of two implementations in bf16, mean and largest difference.
MEAN_NATS, MOST_NATS = 0.02, 0.5
DEFAULT_MODEL = "Qwen/Qwen3-30B-A3B"
# What stock SGLang answered, by model: asked once.
_STOCK: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    part: str
    name: str
    outcome: str
    """passed, failed or not run."""
    detail: str
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What the checks run on."""

    device: str
    architecture: str
    model: str
    rehearsal: bool

    @property
    def sizes(self) -> tuple[dict[str, Any], ...]:
        """Layers: one odd in every size, one skewed, and on a GPU one of Qwen3-30B-A3B."""
        odd = {"tokens": 37, "hidden": 136, "inter": 88, "experts": 5, "top_k": 3}
        few = {"tokens": 3, "hidden": 128, "inter": 128, "experts": 9, "top_k": 2}
        if self.rehearsal:
            return odd, {**few, "skew": 2.0}
        real = {"tokens": 4096, "hidden": 2048, "inter": 768, "experts": 128, "top_k": 8}
        return odd, {**few, "skew": 2.0}, real, {**real, "skew": 1.0}, {**real, "tokens": 64}


class NotRunError(Exception):
    """This machine cannot run the check; says why."""


def kernels(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every kernel against its reference."""
    yield "permutation and its reversal", lambda: check_permutation(bench)
    for name, scheme in SCHEMES.items():
        for size in bench.sizes:
            shape = "x".join(str(size[key]) for key in ("tokens", "hidden", "inter", "experts", "top_k"))
            title = f"{name} {shape}{' skewed' if 'skew' in size else ''}"
            if (bench.architecture, name) in UNSUPPORTED:
                yield title, _not_run(f"{bench.architecture} cannot multiply e4m3; fp8-weights serves")
            else:
                yield title, lambda scheme=scheme, size=size: check_layer(bench, scheme, size)  # type: ignore[misc]


def check_permutation(bench: Bench) -> str:
    """Equal to the reference in every element, with and without an order of experts."""
    from asyncep_kernels.permute import reference, triton

    generator = torch.Generator().manual_seed(0)
    for tokens, experts in ((0, 3), (7, 1), (130, 33), (70, 256)):
        ids = torch.randint(-1, experts, (tokens, 3), generator=generator)
        for order in (None, torch.randperm(experts, generator=generator).int()):
            on_device = None if order is None else order.to(bench.device)
            found = triton.permute(ids.to(bench.device), experts, 16, order=on_device)
            exact = reference.permute(ids, experts, 16, order=order)
            for mine, theirs in zip(found, exact, strict=True):
                if not torch.equal(mine.cpu(), theirs):
                    raise AssertionError(f"{tokens} tokens, {experts} experts: differs from the reference")
            rows = torch.randn(found.rows.numel(), 40, generator=generator)
            weights = torch.rand(tokens, 3, generator=generator)
            summed = triton.unpermute(rows.to(bench.device), found.position, weights.to(bench.device)).cpu()
            torch.testing.assert_close(summed, reference.unpermute(rows, exact.position, weights))
    return "equal"


def check_layer(bench: Bench, scheme: Scheme, size: dict[str, Any]) -> str:
    """Within the promised error, and the same bits twice."""
    work = case(scheme, device=bench.device, seed=1, **size)
    found = run(work).clone()
    worst = error(found, expected(work))
    bound = FP8_BOUND if scheme.name == "fp8" else BOUND
    if worst > bound:
        raise AssertionError(f"error {worst:.4f}, bound {bound}")
    if not torch.equal(found, run(work)):
        raise AssertionError("a second run gave other bits")
    return f"error {worst:.4f}, bound {bound}"


def arrival(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """The wait for gathered experts."""
    yield "experts arrive while the kernels run", lambda: check_arrival(bench)
    yield "an expert that never arrives", lambda: check_absence(bench)


def _late(bench: Bench, limit: int) -> tuple[Case, Any, list[torch.Tensor], list[torch.Tensor]]:
    """A layer whose odd experts' slots hold NaN, and what belongs there."""
    from asyncep_kernels.moe.ready import make_ready

    size = {"tokens": 20, "hidden": 128, "inter": 64, "experts": 6, "top_k": 2}
    if not bench.rehearsal:
        size = {"tokens": 4096, "hidden": 2048, "inter": 768, "experts": 128, "top_k": 8}
    work = case(SCHEMES["bf16"], device=bench.device, seed=2, **size)
    flag_of = [expert // 2 % 3 if expert % 2 else -1 for expert in range(size["experts"])]
    return work, make_ready(flag_of, 5, bench.device, limit=limit), *(list(side) for side in work.experts.entries())


def check_arrival(bench: Bench) -> str:
    """A copying stream (or thread) fills slots and raises flags behind the kernels' start; the sum is as ever."""
    from asyncep_kernels.moe.table import ExpertTable
    from asyncep_kernels.moe.triton import moe

    work, ready, w13, w2 = _late(bench, 1 << 25)
    exact = run(work).clone()
    late = [expert for expert in range(len(w13)) if expert % 2]
    away13, away2 = ({expert: side[expert].cpu().pin_memory() if torch.cuda.is_available() else side[expert].clone()
                      for expert in late} for side in (w13, w2))  # fmt: skip
    for expert in late:
        w13[expert].fill_(float("nan"))
        w2[expert].fill_(float("nan"))
    epoch = torch.full((1,), ready.epoch, dtype=torch.int32)
    epoch = epoch.pin_memory() if torch.cuda.is_available() else epoch

    def copy() -> None:
        for flag in range(ready.flags.numel()):
            for expert in late:
                if int(flag_of[expert]) == flag:
                    w13[expert].copy_(away13[expert], non_blocking=True)
                    w2[expert].copy_(away2[expert], non_blocking=True)
            # A copy too: it goes through the copy engine behind the data, and needs no processor.
            ready.flags[flag : flag + 1].copy_(epoch, non_blocking=True)

    flag_of = ready.flag_of.tolist()
    table = ExpertTable(w13, w2)
    if bench.rehearsal:
        thread = threading.Thread(target=copy)
        thread.start()
        found = moe(work.hidden, work.ids, work.weights, table, ready=ready)
        thread.join()
    else:
        torch.cuda.synchronize()
        found = moe(work.hidden, work.ids, work.weights, table, ready=ready)
        with torch.cuda.stream(torch.cuda.Stream()):
            copy()
        torch.cuda.synchronize()
    ready.check()
    if not torch.equal(found, exact):
        raise AssertionError(f"error {error(found, exact):.4f}: an expert was read before it was there")
    return f"{len(late)} of {len(w13)} experts arrived late; the same bits"


def check_absence(bench: Bench) -> str:
    """The kernels end, and say that they gave up."""
    from asyncep_kernels.moe.triton import moe

    work, ready, *_ = _late(bench, 10 if bench.rehearsal else 100_000)
    moe(work.hidden, work.ids, work.weights, work.experts, ready=ready)
    try:
        ready.check()
    except TimeoutError as raised:
        return str(raised)
    raise AssertionError("nobody noticed")


def transport(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """Experts in device and host memory, between processes."""
    import gpu_transport

    kit = gpu_transport.Kit(bench.rehearsal)
    yield "experts outlive the process that loaded them", lambda: gpu_transport.check_outliving(kit)
    yield "peers' experts, two processes on one GPU", lambda: gpu_transport.check_peers(kit)
    yield "experts in pinned host memory", lambda: gpu_transport.check_pinned(kit)
    if bench.rehearsal or torch.cuda.device_count() > 1:
        yield "experts gathered by a collective, two ranks", lambda: gpu_transport.check_collective(kit)
    else:
        yield "experts gathered by a collective, two ranks", _not_run("NCCL wants a GPU for each rank; here is one")


def attention(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """FlashInfer's wrappers, planned as for a prefill-only batch; in a rehearsal the CPU's attention in their place."""
    yield "ragged new tokens merged with a paged prefix", lambda: check_attention(bench)


def check_attention(bench: Bench) -> str:
    """Three prompts, one with nothing cached, against the reference."""
    from asyncep_kernels.attention import cpu, reference
    from asyncep_kernels.attention.batch import Batch
    from asyncep_kernels.attention.plan import plan

    new, prefix, heads, kv_heads, width = (5, 130, 64), (0, 100, 17), 8, 2, 128
    generator = torch.Generator().manual_seed(3)
    total = sum(new) + sum(prefix)
    slots = torch.randperm(total, generator=generator).split([n + p for n, p in zip(new, prefix, strict=True)])
    k, v = (torch.randn(total, kv_heads, width, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(sum(new), heads, width, generator=generator).bfloat16()
    batch = plan(Batch(new, prefix, slots))
    exact = reference.attention(q, k, v, batch, scale=width**-0.5)
    if bench.rehearsal:
        found, by = cpu.attention(q, k, v, batch, scale=width**-0.5), "the CPU's kernel"
    else:
        found, by = _flashinfer(q, k, v, new, prefix, slots), "FlashInfer"
    worst = error(found, exact)
    if worst > BOUND:
        raise AssertionError(f"{by}: error {worst:.4f}, bound {BOUND}")
    return f"{by}: error {worst:.4f}, bound {BOUND}"


def _flashinfer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    new: tuple[int, ...],
    prefix: tuple[int, ...],
    slots: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """As SGLang does it: the new tokens among themselves, then over the cached ones, then both merged."""
    import flashinfer

    heads, width, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty_like(workspace), "NHD")
    starts, before = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        for lengths in (new, prefix)
    )
    own = torch.cat([s[p:] for s, p in zip(slots, prefix, strict=True)])
    pages = torch.cat([s[:p] for s, p in zip(slots, prefix, strict=True)]).int().cuda()
    last = torch.ones(len(new), dtype=torch.int32, device="cuda")
    ragged.plan(starts, starts, heads, kv_heads, width, causal=True, q_data_type=q.dtype)
    paged.plan(starts, before, pages, last, heads, kv_heads, width, 1, causal=False, q_data_type=q.dtype)
    first = ragged.run(q.cuda(), k[own].cuda(), v[own].cuda(), return_lse=True)
    second = paged.run(q.cuda(), (k[:, None].cuda(), v[:, None].cuda()), return_lse=True)
    merged: torch.Tensor = flashinfer.merge_state(*first, *second)[0]
    return merged.cpu()


def serving(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """AsyncEP as a whole against stock SGLang."""
    yield "log-probabilities of AsyncEP and of stock SGLang", lambda: check_serving(bench, ())
    if not bench.rehearsal:
        pinned = ("--asyncep-transport", "pinned")
        yield "the same with experts in pinned host memory", lambda: check_serving(bench, pinned)


def check_serving(bench: Bench, flags: Sequence[str]) -> str:
    """Both servers, one after the other, on as many ranks as there are GPUs."""
    from gpu_models import here
    from gpu_serving import log_probabilities, prompts, stock_server

    from asyncep.local_server import local_server

    os.environ.pop("TRITON_INTERPRET", None)  # the servers' own kernels are not to be interpreted
    ranks = max(1, torch.cuda.device_count())
    model, vocabulary = bench.model, 10_000
    if not bench.rehearsal:
        model = here(bench.model)
    lengths = (5, 33, 200) if bench.rehearsal else (5, 33, 200, 1000, 4000)
    if bench.rehearsal:
        from models import QWEN3_TINY, random_qwen3

        model, vocabulary = str(random_qwen3("qwen3-tiny", QWEN3_TINY)), QWEN3_TINY["vocab_size"]
    batch = [prompt for n, length in enumerate(lengths) for prompt in prompts(2, length, vocabulary, shared=4, seed=n)]
    quiet = ["--skip-tokenizer-init", "--log-level", "error"]
    if model not in _STOCK:
        with stock_server(model, [*quiet, "--tp-size", str(ranks)]) as url:
            _STOCK[model] = log_probabilities(url, batch)
    exact = _STOCK[model]
    with local_server(model, [*quiet, *flags, "--dp-size", str(ranks)]) as url:
        found = log_probabilities(url, batch)
    apart = (found - exact).abs()
    detail = f"{Path(model).name}, {ranks} ranks, mean {apart.mean():.4f} nats (bound {MEAN_NATS}), "
    detail += f"most {apart.max():.4f} ({MOST_NATS})"
    if not (apart.mean() <= MEAN_NATS and apart.max() <= MOST_NATS):
        raise AssertionError(detail)
    return detail


PARTS = {"kernels": kernels, "arrival": arrival, "transport": transport, "attention": attention, "serving": serving}


def _not_run(why: str) -> Callable[[], str]:
    def check() -> str:
        raise NotRunError(why)

    return check


def perform(part: str, name: str, check: Callable[[], str]) -> Check:
    """Runs one check; whatever it raises is its outcome."""
    begin = time.perf_counter()
    try:
        outcome, detail = "passed", check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except NotRunError as reason:
        outcome, detail = "not run", str(reason)
    except Exception as raised:
        outcome, detail = "failed", f"{type(raised).__name__}: {raised}"
        traceback.print_exc()
    return Check(part, name, outcome, detail, time.perf_counter() - begin)


def markdown(bench: Bench, checks: list[Check]) -> str:
    """The report."""
    where = "rehearsal on a CPU: Triton's interpreter, a tiny model" if bench.rehearsal else _device_line()
    lines = [f"GPU check: {where}", "", "| part | check | outcome | detail | s |", "|---|---|---|---|---|"]
    for check in checks:
        detail = check.detail.replace("\n", " ").replace("|", "/")[:300]
        lines.append(f"| {check.part} | {check.name} | {check.outcome} | {detail} | {check.seconds:.1f} |")
    counts = {outcome: sum(check.outcome == outcome for check in checks) for outcome in ("passed", "failed", "not run")}
    return "\n".join([*lines, "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items())]) + "\n"


def _device_line() -> str:
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small sizes")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name, for serving")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_check: no GPU here; --rehearse goes through the script without one", file=sys.stderr)
        return 1
    architecture = "sm_90"
    if not options.rehearse and torch.cuda.get_device_capability()[0] == 8:
        architecture = "sm_80"
    bench = Bench("cpu" if options.rehearse else "cuda", architecture, options.model, options.rehearse)
    checks = []
    for part in options.parts:
        for name, check in PARTS[part](bench):
            checks.append(perform(part, name, check))
            print(f"{checks[-1].outcome:8} {part}: {name}: {checks[-1].detail[:300]}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "bench": "gpu_check",
        "machine": machine(),
        "rehearsal": options.rehearse,
        "checks": [*map(asdict, checks)],
    }
    (options.out / "gpu_check.json").write_text(json.dumps(record, indent=1))
    (options.out / "gpu_check.md").write_text(markdown(bench, checks))
    print(f"written: {options.out / 'gpu_check.md'}")
    return 1 if any(check.outcome == "failed" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
