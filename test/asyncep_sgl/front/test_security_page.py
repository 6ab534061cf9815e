"""docs/use/security.md says of each endpoint what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from asyncep_sgl.front.endpoints import ENDPOINTS

PAGE = Path(__file__).parents[3] / "docs" / "use" / "security.md"


def rows() -> dict[str, str]:
    """The page's table: who may call, by endpoint."""
    section = PAGE.read_text().split("## Endpoints")[1].split("## ")[0]
    table: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 and cells[0].startswith("`"):
            for path in re.findall(r"`([^`]+)`", cells[0]):
                assert path not in table, f"{path} stands twice"
                table[path] = cells[1]
    return table


def test_the_table_is_the_allow_list() -> None:
    expected = {
        path: rule.access.value + (f": {rule.reason}" if rule.reason else "") for path, rule in ENDPOINTS.items()
    }
    assert rows() == expected
