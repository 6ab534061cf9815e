"""How fast on these GPUs: each kernel against its roofline, AsyncEP against stock SGLang's layouts.

    python bench/gpu_bench.py [--model MODEL] [--parts kernels serving] [--quick]
    python bench/gpu_bench.py --rehearse       the same script without a GPU; its figures mean nothing

Writes bench/out/gpu_bench.{md,json}. One GPU: the kernels, and AsyncEP beside stock SGLang on that one. Several:
also tensor and pipeline parallelism, expert parallelism, and data parallelism where the model fits one GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    # Before Triton is imported by anything: it decides then.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gpu_cases import Case, case, expected, run
from gpu_models import MODELS, here
from gpu_serving import prompts, stock_server, tokens_per_second
from records import OUT, Claim, write

from asyncep.local_server import local_server
from asyncep_kernels.moe.configs import SCHEMES, UNSUPPORTED
from asyncep_kernels.moe.quant import Format
from asyncep_router.cost import read_shape
from asyncep_router.cost.devices import A100, H100, H200, Device, Number
from asyncep_router.cost.kernels import moe_kernels

DEFAULT_MODEL = "Qwen/Qwen3-30B-A3B"
# The paper's strongest claim for a mix of requests, beside the best stock layout: what is wanted here.
WANTED = 1.3


@dataclass(frozen=True)
class Setting:
    """Where and how much."""

    rehearsal: bool
    quick: bool
    model: str
    device: Device
    gpus: int

    @property
    def where(self) -> str:
        """For torch."""
        return "cpu" if self.rehearsal else "cuda"


def this_device() -> Device:
    """The data sheet of the GPU here, by its name; an H100's for one that is not listed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((device for device in (A100, H200) if device.name.split()[0] in name), H100)


def kernels(setting: Setting) -> list[dict[str, Any]]:
    """One layer of every model and scheme: seconds, share of the roofline, and torch's own operators beside it."""
    found = []
    models = MODELS if not setting.quick else {name: MODELS[name] for name in ("Qwen3-30B-A3B",)}
    batches = (16384, 2048) if not setting.rehearsal else (24,)
    for model, config in models.items():
        shape = read_shape(config)
        layer = next(layer for layer in shape.layers if layer.mlp.experts)
        for name, scheme in SCHEMES.items():
            if (setting.device.architecture, name) in UNSUPPORTED:
                continue
            size = {
                "hidden": shape.hidden,
                "inter": layer.mlp.expert_width,
                "experts": layer.mlp.experts,
                "top_k": layer.mlp.top_k,
            }
            if setting.rehearsal:
                size = {"hidden": 64, "inter": 32, "experts": 4, "top_k": 2}
            number = {Format.FP8: Number.FP8, Format.INT8: Number.INT8}.get(scheme.weights, Number.BF16)
            for tokens in batches:
                work = case(scheme, tokens=tokens, device=setting.where, seed=0, **size)
                mine, torchs = (clock(setting, call) for call in (lambda w=work: run(w), lambda w=work: plain_torch(w)))
                # Widened weights travel narrow and are multiplied in bf16: the roofline of that is the slower one.
                costs = moe_kernels(shape, layer, tokens, number if scheme.activations else Number.BF16)
                least = sum(cost.seconds(setting.device) for cost in costs)
                flops = sum(cost.flops for cost in costs)
                found.append(
                    {
                        "model": model,
                        "scheme": name,
                        "tokens": tokens,
                        "seconds": mine,
                        "roofline_seconds": least,
                        "torch_seconds": torchs,
                        "tflops": flops / mine / 1e12,
                    }
                )
                print(f"{model} {name} {tokens}: {mine * 1e3:.3f} ms, roofline {least * 1e3:.3f}", flush=True)
                del work
    return found


def plain_torch(work: Case) -> torch.Tensor:
    """The layer out of torch's operators; in bf16 as a model's own code would, else as `expected`."""
    if work.scheme.weights is not Format.PLAIN:
        return expected(work)
    w13, w2 = work.experts.entries()
    out = torch.zeros_like(work.hidden)
    for expert in range(len(w13)):
        token, k = (work.ids == expert).nonzero(as_tuple=True)
        gate, up = (work.hidden[token] @ w13[expert].T).chunk(2, dim=1)
        result = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out.index_add_(0, token, result * work.weights[token, k, None].to(result.dtype))
    return out


