"""The claims of the benches' last runs, kept in docs/results/records/ and as a table in docs/results/index.md.

    python bench/claims.py            # takes the records of bench/out/, then writes the table
    python bench/claims.py --check    # exit status 1 if the page is not what the records say

Of each record of `bench/out/` only what is claimed is kept: machine, versions, date, and each claim with its value and
what was wanted. A quick run shows nothing and is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from records import OUT

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECORDS, PAGE = RESULTS / "records", RESULTS / "index.md"
_KEPT = ("bench", "when", "machine", "versions", "python", "seed", "claims")
_BEGIN, _END = "<!-- claims -->\n", "<!-- /claims -->"


def take(records: Path) -> list[str]:
    """Keeps the claims of every record that has some; returns their names."""
    taken = []
    for file in sorted(records.glob("*.json")):
        record = json.loads(file.read_text())
        if isinstance(record, dict) and record.get("claims") and not record.get("quick", "-quick" in file.stem):
            RECORDS.mkdir(exist_ok=True)
            kept = {name: record.get(name) for name in _KEPT}
            (RECORDS / file.name).write_text(json.dumps(kept, indent=1) + "\n")
            taken.append(file.stem)
    return taken


def table(records: list[dict[str, Any]]) -> str:
    """A row for each claim, short ones in bold."""
    lines = ["| bench | claim | value | wanted | date, machine |", "|---|---|---|---|---|"]
    for record in records:
        machine = record["machine"]
        where = f"{record['when'][:10]}, {machine['cores']} cores of {machine['cpu']}"
        for claim in record["claims"]:
            value = f"{claim['value']:.4g} {claim['unit']}".strip()
            sign = "≥" if claim["at_least"] else "≤"
            shown = value if claim["holds"] else f"**{value}**"
            lines.append(f"| {record['bench']} | {claim['name']} | {shown} | {sign} {claim['wanted']:.4g} | {where} |")
            where = ""
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page's text with the table that the kept records make."""
    records = [json.loads(file.read_text()) for file in sorted(RECORDS.glob("*.json"))]
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + table(records) + _END + rest.partition(_END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description="Claims of the last runs, for docs/results/index.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the records say")
    options = parser.parse_args()
    if options.check:
        return int(page(PAGE.read_text()) != PAGE.read_text())
    print("taken:", ", ".join(take(OUT)) or "nothing new")
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
