"""The store's books: which tensors exist, which ranks have written their shard. Events in, replies out, no sockets."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from asyncep_sgl.experts.store.messages import (
    Allocate,
    CallReport,
    Complete,
    Done,
    Export,
    ExportRequest,
    Failed,
    GatherReport,
    HeldTensor,
    Hello,
    HelpReport,
    Loaded,
    Placed,
    RankStatus,
    Refused,
    Reply,
    Request,
    Segment,
    ServedReport,
    Serving,
    Status,
    StatusRequest,
    TensorSpec,
    Welcome,
)
from asyncep_sgl.process.host import format_bytes

Client = TypeVar("Client")


class SegmentLike(Protocol):
    """What the registry needs of a piece of shared memory."""

    nbytes: int

    @property
    def path(self) -> str: ...

    @property
    def resident_bytes(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Held:
    """``nbytes``: of ``experts``, which are those this host keeps."""

    spec: TensorSpec
    segment: SegmentLike
    experts: tuple[int, ...]
    nbytes: int

    @property
    def reply(self) -> Segment:
        return Segment(self.segment.path, self.segment.nbytes)


@dataclass
class StoreRegistry(Generic[Client]):
    """Books of one host's expert store.

    Attributes:
        ranks: ranks that share it.
        make_segment: makes memory of a name and size, with the given byte ranges in place; raises OSError when it
            cannot.
        available: bytes of memory that can still be taken.
        limit: bytes the operator allows the store, or None.
        pids: process of each role that said hello: ``front``, ``controller``, ``rank 0`` …
        hellos: role and process of each hello since they were taken last.
        url: where the front answers, once it does.
        failures: why ranks said they ended, the first one first; of one that has come back none. The router's verdict
            on them all stands under -1.
    """

    ranks: int
    make_segment: Callable[[str, int, Sequence[range]], SegmentLike]
    available: Callable[[], int]
    limit: int | None = None
    pids: dict[str, int] = field(default_factory=dict)
    hellos: list[tuple[str, int]] = field(default_factory=list)
    url: str | None = None
    failures: dict[int, str] = field(default_factory=dict)
    _segments: dict[tuple[int, str], _Held] = field(default_factory=dict)
    _placed: dict[tuple[int, int, str], Placed] = field(default_factory=dict)
    _loaded: dict[int, Loaded] = field(default_factory=dict)
    _restarts: Counter[int] = field(default_factory=Counter)
    _reread: Counter[int] = field(default_factory=Counter)
    _waiting: list[Client] = field(default_factory=list)
    _exporters: list[Client] = field(default_factory=list)
    _gathers: dict[int, GatherReport] = field(default_factory=dict)
    _calls: dict[int, CallReport] = field(default_factory=dict)
    _served: ServedReport | None = None
    _help: dict[int, HelpReport] = field(default_factory=dict)

    def handle(self, client: Client, request: Request) -> list[tuple[Client, Reply]]:
        """Takes one request; returns what to say to whom now (a `Loaded` is answered with the last one)."""
        match request:
            case Hello():
                return [(client, self._hello(request))]
            case Allocate(spec, held):
                return [(client, self._allocate(spec, held))]
            case Placed(rank, spec):
                self._placed[rank, spec.layer, spec.name] = request
                return [(client, Done())]
            case Loaded():
                return self._load(client, request)
            case Failed(rank, reason):
                self.failures[rank] = reason if rank < 0 else f"rank {rank}: {reason}"
                return [(client, Done())]
            case Serving(url):
                self.url = url
                return [(client, Done())]
            case StatusRequest():
                return [(client, self.status())]
            case ExportRequest():
                if self.complete:
                    return [(client, self._export())]
                self._exporters.append(client)
                return []
            case GatherReport(rank=rank):
                self._gathers[rank] = request
                return [(client, Done())]
            case CallReport(rank=rank):
                self._calls[rank] = request
                return [(client, Done())]
            case HelpReport(rank=rank):
                self._help[rank] = request
                return [(client, Done())]
            case ServedReport():
                self._served = request
                return [(client, Done())]

    def take_hellos(self) -> list[tuple[str, int]]:
        """Who has said hello since this was asked last."""
        taken, self.hellos = self.hellos, []
        return taken

    @property
    def complete(self) -> bool:
        """Whether every rank's experts are in the store."""
        return len(self._loaded) == self.ranks

    def status(self) -> Status:
        """The books as they stand, with memory as the operating system counts it."""
        nothing = Loaded(rank=0, experts=0, expert_bytes=0, bytes_read=0, bytes_skipped=0)
        rows = []
        for rank in range(self.ranks):
            loaded = self._loaded.get(rank, nothing)
            rows.append(
                RankStatus(
                    rank=rank,
                    pid=self.pids.get(f"rank {rank}", 0),
                    loaded=rank in self._loaded,
                    experts=loaded.experts,
                    expert_bytes=loaded.expert_bytes,
                    bytes_read=loaded.bytes_read,
                    bytes_skipped=loaded.bytes_skipped,
                    restarts=self._restarts[rank],
                    bytes_reread=self._reread[rank],
                )
            )
        segments = self._segments.values()
        on_devices = sum(placed.nbytes for placed in self._placed.values())
        return Status(
            ranks=tuple(rows),
            tensors=len(segments) + len({(layer, name) for _, layer, name in self._placed}),
            expert_bytes=sum(held.nbytes for held in segments) + on_devices,
            resident_bytes=sum(held.segment.resident_bytes for held in segments) + on_devices,
            page_bytes=mmap.PAGESIZE,
            gathers=tuple(self._gathers[rank] for rank in sorted(self._gathers)),
            calls=tuple(self._calls[rank] for rank in sorted(self._calls)),
            served=self._served,
            help=tuple(self._help[rank] for rank in sorted(self._help)),
        )

    def close(self) -> None:
        """Gives all memory back."""
        for held in self._segments.values():
            held.segment.close()
        self._segments.clear()

    def _hello(self, hello: Hello) -> Reply:
        if hello.role == "rank" and not 0 <= hello.rank < self.ranks:
            return Refused(f"rank {hello.rank} does not exist among --dp-size {self.ranks}")
        name = f"rank {hello.rank}" if hello.role == "rank" else hello.role
        self.pids[name] = hello.pid
        self.hellos.append((name, hello.pid))
        return Welcome(shard_present=hello.role == "rank" and hello.rank in self._loaded)

    def _allocate(self, spec: TensorSpec, held: tuple[tuple[int, int], ...]) -> Reply:
        key = (spec.layer, spec.name)
        if key in self._segments:
            known = self._segments[key]
            if known.spec != spec:
                return Refused(
                    f"ranks disagree on {spec.name} of layer {spec.layer}: {known.spec.shape} {known.spec.dtype} and "
                    f"{spec.shape} {spec.dtype}; start every rank with the same model and flags"
                )
            return known.reply
        each = spec.nbytes // spec.shape[0]
        spans = [range(start * each, stop * each) for start, stop in held]
        nbytes = sum(len(span) for span in spans)
        if refusal := self._lack_of_memory(spec.layer, nbytes):
            return refusal
        try:
            segment = self.make_segment(f"L{spec.layer}.{spec.name}", spec.nbytes, spans)
        except OSError as error:
            return Refused(f"no shared memory for {spec.name} of layer {spec.layer}: {error.strerror}")
        experts = tuple(expert for start, stop in held for expert in range(start, stop))
        self._segments[key] = _Held(spec, segment, experts, nbytes)
        return self._segments[key].reply

    def _lack_of_memory(self, layer: int, nbytes: int) -> Refused | None:
        held = sum(known.nbytes for known in self._segments.values())
        if self.limit is not None and held + nbytes > self.limit:
            return Refused(
                f"the expert store may take {format_bytes(self.limit)} (--asyncep-store-limit) but layer "
                f"{layer} alone brings it to {format_bytes(held + nbytes)}; raise the limit or serve a "
                "smaller model"
            )
        free = self.available()
        if nbytes > free:
            return Refused(
                f"{format_bytes(held)} of experts are placed and layer {layer} needs "
                f"{format_bytes(nbytes)} more, but only {format_bytes(free)} of memory is free; free memory, "
                "raise the container's memory limit, or serve a smaller model"
            )
        return None

    def _export(self) -> Export:
        digests = {
            (entry.layer, entry.name, entry.expert): entry.digest
            for loaded in self._loaded.values()
            for entry in loaded.digests
        }
        return Export(
            tuple(
                HeldTensor(
                    held.spec,
                    held.reply,
                    held.experts,
                    tuple(digests[layer, name, expert] for expert in held.experts),
                )
                for (layer, name), held in self._segments.items()
            )
        )

    @property
    def failure(self) -> str | None:
        """Why the server cannot go on, as far as a process has said so."""
        return self.failures.get(-1) or next(iter(self.failures.values()), None)

    def _load(self, client: Client, loaded: Loaded) -> list[tuple[Client, Reply]]:
        self.failures.pop(loaded.rank, None)
        if loaded.rank in self._loaded:
            # It came back and found its shard in place; the first figures stay the true ones.
            self._restarts[loaded.rank] += 1
            self._reread[loaded.rank] += loaded.bytes_read
        else:
            self._loaded[loaded.rank] = loaded
        self._waiting.append(client)
        if not self.complete:
            return []
        answers: list[tuple[Client, Reply]] = [(waiting, Complete()) for waiting in self._waiting]
        self._waiting.clear()
        answers += [(exporter, self._export()) for exporter in self._exporters]
        self._exporters.clear()
        return answers
