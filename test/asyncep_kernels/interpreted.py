"""Triton kernels in Triton's interpreter, from a test process that has imported Triton without it.

Whether a kernel is interpreted is decided when Triton is first imported, so kernels run in a child process of their
own, which takes (module, function, arguments) and answers the result or the error. It lives as long as the tests.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import subprocess
import sys
from functools import cache
from typing import IO, Any

import torch


class Interpreter:
    """The child process."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        atexit.register(self.close)

    def call(self, module: str, function: str, *args: Any, **kwargs: Any) -> Any:
        """The function's result; its exception is raised here."""
        if self._child.stdin is None or self._child.stdout is None:
            raise RuntimeError("the interpreter has no pipes")
        _send(self._child.stdin, (module, function, args, kwargs))
        result, error = _receive(self._child.stdout)
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        if self._child.stdin is not None and self._child.poll() is None:
            self._child.stdin.close()
        self._child.wait()


@cache
def interpreter() -> Interpreter:
    return Interpreter()


def _send(pipe: IO[bytes], message: Any) -> None:
    # torch.save keeps tensors of every dtype; pickle alone cannot read back e4m3.
    data = io.BytesIO()
    torch.save(message, data, pickle_protocol=5)
    pipe.write(len(data.getvalue()).to_bytes(8, "little") + data.getvalue())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    length = pipe.read(8)
    if len(length) < 8:
        raise EOFError("the other process has ended")
    return torch.load(io.BytesIO(pipe.read(int.from_bytes(length, "little"))), weights_only=False)


def _serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints must not stand among the answers
    while True:
        try:
            module, function, args, kwargs = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
        except Exception as error:
            try:
                _send(answers, (None, error))
            except Exception:  # an error that cannot be pickled
                _send(answers, (None, RuntimeError(repr(error))))
        else:
            _send(answers, (result, None))


if __name__ == "__main__":
    _serve()
