"""Tile sizes of the expert GEMMs, from ``configs.json``: chosen by `bench/gpu_tune.py`.

See docs/internals/gpu_kernels.md.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from asyncep_kernels.moe.quant import BLOCK, Format


class Tile(NamedTuple):
    """One GEMM's tile and how it is compiled."""

    n: int
    """Columns of the output; the gate-up GEMM computes as many of each."""
    k: int
    """Elements of a row that one step of the loop reads."""
    warps: int
    stages: int
    """Tiles in flight."""


class MoeConfig(NamedTuple):
    """The two GEMMs of a layer."""

    rows: int
    """Rows of a block: the permutation's ``block``."""
    gate_up: Tile
    down: Tile
    group: int = 8
    """Blocks of rows that go through the columns together, so that they share weights in the L2 cache."""


class Scheme(NamedTuple):
    """What the kernels multiply."""

    weights: Format
    activations: bool
    """Whether activations are quantised as the weights are."""

    @property
    def name(self) -> str:
        """As in ``configs.json``."""
        if self.weights is Format.PLAIN:
            return "bf16"
        return self.weights.value if self.activations else f"{self.weights.value}-weights"

    def fits(self, config: MoeConfig) -> str | None:
        """Why the kernels cannot run ``config``; None if they can."""
        if self.weights is Format.FP8:
            if self.activations and config.gate_up.n != BLOCK:
                return f"gate_up.n={config.gate_up.n}: a tile must be one group of {BLOCK} e4m3 activations"
            if BLOCK % config.gate_up.k or BLOCK % config.down.k:
                return f"k={config.gate_up.k}, {config.down.k}: must divide a block of {BLOCK}"
        return None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(Format.PLAIN, False),
        Scheme(Format.FP8, True),
        Scheme(Format.FP8, False),
        Scheme(Format.INT8, True),
        Scheme(Format.INT8, False),
    )
}
# Multiplying e4m3 takes sm_89; before it, e4m3 weights are widened to bf16 as they are read.
UNSUPPORTED = {("sm_80", "fp8")}
# For Triton's interpreter, whose every program costs milliseconds: small tiles, several of each side.
SMALL = MoeConfig(16, Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), group=2)


def choose(architecture: str, scheme: Scheme, rows_per_expert: float) -> MoeConfig:
    """The configuration for a batch that brings each expert so many rows on average.

    Args:
        architecture: "sm_80" or "sm_90"; a newer one takes sm_90's.
        scheme: what is multiplied.
        rows_per_expert: assignments over experts.

    Raises:
        KeyError: no configuration for the architecture or scheme.
    """
    sizes = table()[architecture][scheme.name]
    return next((config for up_to, config in sizes if rows_per_expert <= up_to), sizes[-1][1])


@cache
def table() -> dict[str, dict[str, list[tuple[float, MoeConfig]]]]:
    """Everything in ``configs.json``: by architecture and scheme, (most rows an expert, configuration), ascending."""
    data = json.loads(files("asyncep_kernels.moe").joinpath("configs.json").read_text())
    return {
        architecture: {
            scheme: [(float(entry["up_to_rows"]), _config(entry)) for entry in entries]
            for scheme, entries in schemes.items()
        }
        for architecture, schemes in data.items()
    }


def _config(entry: dict[str, object]) -> MoeConfig:
    gate_up, down = (Tile(*_integers(entry[side])) for side in ("gate_up", "down"))
    (rows, group) = _integers([entry["rows"], entry["group"]])
    return MoeConfig(rows, gate_up, down, group)


def _integers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"configs.json: {values!r}: want a list of integers")
    return values
