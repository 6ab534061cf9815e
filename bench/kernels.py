"""Our CPU kernels against what stock SGLang does, in turn, one thread.

    python bench/kernels.py [--quick]

Routing is drawn anew for every call of the MoE and nothing else is cached between calls but what an engine would
keep. Times are medians; "of GEMM" is the time of the MoE's matrix products alone, in equal parts, over ours.
Writes `bench/out/kernels.json`, the quick mode `kernels-quick.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from records import Claim, write
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn import functional as F

from asyncep_kernels.attention import cpu as attention
from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.attention.plan import plan
from asyncep_kernels.moe import cpu as moe
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.norm import cpu as norm
from asyncep_kernels.norm import reference as norm_reference
from asyncep_kernels.workspace import Workspace

SEED = 0
HIDDEN, INTER, EXPERTS, TOP_K = 512, 384, 32, 4
HEADS, KV_HEADS, DIM = 8, 4, 64
BF16 = torch.bfloat16

Sides = dict[str, Callable[[], Any]]


def in_turn(sides: Sides, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each side: median, least, most. The first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def moe_case(tokens: int, skew: float, rounds: int) -> dict[str, Any]:
    """The MoE of the 147M model."""
    w13, w2 = torch.randn(EXPERTS, 2 * INTER, HIDDEN) * 0.05, torch.randn(EXPERTS, HIDDEN, INTER) * 0.05
    table, workspace = ExpertTable(w13.to(BF16), w2.to(BF16)), Workspace()
    x, preference = torch.randn(tokens, HIDDEN).to(BF16), torch.randn(EXPERTS) * skew
    rows = max(1, tokens * TOP_K // EXPERTS)
    part, inner = torch.randn(rows, HIDDEN).to(BF16), torch.randn(rows, INTER).to(BF16)
    gate_up, down = torch.empty(rows, 2 * INTER, dtype=BF16), torch.empty(rows, HIDDEN, dtype=BF16)

    def routing() -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = (torch.randn(tokens, EXPERTS) + preference).softmax(-1).topk(TOP_K)
        return ids.int(), weights / weights.sum(-1, keepdim=True)

    current = [routing()]

    def gemm() -> None:
        current[0] = routing_next.pop() if routing_next else current[0]
        for expert in range(EXPERTS):
            torch.mm(part, table.w13[expert].t(), out=gate_up)
            torch.mm(inner, table.w2[expert].t(), out=down)

    # Drawn before the clock runs.
    routing_next = [routing() for _ in range(rounds + 1)]
    sides: Sides = {
        "gemm": gemm,
        "ours": lambda: moe.moe(x, *current[0], table, workspace=workspace),
        "stock": lambda: stock_moe(x, *current[0], table),
    }
    found = in_turn(sides, rounds)
    return {"tokens": tokens, "skew": skew, "ms": found, "of_gemm": found["gemm"]["median"] / found["ours"]["median"]}


def stock_moe(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, table: ExpertTable) -> torch.Tensor:
    """SGLang's `moe_forward_native` for SiLU without biases, statement by statement; itself it needs a server."""
    counts = ids.new_zeros((ids.shape[0], EXPERTS))
    counts.scatter_(1, ids.to(torch.int64), 1)
    order = ids.reshape(-1).argsort()
    tokens = x[order // ids.shape[1]]
    outputs, start = [], 0
    for expert, count in enumerate(counts.sum(dim=0).tolist()):
        if count == 0:
            continue
        gate_up = F.linear(tokens[start : start + count], table.w13[expert])
        outputs.append(F.linear(F.silu(gate_up[..., :INTER]) * gate_up[..., INTER:], table.w2[expert]))
        start += count
    joined = torch.cat(outputs)
    restored = torch.empty_like(joined)
    restored[order] = joined
    weighted = restored.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1))
    return weighted.sum(dim=1).type(x.dtype)


