"""FLOPs, bytes and least time of every kernel of one MoE layer, by model and device. Needs no GPU.

    python bench/gpu_roofline.py [--tokens 16384] [--sequence 1024] [--docs [--compiled FILE]]

`--docs` writes the tables into docs/results/gpu.md between the marks of this name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from gpu_models import MODELS

from asyncep_router.cost import ModelCost, read_shape
from asyncep_router.cost.devices import A100, DEVICES, H100, H200, Device, Number
from asyncep_router.cost.kernels import KernelCost, attention_kernel, gather_seconds, moe_kernels

DOCS = Path(__file__).parents[1] / "docs/results/gpu.md"
RANKS = 8
# Columns of the tables: where experts of the format are multiplied as such, or, on an A100, widened from e4m3.
SETTINGS: tuple[tuple[Device, Number], ...] = (
    (A100, Number.BF16),
    (A100, Number.INT8),
    (H100, Number.BF16),
    (H200, Number.BF16),
    (H100, Number.FP8),
    (H200, Number.FP8),
)


def layer_costs(model: str, tokens: int, sequence: int, number: Number) -> list[KernelCost]:
    """Attention, the rest outside the experts, and the experts' kernels, of one sparse layer."""
    shape = read_shape(MODELS[model])
    index = next(i for i, layer in enumerate(shape.layers) if layer.mlp.experts)
    layer = shape.layers[index]
    whole = ModelCost(shape)
    experts = moe_kernels(shape, layer, tokens, number)
    # Projections, the router and shared experts: the model's sum over layers without attention and routed experts.
    sparse = [each for each in shape.layers if each.mlp.experts]
    one = ModelCost(type(shape)(shape.model_type, shape.hidden, shape.vocab, shape.tied_head, (layer,)))
    dense_flops = one.linear_flops_per_token - whole.expert_flops_per_token / len(sparse)
    weights = (one.weight_bytes - one.expert_bytes) / 2 - shape.hidden * shape.vocab * (1 if shape.tied_head else 2)
    dense = KernelCost(
        "projections, shared", dense_flops * tokens, weights * 2 + 4 * tokens * shape.hidden, Number.BF16
    )
    return [attention_kernel(shape, layer, sequence, tokens // sequence), dense, *experts]


def kernel_table(model: str, tokens: int, sequence: int) -> Iterator[str]:
    """Lines of one model's table."""
    heads = [f"{device.name.split()[0]} {number.value}" for device, number in SETTINGS]
    yield "| kernel | GFLOP | MB bf16 | MB fp8 | " + " | ".join(f"{head} µs" for head in heads) + " |"
    yield "|---|---|---|---|" + "---|" * len(heads)
    by_number = {number: {c.name: c for c in layer_costs(model, tokens, sequence, number)} for number in Number}
    names = list(dict.fromkeys(name for number in (Number.INT8, Number.FP8) for name in by_number[number]))
    order = [
        "attention",
        "projections, shared",
        "permute",
        "quantize hidden",
        "gate-up, SiLU",
        "quantize product",
        "down",
    ]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    for name in names:
        costs = {number: by_number[number].get(name) for number in Number}
        flops = next(cost.flops for cost in costs.values() if cost)
        cells = [f"{flops / 1e9:.1f}" if flops else "-"]
        cells += [_cell(costs[number], 1e-6) for number in (Number.BF16, Number.FP8)]
        for device, number in SETTINGS:
            cost = costs[number]
            cells.append("-" if cost is None else f"{cost.seconds(device) * 1e6:.0f} {cost.bound(device)[0]}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    windows = {(device, number): window(model, tokens, sequence, device, number) for device, number in SETTINGS}
    yield "| **layer** | | | | " + " | ".join(f"**{windows[s] * 1e6:.0f}**" for s in SETTINGS) + " |"
    shape = read_shape(MODELS[model])
    layer = next(layer for layer in shape.layers if layer.mlp.experts)
    for place, title in enumerate((f"gather from {RANKS - 1} peers", "gather from the host")):
        times = [gather_seconds(shape, layer, number, device, RANKS)[place] for device, number in SETTINGS]
        yield f"| {title} | | | | " + " | ".join(f"{each * 1e6:.0f}" for each in times) + " |"
    hidden = [saturation_tokens(model, sequence, device, number) for device, number in SETTINGS]
    yield "| tokens that hide the peers' gather | | | | " + " | ".join(f"{each:,}" for each in hidden) + " |"


def _cell(cost: KernelCost | None, unit: float) -> str:
    return "-" if cost is None else f"{cost.bytes * unit:,.0f}"


def window(model: str, tokens: int, sequence: int, device: Device, number: Number) -> float:
    """Least seconds of one layer."""
    return sum(cost.seconds(device) for cost in layer_costs(model, tokens, sequence, number))


def saturation_tokens(model: str, sequence: int, device: Device, number: Number) -> int:
    """The least batch, in whole sequences, whose layer takes as long as the gather from the peers."""
    shape = read_shape(MODELS[model])
    layer = next(layer for layer in shape.layers if layer.mlp.experts)
    gather = gather_seconds(shape, layer, number, device, RANKS)[0]
    count = 1
    while window(model, count * sequence, sequence, device, number) < gather:
        count += 1
    return count * sequence


def document(tokens: int, sequence: int) -> str:
    """All tables as markdown."""
    parts = [
        f"One sparse layer, {tokens:,} tokens in sequences of {sequence:,}, even routing, nothing cached. Times are"
        " the least possible (c: bound by compute, m: by memory); the gather is for 8 ranks.",
    ]
    for model in MODELS:
        parts.append(f"\n**{model}**\n")
        parts.extend(kernel_table(model, tokens, sequence))
    rates = ", ".join(
        f"{d.name}: {d.products[Number.BF16] / 1e12:.0f} TFLOP/s bf16, {d.memory_bytes / 1e12:.2f} TB/s, "
        f"link {d.link_bytes / 1e9:.0f} GB/s, host {d.host_bytes / 1e9:.0f} GB/s"
        for d in DEVICES
    )
    parts.append(f"\nRates from data sheets: {rates}.")
    return "\n".join(parts) + "\n"


def insert(text: str, name: str, path: Path = DOCS) -> None:
    """Puts ``text`` between ``<!-- name -->`` and ``<!-- /name -->`` in a document."""
    before, begin, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise SystemExit(f"{path}: no marks <!-- {name} --> and <!-- /{name} -->")
    path.write_text(before + begin + text + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the batch")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a request")
    parser.add_argument("--docs", action="store_true", help="write into docs/results/gpu.md instead of printing")
    parser.add_argument("--compiled", type=Path, help="put this table, of `asyncep_kernels.aot --markdown`, there too")
    options = parser.parse_args()
    if options.compiled:
        insert(options.compiled.read_text(), "compiled")
    text = document(options.tokens, options.sequence)
    if options.docs:
        insert(text, "roofline")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
