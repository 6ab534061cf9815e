"""The ``asyncep`` command: finds the subcommand and hands over. Imports nothing heavy itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from asyncep.errors import CommandError

# Name, module with `main(arguments) -> int`, one line of help.
COMMANDS = (
    ("serve", "asyncep_sgl.launch_server", "serve an MoE model, its experts shared by all ranks"),
    ("classify", "asyncep.commands.classify", "label the rows of a JSONL, CSV, Parquet or Arrow file"),
    ("plan", "asyncep.commands.plan", "choose strategy, group and batch for a model on given devices"),
    ("demo", "asyncep.commands.demo", "classify real news articles with a real MoE, end to end"),
    ("demo-model", "asyncep.commands.demo_model", "build the demo's model"),
    ("demo-data", "asyncep.commands.demo_data", "write real labelled text as a file for classify"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``asyncep SUBCOMMAND …`` and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"asyncep {version('asyncep-sgl')} (sglang {version('sglang')})")
        return 0
    for name, module, _ in COMMANDS:
        if given and given[0] == name:
            try:
                return int(importlib.import_module(module).main(given[1:]) or 0)
            except CommandError as error:
                print(f"asyncep {name}: {error}", file=sys.stderr)
                return 1
    wanted_help = bool(given) and given[0] in ("-h", "--help", "help")
    lines = ["usage: asyncep COMMAND [options]   (asyncep COMMAND --help for each)", ""]
    lines += [f"  {name:<12}{help_line}" for name, _, help_line in COMMANDS]
    if given and not wanted_help:
        lines.insert(0, f"asyncep: unknown command {given[0]!r}")
    print("\n".join(lines), file=sys.stdout if wanted_help else sys.stderr)
    return 0 if wanted_help else 2