def attention_case(name: str, new: list[int], prefix: list[int], shared: int, rounds: int) -> dict[str, Any]:
    """Prefill attention of the 147M model; every sequence shares its first ``shared`` tokens."""
    lengths = [n + p for n, p in zip(new, prefix, strict=True)]
    slots = torch.zeros(len(new), max(lengths), dtype=torch.int32)
    used = shared
    for row, length in zip(slots, lengths, strict=True):
        row[:shared] = torch.arange(shared)
        row[shared:length] = torch.arange(used, used + length - shared)
        used += length - shared
    q = torch.randn(sum(new), HEADS, DIM).to(BF16)
    k, v = (torch.randn(used, KV_HEADS, DIM).to(BF16) for _ in range(2))
    fresh = torch.cat([row[p:length] for row, p, length in zip(slots, prefix, lengths, strict=True)])
    new_kv, workspace, out = (k[fresh], v[fresh]), Workspace(), torch.empty_like(q)
    batch = Batch(new, prefix, [row[:length] for row, length in zip(slots, lengths, strict=True)])
    work, stock = plan(batch), object.__new__(TorchNativeAttnBackend)
    index = torch.arange(len(new))
    found = in_turn(
        {
            "ours": lambda: attention.attention(q, k, v, work, scale=0.125, new_kv=new_kv, workspace=workspace),
            "stock": lambda: stock._run_sdpa_forward_extend(
                *(q, out, k, v, slots, index, torch.tensor(lengths), torch.tensor(prefix), torch.tensor(new)),
                scaling=0.125,
                enable_gqa=True,
                causal=True,
            ),
            "plan": lambda: plan(batch),
        },
        rounds,
    )
    flops = sum(4 * HEADS * DIM * (n * p + n * n / 2) for n, p in zip(new, prefix, strict=True))
    return {"name": name, "ms": found, "gflops": flops / found["ours"]["median"] / 1e6}


def norm_case(rows: int, width: int, rounds: int) -> dict[str, Any]:
    """RMSNorm with a residual. The reference is what SGLang does, statement by statement."""
    x, residual = (torch.randn(rows, width).to(BF16) for _ in range(2))
    weight, workspace = torch.rand(width).to(BF16), Workspace()
    sides: Sides = {
        "ours": lambda: norm.rms_norm(x, weight, 1e-6, residual, workspace=workspace),
        "stock": lambda: norm_reference.rms_norm(x, weight, 1e-6, residual),
    }
    return {"rows": rows, "width": width, "ms": in_turn(sides, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no long contexts: under a minute")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 15
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    found: dict[str, Any] = {"rounds": rounds}
    claims: list[Claim] = []

    def show(label: str, case: dict[str, Any], rest: str = "") -> None:
        ms = case["ms"]
        gain = ms["stock"]["median"] / ms["ours"]["median"]
        claims.append(Claim(f"{label}, times as fast as stock", gain, 1.0, "ratio"))
        print(
            f"{label:44s} ours {ms['ours']['median']:8.2f} ms [{ms['ours']['min']:.2f}, {ms['ours']['max']:.2f}]"
            f"  stock {ms['stock']['median']:8.2f}  x{gain:.2f}  {rest}",
            flush=True,
        )

    found["moe"] = []
    for tokens, skew in ((64, 0.0), (512, 0.0), (4096, 0.0), (4096, 1.5)):
        case = moe_case(tokens, skew, rounds)
        found["moe"].append(case)
        show(f"moe {tokens} tokens{', skewed' if skew else ''}", case, f"{100 * case['of_gemm']:.0f} % of GEMM")
    shapes: list[tuple[str, list[int], list[int], int]] = [
        ("8 x 512", [512] * 8, [0] * 8, 0),
        ("32 x 128", [128] * 32, [0] * 32, 0),
        ("64 x 64", [64] * 64, [0] * 64, 0),
        ("256 x 16", [16] * 256, [0] * 256, 0),
        ("16 ragged up to 512", [(i * 197) % 509 + 4 for i in range(16)], [0] * 16, 0),
        ("1 x 4096", [4096], [0], 0),
        ("16 x 128 on prefix 384", [128] * 16, [384] * 16, 0),
        ("16 x 128 on one prefix of 384", [128] * 16, [384] * 16, 384),
        ("32 x 16 on one prefix of 1024", [16] * 32, [1024] * 32, 1024),
    ]
    if not quick:
        shapes += [("1 x 16000", [16000], [0], 0), ("4 x 64 on prefix 8000", [64] * 4, [8000] * 4, 0)]
    found["attention"] = []
    for name, new, prefix, shared in shapes:
        case = attention_case(name, new, prefix, shared, 1 if max(prefix + new) > 5000 else rounds)
        found["attention"].append(case)
        show(f"attention {name}", case, f"{case['gflops']:.0f} GFLOP/s")
    found["norm"] = [norm_case(*shape, rounds) for shape in ((4096, 512), (32768, 64))]
    for case in found["norm"]:
        show(f"rms_norm {case['rows']} x {case['width']}", case)
    print(write("kernels-quick" if quick else "kernels", seed=SEED, raw=found, claims=claims))


if __name__ == "__main__":
    main()
