"""SGLang's own flags, as the front reads them: what is wrong with one is said in a line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable
from typing import Any


def read(arguments: list[str], prepare: Callable[[list[str]], Any]) -> Any:
    """SGLang's reading of its flags.

    Raises:
        SystemExit: a flag nobody knows or a value that is none, in a line of its own. SGLang's would stand below its
            usage, which is some hundred lines long.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return prepare(arguments)
    except SystemExit as end:
        text = printed.getvalue()
        if end.code != 2 or ": error: " not in text:
            sys.stderr.write(text)
            raise
        usage, _, reason = text.rpartition(": error: ")
        raise SystemExit(refused_flag(reason.strip(), set(re.findall(r"--[a-z0-9][a-z0-9-]+", usage)))) from None


def refuse_other_doors(server_args: Any) -> None:
    """Refuses servers beside or instead of the one whose requests are checked.

    Raises:
        SystemExit: one is asked for.
    """
    for flag, asked in (
        ("--enable-http2", server_args.enable_http2),
        ("--tokenizer-worker-num", server_args.tokenizer_worker_num > 1),
        ("--grpc-port", server_args.grpc_port is not None),
        ("--grpc-mode", server_args.grpc_mode or server_args.smg_grpc_mode),
    ):
        if asked:
            raise SystemExit(f"asyncep serve: {flag}: requests come in through one HTTP/1.1 server; leave the flag out")


def refuse_truncation(server_args: Any) -> None:
    """Refuses to cut prompts in silence: their end is where the answer is read.

    Raises:
        SystemExit: it is asked for.
    """
    if server_args.allow_auto_truncate:
        raise SystemExit(
            "asyncep serve: --allow-auto-truncate: it cuts off a prompt's end, where the answer is read; leave it out, "
            "and let the client cut the text (asyncep classify --truncate)"
        )


def refused_flag(reason: str, known: set[str]) -> str:
    """What to print when SGLang does not take a flag.

    Args:
        reason: the last words of its parser, such as ``unrecognized arguments: --dp-sise 2``.
        known: its flags.
    """
    wrong = next((word for word in reason.split() if word.startswith("--")), "")
    near = difflib.get_close_matches(wrong.partition("=")[0], sorted(known), n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}? " if near and "unrecognized" in reason else ""
    return f"asyncep serve: {reason}; {hint}asyncep serve --help lists our flags, sglang serve --help SGLang's"
