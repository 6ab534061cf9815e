"""The house as `docs/internals/structure.md` draws it: which room imports which, and no circles."""

from __future__ import annotations

import ast
import graphlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "internals" / "structure.md").read_text()
PACKAGES = {
    "asyncep": ROOT / "python" / "asyncep",
    "asyncep_kernels": ROOT / "kernels" / "asyncep_kernels",
    "asyncep_router": ROOT / "router" / "asyncep_router",
    "asyncep_sgl": ROOT / "asyncep_sgl",
}
# Packages that each may import.
BELOW = {
    "asyncep": {"asyncep_kernels", "asyncep_router", "asyncep_sgl"},
    "asyncep_sgl": {"asyncep_kernels", "asyncep_router"},
    "asyncep_router": set(),
    "asyncep_kernels": set(),
}


@cache
def modules(package: str) -> dict[str, Path]:
    folder = PACKAGES[package]
    found = {}
    for file in folder.rglob("*.py"):
        name = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = file
    return found


@cache
def imported(file: Path, *, for_types: bool = True) -> frozenset[str]:
    """Modules of ours that a file imports anywhere in it, each by its whole name.

    Args:
        for_types: also what only a type checker imports.
    """
    tree = ast.parse(file.read_text())
    if not for_types:
        tree = _Executed().visit(tree)
    ours = _ours()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in ours}
        elif isinstance(node, ast.ImportFrom) and node.module in ours:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & ours) | ({node.module} if whole - ours else set())
    return frozenset(found)


@cache
def _ours() -> frozenset[str]:
    return frozenset(name for package in PACKAGES for name in modules(package))


class _Executed(ast.NodeTransformer):
    """Leaves out what stands under ``if TYPE_CHECKING``."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def arrows(package: str, folder: str = "") -> dict[str, set[str]]:
    """For each room of a package, or of a folder in it, the other rooms there that it imports."""
    prefix = f"{package}.{folder}." if folder else f"{package}."
    found: dict[str, set[str]] = {}
    for name, file in modules(package).items():
        if not name.startswith(prefix):
            continue
        room = name.removeprefix(prefix).split(".")[0]
        others = {other.removeprefix(prefix).split(".")[0] for other in imported(file) if other.startswith(prefix)}
        found.setdefault(room, set()).update(others - {room})
    return found


def stated(heading: str) -> dict[str, set[str]]:
    """The rooms of the tables under a heading, with those that each may import."""
    section = PAGE.split(f"### {heading}")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `([a-z_/]+?)(?:/|\.py)` \| ([^|]*)\|", section, re.MULTILINE)
    return {room: set(re.findall(r"`([a-z_]+)`", imports)) for room, imports in rows}


@pytest.mark.parametrize("package", ["asyncep", "asyncep_sgl"])
def test_rooms_import_what_the_page_states(package: str) -> None:
    said = {room: imports for room, imports in stated(f"`{package}`").items() if "/" not in room}
    drawn = {room: imports for room, imports in arrows(package).items() if not room.startswith("__")}
    assert drawn == said


def test_rooms_of_the_experts_import_what_the_page_states() -> None:
    rows = stated("`asyncep_sgl`").items()
    said = {room.removeprefix("experts/"): imports for room, imports in rows if room.startswith("experts/")}
    drawn = arrows("asyncep_sgl", "experts")
    assert {room: imports for room, imports in drawn.items() if room not in ("join", "start")} == said


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below(package: str) -> None:
    for name, file in modules(package).items():
        others = {other.split(".")[0] for other in imported(file)} - {package}
        assert others <= BELOW[package], name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_in_a_circle(package: str) -> None:
    graph = {name: set(imported(file, for_types=False)) - {name} for name, file in modules(package).items()}
    # Raises with the circle if there is one.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_a_room_has_at_most_half_the_arrows_it_had() -> None:
    """84 when all modules of `asyncep_sgl` lay flat."""
    assert sum(len(imports) for imports in arrows("asyncep_sgl").values()) <= 42


@pytest.mark.parametrize("package", PACKAGES)
def test_no_short_file_only_forwards(package: str) -> None:
    for name, file in modules(package).items():
        text = file.read_text()
        kinds = {type(node) for node in ast.parse(text).body} - {ast.Expr, ast.Import, ast.ImportFrom}
        assert file.name in ("__init__.py", "__main__.py") or kinds or text.count("\n") >= 40, name


def test_tests_mirror_the_source() -> None:
    for package in PACKAGES:
        rooms = set(arrows(package)) | {"router_http"}
        folders = {folder.name for folder in (ROOT / "test" / package).iterdir() if folder.is_dir()} - {"__pycache__"}
        assert folders <= rooms, package


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


def named_pages(file: Path) -> set[Path]:
    """The pages that a file names: in backticks or in words from the root, as a link from where it stands."""
    text = file.read_text()
    found = {ROOT / name for name in re.findall(r"\bdocs/[a-z_/]+\.md\b", text) if file.suffix != ".md"}
    if file.suffix == ".md":
        found |= {ROOT / name for name in re.findall(r"`(docs/[a-z_/]+\.md)`", text)}
        found |= {file.parent / name for name in re.findall(r"\]\(([^):#]+?)(?:#[^)]*)?\)", text)}
    return found


def test_every_page_that_is_named_is_there() -> None:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile"]
    for folder in ("docs", "asyncep_sgl", "router", "kernels", "python", "bench", "test"):
        files += [file for kind in ("*.md", "*.py") for file in (ROOT / folder).rglob(kind)]
    missing = {f"{file.relative_to(ROOT)}: {page}" for file in files for page in named_pages(file) if not page.exists()}
    assert not missing
