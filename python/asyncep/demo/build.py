"""Build the demo's Mixture-of-Experts checkpoint once and keep it outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncep.demo.moefy import MoeLayer

Variant = Literal["sparse", "exact"]

REPORT_NAME = "asyncep_demo.json"
SEED = 0

# The files that decide which weights come out; the cache is keyed by their contents.
_RECIPE = (
    "weights",
    "news",
    "task",
    "reference",
    "stream",
    "clustering",
    "routing",
    "refit",
    "moefy",
    "checkpoint",
    "build",
)
_ROUTING_PER_TOPIC: dict[Variant, int] = {"sparse": 16, "exact": 1}


@dataclass(frozen=True)
class DemoReport:
    """What ``asyncep_demo.json`` beside the checkpoint says."""

    recipe: str
    variant: Variant
    experts: int
    top_k: int
    expert_bytes: int
    fitting_tokens: int
    fitting_seconds: float
    seed: int
    unevenness: float  # median over layers of the busiest expert's load over the mean load
    unevenness_per_layer: list[float]
    least_load_per_layer: list[float]  # the least busy expert's load over the mean load


def recipe_hash() -> str:
    """Twelve hexadecimal digits that change whenever a file of the recipe does."""
    digest = hashlib.sha256()
    for name in _RECIPE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def default_model_path(variant: Variant = "sparse") -> Path:
    """Where the demo model is kept: ``ASYNCEP_CACHE``, else the user's cache directory."""
    base = os.environ.get("ASYNCEP_CACHE")
    if base is None:
        xdg = os.environ.get("XDG_CACHE_HOME")
        base = str((Path(xdg) if xdg else Path.home() / ".cache") / "asyncep")
    return Path(base) / f"demo-model-{recipe_hash()}" / variant


def read_report(directory: Path) -> DemoReport | None:
    """The report of a finished demo model, or None where there is none."""
    try:
        return DemoReport(**json.loads((directory / REPORT_NAME).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def build_demo_model(
    out: Path | None = None,
    *,
    variant: Variant = "sparse",
    progress: Callable[[str, int, int], None] = lambda _step, _done, _total: None,
) -> Path:
    """Build the model into ``out`` (by default the cache) unless it is there already; returns the directory.

    The directory appears complete or not at all. A second process that asks meanwhile waits for the first.
    A demo model of another recipe or variant is replaced; any other non-empty directory is an error.
    """
    out = default_model_path(variant) if out is None else out
    if _is_current(out, variant):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent / f".{out.name}.lock"):
        if _is_current(out, variant):
            return out
        if out.exists() and read_report(out) is None and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} exists and is not a demo model; remove it or choose another directory")
        for leftover in out.parent.glob(f".{out.name}.building-*"):  # of a build that was killed
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
        try:
            _build(work, variant, progress)
            work.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            work.rename(out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return out


def _is_current(out: Path, variant: Variant) -> bool:
    report = read_report(out)
    return report is not None and report.recipe == recipe_hash() and report.variant == variant


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if the process dies
        yield


def _build(directory: Path, variant: Variant, progress: Callable[[str, int, int], None]) -> None:
    # Imported here: asking for the path of a finished model should not load torch.
    import torch

    from asyncep.demo.checkpoint import save_mixtral
    from asyncep.demo.moefy import MoeShape, convert_exact, convert_sparse
    from asyncep.demo.task import TaskPrompts, routing_articles
    from asyncep.demo.weights import load_dense, load_tokenizer

    progress("load", 0, 1)
    tokenizer = load_tokenizer()
    model = load_dense(torch.bfloat16).float()
    prompts = TaskPrompts.create(tokenizer).token_ids(routing_articles(_ROUTING_PER_TOPIC[variant]))

    started = time.monotonic()
    shape = MoeShape()
    if variant == "exact":
        shape = MoeShape(top_k=shape.experts)
        layers = convert_exact(model, prompts, shape, SEED)
    else:
        layers = convert_sparse(model, prompts, shape, SEED, progress=lambda done, total: progress("fit", done, total))
    seconds = time.monotonic() - started

    progress("save", 0, 1)
    expert_bytes = save_mixtral(directory, model, tokenizer, layers, shape.top_k)
    report = DemoReport(
        recipe=recipe_hash(),
        variant=variant,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_bytes=expert_bytes,
        fitting_tokens=sum(len(prompt) for prompt in prompts),
        fitting_seconds=round(seconds, 1),
        seed=SEED,
        unevenness=round(median(_over_mean(layers, max)), 3),
        unevenness_per_layer=[round(value, 3) for value in _over_mean(layers, max)],
        least_load_per_layer=[round(value, 3) for value in _over_mean(layers, min)],
    )
    (directory / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n")


def _over_mean(layers: list[MoeLayer], pick: Callable[[list[float]], float]) -> list[float]:
    """One figure per layer: the load that ``pick`` picks, over the mean load of the layer's experts."""
    loads = [layer.load.tolist() for layer in layers]
    return [pick(load) * len(load) / sum(load) for load in loads]
