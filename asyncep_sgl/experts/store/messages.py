"""What a process says to the owner of the expert store, and what it hears. No transport in here."""

from __future__ import annotations

import msgspec


class TensorSpec(msgspec.Struct, frozen=True):
    """One layer's expert tensor, all experts: ``shape[0]`` counts experts.

    Attributes:
        layer: index of the decoder layer.
        name: parameter name within the layer, such as ``w13_weight``.
        shape: ``(experts, ...)``.
        dtype: torch's name of it without the prefix, such as ``bfloat16``.
        nbytes: bytes of the whole tensor.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Hello(msgspec.Struct, tag=True, frozen=True):
    """First word of a process: the launcher watches ``pid`` from now on.

    ``role``: ``front``, ``controller``, ``detokenizer``, ``rank``, or that of a strategy's side process.
    """

    role: str
    pid: int
    rank: int = -1


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """``shard_present``: this rank's experts already lie in the store, so none need reading."""

    shard_present: bool = False


class Allocate(msgspec.Struct, tag=True, frozen=True):
    """Asks for the memory of one tensor; the first to ask makes it exist.

    ``held``: the experts that this host keeps, as (start, stop) pairs; pages of the others are never made.
    """

    spec: TensorSpec
    held: tuple[tuple[int, int], ...]


class Placed(msgspec.Struct, tag=True, frozen=True):
    """A rank keeps ``experts`` of a tensor, ``nbytes``, on its device; the launcher has a descriptor of it."""

    rank: int
    spec: TensorSpec
    experts: int
    nbytes: int


class Segment(msgspec.Struct, tag=True, frozen=True):
    """``path`` opens the tensor's memory for as long as the launcher lives."""

    path: str
    nbytes: int


class ExpertDigest(msgspec.Struct, frozen=True, array_like=True):
    """XXH3-64 of one expert's bytes in one tensor."""

    layer: int
    name: str
    expert: int
    digest: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """A rank has written its shard.

    Attributes:
        experts: experts it owns, summed over layers.
        expert_bytes: bytes of them in the store.
        bytes_read: bytes of expert tensors it took from the checkpoint.
        bytes_skipped: bytes of expert tensors in the checkpoint that it left to their owners.
        digests: of each expert it wrote, if the experts go to other hosts.
    """

    rank: int
    experts: int
    expert_bytes: int
    bytes_read: int
    bytes_skipped: int
    digests: tuple[ExpertDigest, ...] = ()


class Complete(msgspec.Struct, tag=True, frozen=True):
    """Every rank has written its shard. Answer to `Loaded`, sent when the last one is in."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A rank ends on an error; ``reason`` is one line."""

    rank: int
    reason: str


class Serving(msgspec.Struct, tag=True, frozen=True):
    """The front answers requests at ``url``."""

    url: str


class ExportRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks for `Export`; answered once every rank of this host has loaded."""


class HeldTensor(msgspec.Struct, frozen=True):
    """One tensor as this host holds it: ``experts`` in ascending order and the digest of each."""

    spec: TensorSpec
    segment: Segment
    experts: tuple[int, ...]
    digests: tuple[int, ...]


class Export(msgspec.Struct, tag=True, frozen=True):
    """Everything other hosts may read."""

    tensors: tuple[HeldTensor, ...]


class GatherReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How a rank's gathers go. Seconds, bytes and FLOPs are per MoE layer unless they say otherwise.

    Attributes:
        layers: layers that gather anything.
        bytes_per_layer: what the largest of them gathers.
        seconds: t_EP, the time of one layer's gather.
        gemm_flops_per_second: the rank's measured peak.
        window_fixed, window_per_flop: the compute window as measured: ``fixed + per_flop * FLOPs``; 0 until known.
        saturation_flops: FLOPs from which the window covers t_EP; None until known.
        threshold_flops: T, with its margin.
        peak_threshold_flops: T after the paper, from the measured peak: ``t_EP * F * gamma``.
        batches: batches computed with gathers.
        exposed_seconds, step_seconds: sums over those batches: waits for weights, and all of their time.
        digest_failures: gathers whose bytes were not what their owner wrote; they were repeated.
        peer_losses: transfers that broke off.
    """

    rank: int
    layers: int
    bytes_per_layer: int
    seconds: float
    gemm_flops_per_second: float
    window_fixed: float
    window_per_flop: float
    saturation_flops: float | None
    threshold_flops: float
    peak_threshold_flops: float
    batches: int
    exposed_seconds: float
    step_seconds: float
    digest_failures: int
    peer_losses: int


class CallReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How a rank's expert calls go.

    Attributes:
        layers: layers whose rows are sent.
        sent: calls, and ``rows`` in them.
        late: calls that were not answered in time; their experts were fetched.
        declined: calls that a worker declined, or whose answers were wrong; likewise.
        digest_failures: answers that came otherwise than they were sent.
        fetched_rows: rows whose experts were fetched.
        wait_seconds: time the rank stood still for rows.
        step_seconds: time of all its batches.
    """

    rank: int
    layers: int
    sent: int
    rows: int
    late: int
    declined: int
    digest_failures: int
    fetched_rows: int
    wait_seconds: float
    step_seconds: float


class ServedReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a host's worker has done for ranks of other hosts.

    Attributes:
        calls, rows: answered.
        runs: computations; one may be of several callers' calls.
        declined: calls that could not be computed.
        dropped: calls that nobody waited for any more.
        queue_seconds: sum over calls of the time each stood in the queue.
        busy_seconds: time it computed.
    """

    calls: int
    rows: int
    runs: int
    declined: int
    dropped: int
    queue_seconds: float
    busy_seconds: float


class HelpReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How idle ranks of this host have helped a rank.

    Attributes:
        blocks: of experts and attention that the rank offered, whoever computed them.
        helped: of these, computed by other ranks.
        left: offers whose helper did not come out in time; the rank computed its blocks.
    """

    rank: int
    blocks: int
    helped: int
    left: int


class StatusRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks for `Status`."""


class RankStatus(msgspec.Struct, frozen=True):
    """One rank as the store's owner sees it; figures are 0 until it has loaded.

    ``restarts`` counts how often it came back after its end; ``bytes_reread`` what it took from the checkpoint then.
    """

    rank: int
    pid: int
    loaded: bool
    experts: int
    expert_bytes: int
    bytes_read: int
    bytes_skipped: int
    restarts: int
    bytes_reread: int


class Status(msgspec.Struct, tag=True, frozen=True):
    """The store.

    Attributes:
        tensors: how many expert tensors it holds, whole or in part.
        expert_bytes: bytes of the experts this host keeps, computed from shapes.
        resident_bytes: pages behind them as the operating system counts them.
        page_bytes: the page size, the grain of ``resident_bytes``.
        gathers: of each rank that gathers experts from other hosts.
        calls: of each rank that sends rows to other hosts.
        served: what this host's worker has done for them; None without one.
        help: of each rank that idle ranks of this host help.
    """

    ranks: tuple[RankStatus, ...]
    tensors: int
    expert_bytes: int
    resident_bytes: int
    page_bytes: int
    gathers: tuple[GatherReport, ...] = ()
    calls: tuple[CallReport, ...] = ()
    served: ServedReport | None = None
    help: tuple[HelpReport, ...] = ()


class Done(msgspec.Struct, tag=True, frozen=True):
    """Heard, nothing to tell."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request cannot be met; ``reason`` is one line that names the fix."""

    reason: str


Report = GatherReport | CallReport | ServedReport | HelpReport
Request = Hello | Allocate | Placed | Loaded | Failed | Serving | StatusRequest | ExportRequest | Report
Reply = Welcome | Segment | Complete | Status | Done | Refused | Export
