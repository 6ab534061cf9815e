"""What bench/chaos.py claims and what it looks for, without a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from hostile.chaos_batches import fill, small_disk
from hostile.disturb import Result
from hostile.servers import Place, place


def test_claims_are_about_what_was_lost_and_left() -> None:
    good = Result("kill -9 rank 0", right=500, whole_again_s=0.6, serves_again_s=0.2)
    assert all(claim.holds for claim in chaos.claims([good]))
    for bad in (
        Result("a", right=500, lost=1, serves_again_s=1.0),
        Result("a", right=500, wrong=1, serves_again_s=1.0),
        Result("a", right=500, serves_again_s=1.0, left_running=["5 rank"]),
        Result("a", right=500, serves_again_s=1.0, left_on_disk=["x"]),
        Result("a", right=500),
        Result("kill -9 front", right=500, ended_s=30.0, reason="asyncep: front died"),
        Result("kill -9 front", right=500, ended_s=1.0),
        Result("kill -9 rank 0", right=500, whole_again_s=40.0, serves_again_s=0.1),
        Result("kill -9 rank 0", right=500, serves_again_s=0.1),
    ):
        assert not all(claim.holds for claim in chaos.claims([bad])), bad
    assert all(claim.holds for claim in chaos.claims([Result("kill -9 launcher", right=500, ended_s=0.1)]))


def test_what_is_left_is_found(tmp_path: Path) -> None:
    with place() as here:
        assert here.left_running() == []
        assert here.left_on_disk() == []
        left = subprocess.Popen([sys.executable, "-c", "input()"], env=here.environment, stdin=subprocess.PIPE)
        shared = Path(f"/dev/shm/asyncep-test-{os.getpid()}")
        shared.write_text("left")
        (here.folder / "t" / "asyncep-run-x").mkdir()
        try:
            found = [process.pid for process in here.left_running()]
            on_disk = here.left_on_disk()
        finally:
            shared.unlink()
        assert found == [left.pid]
        assert shared.name in on_disk
        assert any(name.endswith("asyncep-run-x") for name in on_disk)
    # The place has ended what was left there, and is gone.
    assert left.wait(10) == -signal.SIGKILL
    assert not here.folder.exists()


def test_a_file_in_use_is_not_left(tmp_path: Path) -> None:
    shared = Path(f"/dev/shm/asyncep-test-open-{os.getpid()}")
    here = Place(tmp_path)
    with shared.open("w"):
        assert shared.name not in here.left_on_disk()
    assert shared.name in here.left_on_disk()
    shared.unlink()


def test_a_full_disk_is_full(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "small", "1m") as folder:
            filler = fill(folder)
            assert 900_000 < filler.stat().st_size <= 1 << 20
            with pytest.raises(OSError, match="No space left"):
                (folder / "more").write_bytes(b"x" * 8192)
    except PermissionError as error:
        pytest.skip(str(error))
    assert not os.path.ismount(tmp_path / "small")
