"""Where in a checkpoint's safetensors files each expert's bytes are. Pure but for reading the files' headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncep_sgl.errors import StoreError

_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.(\w+)\.weight$")
# The parts of SGLang's two tensors an expert, in the order they lie there, by the families' names.
_PARTS = {
    "gate_proj": ("w13_weight", 0),
    "w1": ("w13_weight", 0),
    "up_proj": ("w13_weight", 1),
    "w3": ("w13_weight", 1),
    "down_proj": ("w2_weight", 0),
    "w2": ("w2_weight", 0),
}
_DTYPES = {"BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class FileRun:
    """``nbytes`` at ``offset`` of ``file``."""

    file: str
    offset: int
    nbytes: int


@dataclass
class CheckpointMap:
    """Attributes:
    runs: by (layer, tensor, expert), the runs that make up the expert's part of the tensor, in order.
    dtype: torch's name of what the experts are stored as.
    """

    runs: dict[tuple[int, str, int], list[FileRun]] = field(default_factory=dict)
    dtype: str = ""

    @classmethod
    def of(cls, files: Iterable[Path]) -> CheckpointMap:
        """Reads the headers of ``files``.

        Raises:
            StoreError: experts stored in a way that cannot be read in place.
        """
        found = cls()
        parts: dict[tuple[int, str, int], dict[int, FileRun]] = {}
        for path in files:
            header, start = _header(path)
            for name, entry in header.items():
                match = _EXPERT.search(name)
                if match is None:
                    continue
                if match[3] not in _PARTS or entry["dtype"] not in _DTYPES:
                    raise StoreError(f"{path.name}: {name} ({entry['dtype']}) cannot be read from disk on demand")
                found.dtype = _DTYPES[entry["dtype"]]
                tensor, place = _PARTS[match[3]]
                begin, end = entry["data_offsets"]
                key = (int(match[1]), tensor, int(match[2]))
                parts.setdefault(key, {})[place] = FileRun(str(path), start + begin, end - begin)
        found.runs = {key: [runs[place] for place in sorted(runs)] for key, runs in parts.items()}
        return found


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A safetensors file's header and where its data begin: 8 bytes of length, then JSON, then data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
