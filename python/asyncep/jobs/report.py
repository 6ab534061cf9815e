"""What a job came to: lines for the terminal, figures as JSON, a page with confusion matrix and calibration plot."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncep.jobs.spec import JobResult
from asyncep.own_files import new_file
from asyncep.tasks.summary import BINS, Summary

_TEMPLATE = "report.html.j2"
_MOST_LABELS_DRAWN = 40


def figures_of(result: JobResult, peak: float | None = None) -> dict[str, Any]:
    """The job's figures, as the command's last line has them; what is not known is left out.

    Args:
        peak: FLOPs a second at best of what it ran on, for MFU.
    """
    summary = result.summary
    seconds, tokens = result.total("seconds"), result.total("tokens")
    figures: dict[str, Any] = {
        "rows": summary.rows,
        "errors": summary.errors,
        "runs": len(result.runs),
        "seconds": round(seconds, 3),
        # Not the runs' rows added up: what a killed run had not written yet is in the next one's again.
        "rows_per_s": round(summary.rows / seconds, 3) if seconds else None,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "tokens": int(tokens),
        "prompts_computed": int(result.total("prompts")),
        "cached_tokens_share": round(result.total("cached") / tokens, 4) if tokens else None,
        "possible_cached_share": round(result.total("possible_cached") / tokens, 4) if tokens else None,
    }
    if flops := result.total("flops"):
        figures["flops"] = int(flops)
        figures["flops_without_cache"] = int(result.total("full_flops"))
        if peak:
            figures["mfu"] = round(flops / seconds / peak, 4)
    if summary.accuracy is not None:
        figures["accuracy"] = round(summary.accuracy, 5)
        figures["accuracy_standard_error"] = round(summary.accuracy_error or 0.0, 5)
        figures["macro_f1"] = round(summary.macro_f1 or 0.0, 5)
        figures["calibration_error"] = round(summary.calibration_error or 0.0, 5)
    return {name: value for name, value in figures.items() if value is not None}


def text_report(result: JobResult, peak: float | None = None) -> list[str]:
    """Lines for the terminal, the confusion table left out (`Summary.table` is it)."""
    found = figures_of(result, peak)
    lines = []
    if "accuracy" in found:
        lines.append(
            f"accuracy {found['accuracy']:.3f} (standard error {found['accuracy_standard_error']:.3f}), "
            f"macro F1 {found['macro_f1']:.3f}, calibration error {found['calibration_error']:.3f}"
        )
    for reason, count in result.summary.reasons.most_common(3):
        lines.append(f"{count} x {reason}")
    speed = f"{found.get('rows_per_s', 0):,.1f} rows/s, {found.get('tokens_per_s', 0):,.0f} tokens/s"
    lines.append(f"{speed}, {found.get('cached_tokens_share', 0):.1%} of the tokens from the prefix cache")
    if "flops" in found:
        saved = 1 - found["flops"] / found["flops_without_cache"]
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        lines.append(f"{_flops(found['flops'])} computed, {saved:.1%} saved by the cache{mfu}")
    return lines


def html_report(result: JobResult, peak: float | None = None) -> str:
    """The report as one page without links: readable anywhere, years later."""
    from jinja2 import Environment, PackageLoader

    summary = result.summary
    environment = Environment(loader=PackageLoader("asyncep.jobs", "."), autoescape=True, trim_blocks=True)
    return environment.get_template(_TEMPLATE).render(
        figures=figures_of(result, peak),
        settings=result.settings,
        output=str(result.output),
        runs=result.runs,
        summary=summary,
        labels=summary.known_labels(),
        reasons=summary.reasons.most_common(),
        confusion=_picture(_draw_confusion, summary) if 0 < len(summary.known_labels()) <= _MOST_LABELS_DRAWN else None,
        calibration=_picture(_draw_calibration, summary),
        flops=_flops,
    )


def write_html(path: Path, result: JobResult, peak: float | None = None, *, overwrite: bool = False) -> None:
    """Writes the report.

    Raises:
        OutputError: something stands there already.
    """
    with new_file("--report", path, overwrite=overwrite) as file:
        file.write(html_report(result, peak).encode())


def _flops(count: float) -> str:
    """With a prefix: 1.23 TFLOP."""
    power = min(6, int(math.log10(count)) // 3) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def _picture(draw: Any, summary: Summary) -> str | None:
    """A drawing as an SVG in a data URL; None where there is nothing to judge."""
    if not summary.judged:
        return None
    # Not pyplot: it has state of its own and looks for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure, summary)
    raw = io.BytesIO()
    figure.savefig(raw, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(raw.getvalue()).decode()


def _draw_confusion(figure: Any, summary: Summary) -> None:
    golds, labels = _with_rows(summary), list(summary.labels)
    shares = []
    for gold in golds:
        counts = [summary.pairs[gold, label] for label in labels]
        shares.append([count / sum(counts) for count in counts])
    size = 2.5 + 0.55 * max(len(golds), len(labels))
    figure.set_size_inches(size + 1, size)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(golds)), golds)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true label")
    for y, gold in enumerate(golds):
        for x, label in enumerate(labels):
            if count := summary.pairs[gold, label]:
                axes.text(x, y, count, ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")


def _with_rows(summary: Summary) -> Sequence[str]:
    return [gold for gold in summary.known_labels() if any(summary.pairs[gold, label] for label in summary.labels)]


def _draw_calibration(figure: Any, summary: Summary) -> None:
    figure.set_size_inches(5, 5)
    axes = figure.add_subplot()
    filled = [entry for entry in summary.bins if entry.rows]
    most = max(entry.rows for entry in filled)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="dotted")
    axes.bar(
        [(i + 0.5) / BINS for i in range(BINS)],
        [entry.rows / most for entry in summary.bins],
        width=0.9 / BINS,
        color="lightgrey",
        label=f"rows (tallest: {most})",
    )
    axes.plot(
        [entry.confidence / entry.rows for entry in filled],
        [entry.hits / entry.rows for entry in filled],
        marker="o",
        label="accuracy",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of the chosen label", title="calibration")
    axes.legend(loc="upper left")
