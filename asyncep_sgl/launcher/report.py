"""The start-up report: what is served, by how many ranks, in how much memory. Text only."""

from __future__ import annotations

from asyncep_sgl.experts.store.messages import Status
from asyncep_sgl.process.host import format_bytes


def startup_report(status: Status, *, model: str, url: str, seconds: float) -> str:
    """A few lines for the terminal.

    Args:
        status: the expert store once every rank has loaded.
        model: what the operator asked for.
        url: where requests are answered.
        seconds: from the launch to the first answer.
    """
    lines = [f"asyncep: {model} ready in {seconds:.0f} s at {url}"]
    for rank in status.ranks:
        lines.append(
            f"  rank {rank.rank}: owns {rank.experts} experts, {format_bytes(rank.expert_bytes)}; "
            f"read {format_bytes(rank.bytes_read)} of them, left {format_bytes(rank.bytes_skipped)} to other ranks"
        )
    saved = (len(status.ranks) - 1) * status.expert_bytes
    lines.append(
        f"  experts on this host: {format_bytes(status.resident_bytes)} resident for {len(status.ranks)} rank(s); "
        f"{format_bytes(saved)} saved against a copy each"
    )
    for gather in status.gathers:
        lines.append(
            f"  rank {gather.rank}: gathers {gather.layers} layers of up to {format_bytes(gather.bytes_per_layer)}, "
            f"{gather.seconds * 1e3:.0f} ms each; T is {gather.threshold_flops / 1e9:.1f} GFLOPs a layer, "
            f"after the paper {gather.peak_threshold_flops / 1e9:.1f} ("
            f"peak {gather.gemm_flops_per_second / 1e9:.0f} GFLOP/s)"
        )
    return "\n".join(lines)
