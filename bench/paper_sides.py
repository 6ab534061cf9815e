"""The layouts that bench/paper.py sets side by side, each over the same two emulated hosts of one core each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emulation.group import GroupServer, group
from emulation.layouts import layout
from emulation.two_hosts import Hosts
from router_sides import Side as RouterSide
from router_sides import router

KV_TOKENS = 65_536
PAGE = 16
# Tokens of a batch at most. AsyncEP cuts at T; the others are given what was fastest here for each (`--chunk`).
WHOLE = 16_384


@dataclass(frozen=True)
class Side:
    """One layout.

    Attributes:
        name: in tables.
        strategy: what the simulator calls it.
        kernels: ``ours`` or ``sglang``.
        flags: of the servers.
        chunk: tokens of a batch (``--chunked-prefill-size``).
        spanning: one server over both hosts; False for one a host with our router in front.
        group: of AsyncEP: the hosts share one set of experts. False for replicated DP.
        router: flags of the router.
        lanes: batches of its own that each of the ranks computes at the same time as the others.
        in_flight: requests at a time with which every step is one prompt a lane: those computed and the next ones.
    """

    name: str
    strategy: str
    kernels: str = "ours"
    flags: tuple[str, ...] = ()
    chunk: int = WHOLE
    spanning: bool = True
    group: bool = False
    router: tuple[str, ...] = ()
    lanes: int = 1
    in_flight: int = 2


# Each host has one rank, and the router in front knows it: without --nnodes it would have another one on the host.
_NO_ROUTER = ("--load-balance-method", "round_robin")
_COMPANY = ("--max-wait-ms", "200")
_PP = ("--pp-size", "2")
_TP = ("--tp-size", "2")
_EP = ("--tp-size", "2", "--ep-size", "2")
_DP_EP = (*_EP, "--dp-size", "2", "--enable-dp-attention")

# No layer is kept whole: hosts then hold exactly half of the experts, and the simulator gathers all layers too. A core
# that copies what comes computes less meanwhile, so twice T is a little faster than T (the ablation shows it). A batch
# of one short prompt takes as long as all of its gathers, more than a second: the first of many waits for company.
ASYNCEP = Side(
    "AsyncEP, one-sided",
    "asyncep",
    flags=("--asyncep-resident-layers", "0", "--asyncep-margin", "2.4"),
    router=_COMPANY,
    spanning=False,
    group=True,
    lanes=2,
    in_flight=4,
)
# For bench/calls.py: rows travel, and whichever is faster. Nobody waits for company.
_HALVES = ("--asyncep-resident-layers", "0")
CALLS = (
    replace(ASYNCEP, name="ep", strategy="ep", flags=(*_HALVES, "--asyncep-strategy", "ep"), router=()),
    replace(ASYNCEP, name="auto", strategy="auto", flags=(*ASYNCEP.flags, "--asyncep-strategy", "auto"), router=()),
)
SIDES = (
    ASYNCEP,
    Side(
        "DP-2, experts twice",
        "replicated",
        flags=_NO_ROUTER,
        spanning=False,
        router=("--threshold-tokens", "2048"),
        lanes=2,
        in_flight=4,
    ),
    Side("TP-2", "tp", flags=_TP, chunk=4096),
    Side("PP-2", "pp", flags=_PP, chunk=2048, in_flight=3),
    Side("EP-2", "ep", flags=_EP, chunk=4096),
    # Upstream divides the chunk by the ranks that attend.
    Side("DP-attention + EP-2", "dp-ep", flags=_DP_EP, chunk=8192, lanes=2, in_flight=4),
    Side("TP-2, stock kernels", "tp", kernels="sglang", flags=_TP, chunk=4096),
    Side("PP-2, stock kernels", "pp", kernels="sglang", flags=_PP, chunk=2048, in_flight=3),
)
# AsyncEP by an all-gather is not among them: a collective needs every rank in every layer of every pass, so an idle
# rank would have to be made to run passes of nothing, which SGLang does for none of its seams. It is simulated.


def variants(threshold_tokens: int) -> list[Side]:
    """AsyncEP with one thing changed. `threshold_tokens`: T, as the unchanged one measured it."""
    out = [replace(ASYNCEP, name="unchanged")]
    out += [
        replace(ASYNCEP, name=name, flags=(*ASYNCEP.flags, "--asyncep-gather-depth", str(depth)))
        for name, depth in (("depth 1: overlaps with attention alone", 1), ("depth 3", 3))
    ]
    out += [
        replace(ASYNCEP, name=f"without {rule}: {what}", router=(*_COMPANY, "--without-rules", rule))
        for rule, what in (("F1", "longest prefix"), ("F2", "net FLOPs"), ("F3", "fill to T"))
    ]
    out.append(replace(ASYNCEP, name="no waiting for company", router=()))
    out.append(replace(ASYNCEP, name="router: round robin", router=("--policy", "round_robin")))
    # A target that no batch reaches leaves the cut to SGLang's count of tokens, whole pages of them.
    tokens = max(128, threshold_tokens // PAGE * PAGE)
    cut = ("--asyncep-threshold-tokens", str(1 << 24), "--chunked-prefill-size", str(tokens))
    out.append(replace(ASYNCEP, name="batches of T tokens, not FLOPs", flags=(*ASYNCEP.flags, *cut)))
    out += [
        replace(
            ASYNCEP,
            name=f"{factor:g} T",
            flags=(*ASYNCEP.flags, "--asyncep-margin", f"{1.2 * factor:g}", "--asyncep-threshold-tokens", "1"),
        )
        for factor in (0.25, 0.5, 1, 2, 4)
    ]
    return out


@dataclass
class Running:
    """A side that takes requests. `url`: where. `members`: each host's own server where there are two.
    `gathers`: of AsyncEP, what reads its batches and state."""

    url: str
    members: Sequence[str]
    gathers: Sequence[GroupServer] = ()


def server_flags(side: Side) -> list[str]:
    """SGLang's flags; a side's own come last and win."""
    prefill = max(WHOLE, side.chunk)
    common = ["--chunked-prefill-size", str(side.chunk), "--max-prefill-tokens", str(prefill)]
    # SGLang would keep memory free for a GPU's graphs in proportion to the chunk.
    common += ["--mem-fraction-static", "0.8"]
    return [*common, "--max-total-tokens", str(KV_TOKENS), "--page-size", str(PAGE), "--log-level", "info", *side.flags]


@contextlib.contextmanager
def running(side: Side, hosts: Hosts, model: Path, environment: Mapping[str, str]) -> Iterator[Running]:
    """The side's servers, and its router if it has one, ready and empty.

    Raises:
        RuntimeError: it did not become ready.
    """
    flags = server_flags(side)
    if side.spanning:
        with layout(hosts, model, flags, spanning=True, kernels=side.kernels, environment=environment) as urls:
            yield Running(urls[0], urls[:1])
        return
    with group(hosts, model, *flags, divided=side.group, environment=environment) as servers:
        urls = [server.url for server in servers]
        with router(RouterSide(side.name, side.router, "ours"), urls, None) as url:
            yield Running(url, urls, servers if side.group else ())
