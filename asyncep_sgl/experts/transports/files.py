"""Experts that stay in the checkpoint: read from disk into slots by a thread, ahead of the computation.

The kernel's page cache keeps what memory allows: a checkpoint that fits is read once, one that does not is read again
for each batch, at the disk's rate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import torch

from asyncep_sgl.errors import GatherError, StoreError
from asyncep_sgl.experts.checkpoint_map import CheckpointMap, FileRun
from asyncep_sgl.experts.gather import Counters, GatheredLayer
from asyncep_sgl.experts.pipeline import Gathered


class FileSource:
    """A `gather.LayerSource` over a checkpoint's files.

    Args:
        files: the checkpoint's safetensors files.
        dtype: torch's name of what the rank computes in; the files have to hold it.

    Raises:
        StoreError: they do not.
    """

    def __init__(self, files: list[Path], dtype: str) -> None:
        self.counters = Counters()
        self._map = CheckpointMap.of(files)
        if self._map.dtype != dtype:
            raise StoreError(
                f"the checkpoint holds {self._map.dtype} experts and {dtype} is computed; experts read on demand are "
                f"not converted, use --dtype {self._map.dtype}"
            )
        self._layers: Mapping[int, GatheredLayer] = {}
        self._slots: list[memoryview] = []
        self._descriptors: dict[str, int] = {}
        # One: a second thread would ask the disk for a later layer before the next one is there.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="asyncep-files")

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`.

        Raises:
            StoreError: an expert is not in the files.
        """
        self._layers = layers
        self._slots = [memoryview(row.numpy()) for row in slots]
        for layer, entry in layers.items():
            for name, stride in entry.slot.strides.items():
                for expert in entry.slot.experts:
                    runs = self._map.runs.get((layer, name, expert), [])
                    stored = sum(run.nbytes for run in runs)
                    if stored != stride:
                        raise StoreError(
                            f"expert {expert} of layer {layer}: {name} has {stored} bytes in the checkpoint and "
                            f"{stride} in memory; load such a model whole, without --asyncep-expert-memory"
                        )

    def start(self, layer: int, slot: int) -> _FileFetch:
        """See `LayerSource`."""
        return _FileFetch(self._pool.submit(self._read, layer, slot))

    def _read(self, layer: int, slot: int) -> float:
        began = time.monotonic()
        entry = self._layers[layer].slot
        for name, stride in entry.strides.items():
            for expert in entry.experts:
                start = entry.offset(name, expert)
                target = self._slots[slot][start : start + stride]
                for run in self._map.runs[layer, name, expert]:
                    self._read_run(run, target[: run.nbytes])
                    target = target[run.nbytes :]
        return time.monotonic() - began

    def _read_run(self, run: FileRun, target: memoryview) -> None:
        if run.file not in self._descriptors:
            self._descriptors[run.file] = os.open(run.file, os.O_RDONLY)
        offset = run.offset
        while target:
            # The interpreter's lock is let go meanwhile.
            count = os.preadv(self._descriptors[run.file], [target], offset)
            if count == 0:
                raise GatherError(f"{run.file} ends before byte {run.offset + run.nbytes}; was it changed?")
            target, offset = target[count:], offset + count


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

    def cancel(self) -> None:
        """See `pipeline.Fetch`."""
        if not self._reading.cancel():
            try:
                self._reading.result()
            except (OSError, GatherError, CancelledError):
                return
