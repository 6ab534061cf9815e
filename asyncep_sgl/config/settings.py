"""What the command line sets, by subject. Each flag is declared here and nowhere else."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

from asyncep_sgl.config.flags import Mode, setting

Decode = Literal["refuse", "allow"]
Kernels = Literal["ours", "sglang"]
Transport = Literal["auto", "cuda", "pinned"]
# Optimisations that can be switched off to measure them (``--asyncep-without``). Results do not change.
Saving = Literal[
    "direct-replies", "batch-tokenization", "rare-collections", "joined-events", "no-access-log", "fork-ahead"
]
GATHERING: tuple[Mode, ...] = ("hosts", "disk", "cuda", "pinned")


def parse_savings(text: str) -> tuple[Saving, ...]:
    """The savings of a list such as ``direct-replies,batch-tokenization``, or of ``all``.

    Raises:
        argparse.ArgumentTypeError: there is no such saving.
    """
    known: tuple[Saving, ...] = get_args(Saving)
    names = known if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}, all")
    return tuple(saving for saving in known if saving in names)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a server computes and ends."""

    store_limit: int | None = setting(
        None,
        "SIZE",
        "most memory the shared experts may take, such as 64GiB",
        shown="what is free",
        only=("memory", "hosts", "disk", "pinned"),
    )
    kv_free: bool = setting(
        False,
        "",
        "keep no prefix from one batch to the next; the KV cache holds one longest prompt and one batch; for prompts "
        "that have nothing in common",
    )
    decode: Decode = setting(
        "refuse",
        "",
        "requests that would decode: refuse answers 400, allow serves them as SGLang does",
        choices=get_args(Decode),
    )
    kernels: Kernels = setting(
        "ours",
        "",
        "whose kernels compute experts and attention: ours are faster, sglang's give the bits of stock SGLang",
        choices=get_args(Kernels),
    )
    transport: Transport = setting(
        "auto",
        "",
        "on GPUs: cuda keeps a part of the experts in each GPU and gathers the rest from the others, pinned keeps them "
        "in host memory; auto: cuda if the GPUs together have room for all experts, else pinned; not run on a GPU yet",
        choices=get_args(Transport),
        only=("gpu", "cuda", "pinned"),
    )
    strategy: str | None = setting(
        None,
        "NAME",
        "how experts and tokens come together: replicated (this host's memory has all experts), asyncep (each host or "
        "GPU keeps a part and gathers the rest ahead of the computation), ep (each host keeps a part; tokens go to the "
        "hosts that have their experts), auto (each host keeps a part; weights or tokens travel, whichever is faster), "
        "or MODULE:CLASS of your own (docs/internals/strategies.md)",
        shown="auto with several hosts; asyncep with several GPUs, --asyncep-expert-memory or a GPU too small; else "
        "replicated",
    )
    idle_ranks: Literal["help", "rest"] = setting(
        "help",
        "",
        "ranks that compute no batch, where each has CPUs of its own and our C kernels serve: help lets them compute a "
        "part of another rank's experts and attention, so that a lone prompt takes less time, with the same answers; "
        "rest leaves them idle",
        choices=("help", "rest"),
        only=("memory",),
    )
    threshold_tokens: int = setting(
        2048,
        "N",
        "a batch has at least the FLOPs of one prompt of N tokens: T if that is more and ranks gather, SGLang's chunk "
        "if that is more on GPUs. The router gives each rank up to two batches",
        least=1,
    )
    without: tuple[Saving, ...] = setting(
        (),
        "NAMES",
        f"optimisations to switch off in order to measure them: {', '.join(get_args(Saving))}, with commas between, or "
        "all (docs/internals/cpu_kernels.md). Results do not change",
        kind=parse_savings,
    )
    grace_seconds: float = setting(
        10.0,
        "S",
        "seconds that requests in flight may take after Ctrl-C, SIGTERM or SIGHUP; a second signal ends the server at "
        "once",
        name="--shutdown-grace-period-secs",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """The router inside the engine."""

    max_wait_ms: float = setting(
        0.0,
        "MS",
        "while every rank is idle, hold requests for so long until a batch is there; 0 sends at once",
        least=0,
    )
    log_decisions: bool = setting(False, "", "log each routing decision as a JSON line")

    @property
    def max_wait_seconds(self) -> float:
        """`max_wait_ms` in seconds."""
        return self.max_wait_ms / 1000


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Experts that are not all in memory which every rank reads: hosts that share them, or layers on disk."""

    nodes: int = setting(1, "N", "hosts that share the experts, on CPUs only", name="--nnodes", least=1)
    node: int = setting(0, "I", "number of this host, from 0 to N-1 of --nnodes", name="--node-rank")
    rendezvous: str = setting(
        "",
        "HOST:PORT",
        "address of the host with --node-rank 0 that every host can reach; hosts may start in any order",
        name="--dist-init-addr",
    )
    copies: int = setting(
        1,
        "N",
        "hosts that keep each expert; with 2 or more, requests go on within seconds when a host is lost",
        name="--asyncep-copies",
        least=1,
        only=("hosts",),
    )
    memory_limit: int | None = setting(
        None,
        "SIZE",
        "bytes of experts to keep in memory (on GPUs: on each GPU); for each batch a rank reads the other layers from "
        "the checkpoint (on GPUs: from pinned host memory), ahead of the computation; for models larger than memory",
        name="--asyncep-expert-memory",
        least=0,
        shown="keep all",
        only=("disk", "pinned"),
    )
    resident_layers: int = setting(
        1, "N", "MoE layers, from the first, that every host or GPU keeps whole", least=0, only=("hosts", "cuda")
    )
    resident_experts: int = setting(
        0,
        "N",
        "experts of each remaining layer that a host keeps beyond its share, or beyond --asyncep-expert-memory; a rank "
        "gathers N fewer",
        least=0,
        only=("hosts", "disk"),
    )
    gather_depth: int | None = setting(
        None,
        "N",
        "slots of gathered layers in each rank; 1 overlaps with attention only",
        kind=int,
        least=1,
        shown="2; 4 from pinned memory",
        only=GATHERING,
    )
    margin: float = setting(
        1.2,
        "GAMMA",
        "T is the FLOPs that compute this many times as long as a gather takes; below 1 ranks wait for gathers",
        above=0,
        only=GATHERING,
    )
    verify: Literal["every", "off"] = setting(
        "every",
        "",
        "every: compare each gathered expert with its owner's digest; off: trust the link",
        choices=("every", "off"),
        only=("hosts",),
    )
    patience_seconds: float = setting(
        30.0,
        "S",
        "how long requests wait for a host that went away before they get a 503",
        name="--asyncep-patience-secs",
        least=0,
        only=("hosts",),
    )
    log_gathers: bool = setting(False, "", "log each batch's gathers as a JSON line", only=GATHERING)


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The Batch API's files; `asyncep_sgl.front.batches.bounds.Bounds` says what they do."""

    folder: str = setting(
        "",
        "DIR",
        "where /v1/files and /v1/batches keep their state",
        name="--asyncep-batch-dir",
        shown="$XDG_STATE_HOME/asyncep/batches/PORT",
    )
    file_bytes: int = setting(
        20 * 10**9,
        "SIZE",
        "most bytes of all files in /v1/files together; a caller of --api-key-file may have less",
        name="--asyncep-file-quota",
        least=0,
        shown="20GB",
    )
    file_days: int = setting(
        30, "N", "days after which files and ended batches are forgotten; 0 keeps them", least=0, most=36500
    )
    disk_floor: int | None = setting(
        None,
        "SIZE",
        "space on the disk of --asyncep-batch-dir that files and batches leave free",
        least=0,
        shown="1GB, or a twentieth of a smaller disk",
    )
