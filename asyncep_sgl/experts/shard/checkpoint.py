"""Reads from safetensors files only what this rank owns, and counts what it read and what it left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open

# Names as the served families write them, one tensor per expert.
_ONE_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.")


@dataclass
class ReadCount:
    """Bytes of expert tensors in a checkpoint, by what happened to them."""

    read: int = 0
    skipped: int = 0


@dataclass
class OwnedWeights:
    """Goes through a checkpoint as one rank.

    Attributes:
        owned: the experts of a layer that this rank reads.
        count: what has been read so far.
    """

    owned: Callable[[int], frozenset[int]]
    count: ReadCount = field(default_factory=ReadCount)

    def tensors(self, files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of everything in ``files`` that is not another rank's expert."""
        for file in files:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    if match := _ONE_EXPERT.search(name):
                        layer, expert = int(match[1]), int(match[2])
                        if expert not in self.owned(layer):
                            self.count.skipped += _stored_bytes(reader, name)
                            continue
                        tensor = reader.get_tensor(name)
                        self.count.read += tensor.nbytes
                    else:
                        tensor = reader.get_tensor(name)
                    yield name, tensor


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _stored_bytes(reader: Any, name: str) -> int:
    view = reader.get_slice(name)
    items = 1
    for extent in view.get_shape():
        items *= extent
    return items * _ITEM_BYTES.get(view.get_dtype(), 1)
