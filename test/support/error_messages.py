"""The messages that an operator or a client can meet, read from the source: where each stands, and what to look for.

A message is a string or an f-string that is given to an error of ours, to ``SystemExit`` or ``sys.exit``, or to a
logger as a warning or an error. It may have got a name before, in the same function. Of each message the longest piece
without a placeholder counts, if it has twelve characters or more.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORTEST = 12
# What `%s` and its like are in a logger's message.
_PLACE = re.compile(r"%[-#0 +]*[\d.]*[a-zA-Z]")


@dataclass(frozen=True)
class Message:
    """One message of the source.

    Attributes:
        file: path from the repository's root.
        line: of the call.
        fragment: the longest piece of it that is always the same.
    """

    file: str
    line: int
    fragment: str


_ENDS = ("SystemExit", "sys.exit", "parser.error", "ArgumentTypeError")
_LOGS = ("logger.warning", "logger.error", "logger.exception")
_LAUNCHER = ("UsageError", "UnsupportedModelError", "StoreError", *_ENDS, *_LOGS)
_FRONT = ("Refusal", "ValueError", "HTTPException", "ApiError", "NoSpace", "DiskError", "Problem", "UsageError")
_ROUTER = (
    *("ConfigError", "UnsupportedModelError", "ProbeError", "BadRequest", "Unauthorized", "Forbidden", "NotFound"),
    *("WrongMethod", "ExpectationFailed", "SlowBody", "TooManyBodies", "RateLimited", "Conflict", "TooLarge"),
    *("QueueFull", "QueueTimeout", "NoWorker", "ShuttingDown", "WorkerUnreachable", "WorkerTimeout"),
)
_PYTHON = (
    *("OptionError", "InputError", "OutputError", "TemplateError", "JobError", "StartError", "ServerError"),
    *("DemoDataMissing", "FileExistsError", "FileNotFoundError"),
)
# Rooms, or files, whose messages people see, and whose calls make one.
ROOMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((f"asyncep_sgl/{room}", _LAUNCHER) for room in ("config", "launcher", "process", "platform", "strategies")),
    ("asyncep_sgl/front", (*_FRONT, "_unavailable", *_ENDS, *_LOGS)),
    ("asyncep_sgl/router", _LOGS),
    ("asyncep_sgl/rank", ("StoreError", *_LOGS)),
    ("asyncep_sgl/experts", ("StoreError", "GatherError", "Refused", *_ENDS, *_LOGS)),
    ("router/asyncep_router/http", (*_ROUTER, *_LOGS)),
    ("router/asyncep_router/keys.py", _ROUTER),
    ("router/asyncep_router/config.py", _ROUTER),
    ("router/asyncep_router/cost/shape.py", _ROUTER),
    ("router/asyncep_router/launch_server.py", (*_ROUTER, *_LOGS)),
    *(
        (f"python/asyncep/{room}", (*_PYTHON, *_ENDS, *_LOGS))
        for room in (
            "commands",
            "files",
            "tasks",
            "client",
            "jobs",
            "runtime",
            "cluster",
            "plan",
            "demo",
            "local_server.py",
        )
    ),
    ("python/asyncep/own_files.py", _PYTHON),
    ("kernels/asyncep_kernels/native", ("BuildError", "ValueError", *_ENDS, *_LOGS)),
)


@cache
def messages() -> tuple[Message, ...]:
    """Every message of `ROOMS`, in the order of files and lines."""
    found: list[Message] = []
    for room, calls in ROOMS:
        place = ROOT / room
        for file in [place] if place.suffix else sorted(place.rglob("*.py")):
            found += _of_file(file, frozenset(calls))
    return tuple(found)


def squeezed(text: str) -> str:
    """A text as messages are compared: without backticks, every run of blanks as one."""
    return " ".join(text.replace("`", "").split())


def _of_file(file: Path, calls: frozenset[str]) -> list[Message]:
    found: list[Message] = []
    for scope in ast.walk(ast.parse(file.read_text())):
        if not isinstance(scope, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = list(_inside(scope))
        assigned = {
            target.id: node.value
            for node in own
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in own:
            if not isinstance(node, ast.Call) or (name := _name(node.func)) not in calls:
                continue
            given = [assigned.get(one.id, one) if isinstance(one, ast.Name) else one for one in node.args]
            pieces = [piece for one in given for piece in _constant(one, logged=name in _LOGS)]
            fragment = max(pieces, key=len, default="")
            if len(fragment) >= SHORTEST:
                found.append(Message(str(file.relative_to(ROOT)), node.lineno, fragment))
    return sorted(found, key=lambda message: message.line)


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """What is in a module or function, without the functions in it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _inside(node)


def _name(function: ast.expr) -> str:
    """What is called: ``UsageError``, ``logger.warning``; the module in front of argparse's error is left out."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}".removeprefix("argparse.")
    return function.id if isinstance(function, ast.Name) else ""


def _constant(node: ast.expr, *, logged: bool) -> Iterator[str]:
    """The pieces of a message that are always the same."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from (squeezed(piece) for piece in (_PLACE.split(part.value) if logged else [part.value]))