def clock(setting: Setting, call: Callable[[], torch.Tensor]) -> float:
    """Median seconds of a call."""
    warm, turns = (0, 1) if setting.rehearsal else (5, 7 if setting.quick else 25)
    times = []
    for turn in range(warm + turns):
        if not setting.rehearsal:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if not setting.rehearsal:
            torch.cuda.synchronize()
        if turn >= warm:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def layouts(setting: Setting) -> Iterator[tuple[str, Callable[[str, Sequence[str]], AbstractContextManager[str]]]]:
    """What serves: name, and a context that yields a URL for a model and common flags."""
    n = str(setting.gpus)
    yield "AsyncEP", lambda model, flags: local_server(model, [*flags, "--dp-size", n])
    if not setting.rehearsal:
        pinned = ["--asyncep-transport", "pinned"]
        yield "AsyncEP, pinned host memory", lambda model, flags: local_server(model, [*flags, *pinned, "--dp-size", n])
    yield f"stock TP{n}", lambda model, flags: stock_server(model, [*flags, "--tp-size", n])
    if setting.gpus > 1:
        yield f"stock PP{n}", lambda model, flags: stock_server(model, [*flags, "--pp-size", n])
        ep = ["--tp-size", n, "--ep-size", n, "--dp-size", n, "--enable-dp-attention"]
        yield f"stock attention DP{n}, EP{n}", lambda model, flags: stock_server(model, [*flags, *ep])
        yield f"stock DP{n}", lambda model, flags: stock_server(model, [*flags, "--dp-size", n])


def serving(setting: Setting) -> list[dict[str, Any]]:
    """Prompt tokens per second of each layout on the same requests; a layout that does not start says why."""
    model, vocabulary = setting.model, 100_000
    loads = {"short": (256, 0), "long": (4096, 0), "shared prefix": (2048, 1536)}
    os.environ.pop("TRITON_INTERPRET", None)  # the servers' own kernels are not to be interpreted
    count, clients = (512, 64 * setting.gpus) if not setting.quick else (128, 64 * setting.gpus)
    if setting.rehearsal:
        from models import QWEN3_TINY, random_qwen3

        model, vocabulary = str(random_qwen3("qwen3-tiny", QWEN3_TINY)), QWEN3_TINY["vocab_size"]
        loads, count, clients = {"short": (32, 0), "shared prefix": (64, 48)}, 8, 2
    else:
        model = here(model)
    found = []
    for name, start in layouts(setting):
        row: dict[str, Any] = {"layout": name}
        try:
            with start(model, ["--skip-tokenizer-init", "--log-level", "error"]) as url:
                tokens_per_second(url, prompts(clients, 64, vocabulary, seed=99), clients=clients)
                for load, (length, shared) in loads.items():
                    batch = prompts(count, length, vocabulary, shared=shared, seed=length)
                    row[load] = tokens_per_second(url, batch, clients=clients)
        except Exception as raised:
            row["error"] = f"{type(raised).__name__}: {raised}"[:300]
        print(row, flush=True)
        found.append(row)
    return found


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """AsyncEP over the best stock layout, each load."""
    mine, others = rows[0], [row for row in rows if row["layout"].startswith("stock") and "error" not in row]
    if "error" in mine or not others:
        return []
    return [
        Claim(f"AsyncEP over the best stock layout, {load}", mine[load] / max(row[load] for row in others), WANTED, "x")
        for load in mine
        if load != "layout"
    ]


def markdown(setting: Setting, kernel_rows: list[dict[str, Any]], serving_rows: list[dict[str, Any]]) -> str:
    """The report."""
    where = f"{setting.gpus} x {torch.cuda.get_device_name()}" if not setting.rehearsal else "rehearsal, figures void"
    lines = [f"GPU bench: {where}", ""]
    if kernel_rows:
        lines += ["| model | scheme | tokens | ms | roofline | torch, x | TFLOP/s |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row['model']} | {row['scheme']} | {row['tokens']} | {row['seconds'] * 1e3:.2f} "
            f"| {row['roofline_seconds'] / row['seconds']:.0%} | {row['torch_seconds'] / row['seconds']:.1f} "
            f"| {row['tflops']:.0f} |"
            for row in kernel_rows
        ]
        lines.append("")
    if serving_rows:
        loads = list(dict.fromkeys(key for row in serving_rows for key in row if key not in ("layout", "error")))
        lines += ["| tokens/s | " + " | ".join(loads) + " |", "|---" * (len(loads) + 1) + "|"]
        for row in serving_rows:
            cells = [f"{row[load]:,.0f}" if load in row else "-" for load in loads]
            problem = " (" + row["error"].splitlines()[0].replace("|", "/") + ")" if "error" in row else ""
            lines.append(f"| {row['layout']}{problem} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small sizes")
    parser.add_argument("--parts", nargs="+", choices=("kernels", "serving"), default=["kernels", "serving"])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name, for serving")
    parser.add_argument("--quick", action="store_true", help="one model's kernels, fewer requests")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_bench: no GPU here; --rehearse goes through the script without one", file=sys.stderr)
        return 1
    gpus = max(1, torch.cuda.device_count())
    setting = Setting(options.rehearse, options.quick or options.rehearse, options.model, this_device(), gpus)
    kernel_rows = kernels(setting) if "kernels" in options.parts else []
    serving_rows = serving(setting) if "serving" in options.parts else []
    name = "gpu_bench_rehearsal" if options.rehearse else "gpu_bench"
    raw = {"kernels": kernel_rows, "serving": serving_rows, "device": setting.device.name, "gpus": gpus}
    path = write(name, seed=0, raw=raw, claims=claims(serving_rows) if serving_rows and not options.rehearse else [])
    report = Path(OUT, f"{name}.md")
    report.write_text(markdown(setting, kernel_rows, serving_rows))
    print(f"written: {report}, {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
