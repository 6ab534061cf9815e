"""Experts that stay in the checkpoint: read from disk into slots by a thread, ahead of the computation.

Where all of them fit into the memory that is free, the kernel's page cache keeps them and the disk is read once. Where
they do not, every batch reads every layer again, and whatever the cache keeps is given up before it is wanted: files
are then read past it (``O_DIRECT``), which spares the processor a copy of every page and the search for one to give up.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import torch

from asyncep_sgl.errors import GatherError, StoreError
from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer
from asyncep_sgl.experts.gather.pipeline import Gathered
from asyncep_sgl.experts.shard.checkpoint_map import CheckpointMap
from asyncep_sgl.experts.sources.file_spans import BLOCK, Span, spans
from asyncep_sgl.process.host import available_bytes, format_bytes

logger = logging.getLogger(__name__)

# Read at once. With 8 MiB and more a layer took longer.
_SPAN_BYTES = 4 << 20


class FileSource:
    """A `gather.LayerSource` over a checkpoint's files.

    Args:
        files: the checkpoint's safetensors files.
        dtype: torch's name of what the rank computes in; the files have to hold it.
        free: bytes that the page cache may take.

    Raises:
        StoreError: the files hold another dtype.
    """

    def __init__(self, files: list[Path], dtype: str, free: Callable[[], int] = available_bytes) -> None:
        self.counters = Counters()
        self._map = CheckpointMap.of(files)
        if self._map.dtype != dtype:
            raise StoreError(
                f"the checkpoint holds {self._map.dtype} experts and {dtype} is computed; experts read on demand are "
                f"not converted, use --dtype {self._map.dtype}"
            )
        self._free = free
        self._flags = os.O_RDONLY
        self._spans: Mapping[int, Sequence[Span]] = {}
        self._slots: list[memoryview] = []
        self._descriptors: dict[str, int] = {}
        # What is read past the page cache has to begin at a page.
        self._buffer = memoryview(mmap.mmap(-1, _SPAN_BYTES))
        # One: a second thread would ask the disk for a later layer before the next one is there.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="asyncep-files")

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`.

        Raises:
            StoreError: an expert is not in the files.
        """
        self._slots = [memoryview(row.numpy()) for row in slots]
        self._spans = {layer: self._layer_spans(layer, entry) for layer, entry in layers.items()}
        gathered = sum(entry.slot.nbytes for entry in layers.values())
        if gathered > (free := self._free()):
            self._flags |= os.O_DIRECT
            logger.info(
                "%s of experts stay on disk and %s of memory are free: they are read past the page cache",
                format_bytes(gathered), format_bytes(free),
            )  # fmt: skip

    def _layer_spans(self, layer: int, entry: GatheredLayer) -> Sequence[Span]:
        wanted = []
        for name, stride in entry.slot.strides.items():
            for expert in entry.slot.experts:
                runs = self._map.runs.get((layer, name, expert), [])
                stored = sum(run.nbytes for run in runs)
                if stored != stride:
                    raise StoreError(
                        f"expert {expert} of layer {layer}: {name} has {stored} bytes in the checkpoint and "
                        f"{stride} in memory; load such a model whole, without --asyncep-expert-memory"
                    )
                target = entry.slot.offset(name, expert)
                for run in runs:
                    wanted.append((run, target))
                    target += run.nbytes
        return spans(wanted, _SPAN_BYTES)

    def start(self, layer: int, slot: int) -> _FileFetch:
        """See `LayerSource`."""
        return _FileFetch(self._pool.submit(self._read, layer, slot))

    def _read(self, layer: int, slot: int) -> float:
        began = time.monotonic()
        target = self._slots[slot]
        for span in self._spans[layer]:
            self._read_span(span)
            for part in span.parts:
                found = self._buffer[part.source : part.source + part.nbytes]
                target[part.target : part.target + part.nbytes] = found
        return time.monotonic() - began

    def _read_span(self, span: Span) -> None:
        """Fills the buffer. The interpreter's lock is let go meanwhile."""
        descriptor = self._descriptor(span.file)
        there = 0
        while there < span.needed:
            count = os.preadv(descriptor, [self._buffer[there : span.nbytes]], span.offset + there)
            there += count
            # Past the page cache only a file's end divides a block.
            divided = self._flags & os.O_DIRECT and there % BLOCK
            if count == 0 or (there < span.needed and divided):
                raise GatherError(f"{span.file} ends before byte {span.offset + span.needed}; was it changed?")

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, self._flags)
            except OSError as error:
                if not self._flags & os.O_DIRECT:
                    raise
                logger.info("%s can only be read through the page cache: %s", file, error.strerror)
                self._flags = os.O_RDONLY
                self._descriptors[file] = os.open(file, self._flags)
        return self._descriptors[file]


class _FileFetch:
    """See `pipeline.Fetch`."""

    def __init__(self, reading: Future[float]) -> None:
        self._reading = reading

    def wait(self) -> Gathered:
        """See `pipeline.Fetch`."""
        try:
            return Gathered(self._reading.result(), exact=True)
        except OSError as error:
            raise GatherError(f"experts cannot be read from disk: {error}") from error

    def over(self) -> bool:
        """See `pipeline.Fetch`."""
        return self._reading.done()

    def cancel(self) -> None:
        """See `pipeline.Fetch`."""
        if not self._reading.cancel():
            try:
                self._reading.result()
            except (OSError, GatherError, CancelledError):
                return
