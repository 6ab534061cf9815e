"""Tells whether two hosts have the same checkpoint, without reading it through."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Of each end of a file. The beginning holds the names, shapes and offsets of all tensors.
_SAMPLE_BYTES = 1 << 16


def checkpoint_fingerprint(model: str, revision: str | None, dtype: str) -> str:
    """Of a folder: its configuration, and each weight file's size, beginning and end. Of a hub name: that name.

    Args:
        model: checkpoint folder or hub name.
        revision: of a hub name.
        dtype: what the weights are turned into.
    """
    found = hashlib.sha256(dtype.encode())
    folder = Path(model)
    if not folder.is_dir():
        found.update(f"{model}@{revision}".encode())
        return found.hexdigest()[:16]
    found.update((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as reader:
            found.update(reader.read(_SAMPLE_BYTES))
            reader.seek(max(0, size - _SAMPLE_BYTES))
            found.update(reader.read(_SAMPLE_BYTES))
    return found.hexdigest()[:16]
