"""Draws docs/pictures/*.dot as SVG that is legible on light and on dark pages, by graphviz.

    python scripts/draw_pictures.py [NAME ...]     # without a name: every picture

The house is drawn from the tables of docs/internals/structure.md. Each SVG names the digest of the text that it was
drawn from, so that a test notices a picture that is older than its text.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import networkx

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
STRUCTURE = ROOT / "docs" / "internals" / "structure.md"

# What a shape means, by the class that the text gives it, and its fill on light and on dark pages.
FILLS = {
    "plain": ("#eef1f6", "#2b303b"),
    "main": ("#d6e4ff", "#24406e"),
    "memory": ("#ffe9c7", "#5f4416"),
    "outside": ("#f7f7f7", "#1d2026"),
    "run": ("#d6e4ff", "#24406e"),
    "held": ("#dff3e2", "#24502c"),
    "move": ("#ffe9c7", "#5f4416"),
    "wait": ("#ffd4d4", "#6e2626"),
}
_INK, _LINE = ("#1b1f27", "#e6e9ef"), ("#5b6474", "#98a2b3")
# Cells of tables have no class in graphviz's output: each class is a colour that nothing else has, until it is drawn.
_MARKS = {name: f"#fe01{number:02x}" for number, name in enumerate(FILLS)}


def sources() -> dict[str, str]:
    """The text of each picture, by name."""
    texts = {file.stem: file.read_text() for file in sorted(PICTURES.glob("*.dot"))}
    return texts | {"house": house(STRUCTURE.read_text())}


def house(page: str) -> str:
    """The rooms of `asyncep_sgl` and their imports, without those that follow from others."""
    section = page.split("### `asyncep_sgl`")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \| ([^|]*)\|", section, re.MULTILINE)
    graph = networkx.DiGraph([(room, other) for room, text in rows for other in re.findall(r"`([a-z_]+)`", text)])
    arrows = "\n".join(f"{room} -> {other};" for room, other in sorted(networkx.transitive_reduction(graph).edges))
    return f"digraph house {{ node [shape=box style=filled]; nodesep=0.35; ranksep=0.45;\n{arrows}\n}}"


def digest(text: str) -> str:
    """What an SVG says of the text it was drawn from."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(text: str) -> str:
    """SVG of a picture's text."""
    import pygraphviz

    source = digest(text)
    for name, mark in _MARKS.items():
        text = text.replace(f'BGCOLOR="{name}"', f'BGCOLOR="{mark}"')
    graph = pygraphviz.AGraph(string=text)
    graph.graph_attr.update(fontname="Helvetica", fontsize="12", bgcolor="transparent", pad="0.15")
    graph.node_attr.update(fontname="Helvetica", fontsize="12", fillcolor=_MARKS["plain"], margin="0.14,0.08")
    graph.edge_attr.update(fontname="Helvetica", fontsize="10.5", arrowsize="0.7")
    svg = graph.draw(format="svg", prog="dot").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?|<title>.*?</title>\n?", "", svg, flags=re.DOTALL)
    for name, mark in _MARKS.items():
        svg = svg.replace(f'fill="{mark}"', f'class="{name}"')
    # What is left of colours is graphviz's default: the style says them, for light and dark.
    svg = re.sub(r' (?:stroke|fill)="(?:black|lightgr[ae]y)"', "", svg)
    return svg.replace("<g id=", f"<style>{_style()}</style>\n<!-- drawn from {source} -->\n<g id=", 1)


def _style() -> str:
    def rules(dark: int) -> str:
        ink, line = _INK[dark], _LINE[dark]
        # The class of a node is that of its group, and counts more than the "plain" that its shape has.
        fills = "".join(
            f"{shape}.{name},.node.{name} {shape}{{fill:{fill[dark]}}}"
            for name, fill in FILLS.items()
            for shape in ("path", "polygon", "ellipse")
        )
        return (
            f"text{{fill:{ink};font-family:Helvetica,Arial,sans-serif}}path,polygon,ellipse,polyline{{stroke:{line}}}"
            f".edge polygon{{fill:{line}}}.edge path,.cluster path,.cluster polygon{{fill:none}}{fills}"
        )

    return f"{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}"


def main() -> int:
    wanted = sys.argv[1:]
    known = sources()
    if unknown := set(wanted) - set(known):
        sys.exit(f"no picture {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in wanted or known:
        (PICTURES / f"{name}.svg").write_text(draw(known[name]))
        print(PICTURES / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
