"""The site builds, and what is drawn or generated is as new as what it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from draw_pictures import PICTURES, digest, sources

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sources())
def test_a_picture_is_as_new_as_its_text(name: str) -> None:
    svg = (PICTURES / f"{name}.svg").read_text()
    assert f"drawn from {digest(sources()[name])}" in svg, "run make pictures"
    assert "prefers-color-scheme:dark" in svg


def test_the_claims_in_the_page_are_those_of_the_records() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "claims.py"), "--check"])
    assert done.returncode == 0, "run make results"


def test_the_site_builds_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RoutingPolicy" in (tmp_path / "site" / "api" / "router.html").read_text()
