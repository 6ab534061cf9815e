"""What the command line of ``asyncep serve`` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncep_router.keys import Keys
from asyncep_sgl.config.front import FrontOptions
from asyncep_sgl.config.run import Saving

Decode = Literal["refuse", "allow"]
Kernels = Literal["ours", "sglang"]
Transport = Literal["auto", "cuda", "pinned"]


@dataclass(frozen=True)
class ServeOptions:
    """What the launcher itself has to know.

    Attributes:
        model: checkpoint folder or hub name.
        ranks: scheduler processes sharing the experts.
        host, port: where the front listens.
        store_limit: bytes the expert store may take, or None.
        expert_memory: bytes of experts to keep, the others staying on disk, or None.
        threshold_tokens, max_wait_seconds, log_decisions: the router's, see `RouterConfig`.
        grace_seconds: how long a stop waits for requests in flight.
        decode: what to do with requests that would decode.
        kernels: whose kernels compute.
        transport: where GPUs' experts lie, see `cuda_serving`.
        strategy: how experts and tokens come together; None is what the other flags ask for.
        nodes, node, rendezvous: hosts that share the experts, which of them this is, ``host:port`` of node 0.
        copies, resident_layers, resident_experts, gather_depth, margin, verify, patience_seconds: the group's, see
            `GroupConfig`.
        kv_free: no prefix is kept from one batch to the next.
        log_gathers: write a line for each batch that gathered.
        without: savings of processor time to leave out.
        batch_folder: where the Batch API keeps its state; None for the default.
        keys: of clients and of the administrator.
        front: bounds on what clients may ask.
        file_bytes, file_days, disk_floor: what its files may take, see `asyncep_sgl.front.batches.bounds.Bounds`.
        passed: SGLang's own flags as the user gave them, the above excluded.
    """

    model: str
    ranks: int
    host: str
    port: int
    dtype: str
    revision: str | None
    device: str | None
    store_limit: int | None
    expert_memory: int | None
    threshold_tokens: int
    max_wait_seconds: float
    log_decisions: bool
    grace_seconds: float
    decode: Decode
    kernels: Kernels
    transport: Transport
    strategy: str | None
    nodes: int
    node: int
    rendezvous: str
    copies: int
    resident_layers: int
    resident_experts: int
    gather_depth: int | None
    margin: float
    verify: bool
    patience_seconds: float
    kv_free: bool
    log_gathers: bool
    without: tuple[Saving, ...]
    batch_folder: str | None
    keys: Keys
    front: FrontOptions
    file_bytes: int
    file_days: int
    disk_floor: int | None
    passed: tuple[str, ...]
