"""The names of SGLang's flags, read from its source: importing it takes ten seconds, and a typing mistake is found now.

Only names are known here. What a flag takes, and which go together, is SGLang's to say.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from asyncep_sgl.errors import UsageError

# Where its flags are declared: fields of dataclasses, and what has another name than its field.
_DECLARATIONS = ("arg_groups/fields/*.py", "arg_groups/argparse_actions.py", "server_args.py")


def refuse_unknown(passed: Sequence[str], ours: Sequence[str]) -> None:
    """Refuses flags that neither we nor SGLang have. Where SGLang's source has another form, nothing is refused here.

    Args:
        passed: arguments that are not ours.
        ours: our flags.

    Raises:
        UsageError: names the flag, and the one that is most like it.
    """
    theirs = known_flags()
    if not theirs:
        return
    known = sorted({*theirs, *ours})
    for argument in passed:
        name = argument.partition("=")[0]
        # SGLang takes the beginning of a flag for the flag, and what has a blank in it for a value.
        value = not argument.startswith("--") or " " in name
        if value or any(flag.startswith(name) for flag in theirs):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{name}: no such flag; {hint}asyncep serve --help lists ours, sglang serve --help SGLang's")


@cache
def known_flags() -> frozenset[str]:
    """SGLang's flags; none if its source is not where it was."""
    spec = find_spec("sglang")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        return frozenset()
    found: set[str] = set()
    for pattern in _DECLARATIONS:
        files = sorted((Path(folders[0]) / "srt").glob(pattern))
        if not files:
            return frozenset()
        for file in files:
            try:
                found |= _names(ast.parse(file.read_bytes()))
            except SyntaxError:
                return frozenset()
    return frozenset(found)


def _names(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id.replace("_", "-")
            # A truth value may be denied.
            found |= {f"--{name}", f"--no-{name}", f"--{node.target.id}"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            found.add(node.value.split()[0])
    return found
