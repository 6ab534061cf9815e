"""A command that cannot go on says why in a line, and shows no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ODD = [
    # The architecture is served, but the sizes are not there.
    (["asyncep", "serve", "--model-path", "{folder}"], {}, 2, "model_type="),
    (["asyncep_kernels.native.build"], {"ASYNCEP_CPU_ISA": "neon"}, 1, "kernels: ASYNCEP_CPU_ISA=neon is none of"),
    (["asyncep_router.launch_router", "--worker-urls", "http://a:1", "http://a:1"], {}, 2, "--worker-urls: http://a:1"),
    (["asyncep_router.launch_router", "--port", "99999"], {}, 2, "--port 99999: must be at most 65535"),
    (["asyncep_router.launch_router", "--max-concurrent-requests", "0"], {}, 2, "--max-concurrent-requests 0"),
]


@pytest.mark.parametrize(("command", "environment", "status", "words"), ODD, ids=lambda value: str(value)[:40])
def test_a_reason_is_a_line(
    command: list[str],
    environment: dict[str, str],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    filled = [part.format(folder=tmp_path) for part in command]
    done = subprocess.run([sys.executable, "-m", *filled], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_is_the_commands_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from asyncep.cli import COMMANDS, main
    from asyncep.errors import CommandError

    class Demo:
        @staticmethod
        def main(arguments: list[str]) -> int:
            raise CommandError("the package is missing")

    patch = pytest.MonkeyPatch()
    patch.setattr("importlib.import_module", lambda name: Demo)
    try:
        assert main([COMMANDS[3][0]]) == 1
    finally:
        patch.undo()
    assert capsys.readouterr().err == f"asyncep {COMMANDS[3][0]}: the package is missing\n"
