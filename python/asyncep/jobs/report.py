"""What a job came to: lines for the terminal, figures as JSON, a page with confusion matrix and calibration plot."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyncep.files.kinds import FileFormat
from asyncep.jobs.estimate import flops_in_words
from asyncep.jobs.spec import JobResult
from asyncep.tasks.label_mass import little_mass
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
        # Above 1 the peak is another machine's, or was measured while others used this one.
        if peak and flops <= seconds * peak:
            figures["mfu"] = round(flops / seconds / peak, 4)
    if summary.accuracy is not None:
        figures["accuracy"] = round(summary.accuracy, 5)
        figures["accuracy_standard_error"] = round(summary.accuracy_error or 0.0, 5)
        figures["macro_f1"] = round(summary.macro_f1 or 0.0, 5)
        if summary.calibration_error is not None:
            figures["calibration_error"] = round(summary.calibration_error, 5)
    if summary.outside:
        figures["gold_outside_labels"] = sum(summary.outside.values())
    if summary.cut:
        figures["rows_cut"] = summary.cut
    if summary.mean_mass is not None:
        figures["label_mass"] = float(f"{summary.mean_mass:.3g}")
    return {name: value for name, value in figures.items() if value is not None}


def text_report(result: JobResult, peak: float | None = None) -> list[str]:
    """Lines for the terminal, the confusion table left out (`Summary.table` is it)."""
    found = figures_of(result, peak)
    lines = []
    if "accuracy" in found:
        what = "all labels of a row right" if result.summary.multi else "accuracy"
        error = f", calibration error {found['calibration_error']:.3f}" if "calibration_error" in found else ""
        lines.append(
            f"{what} {found['accuracy']:.3f} (standard error {found['accuracy_standard_error']:.3f}), "
            f"macro F1 {found['macro_f1']:.3f}{error}"
        )
    lines += warnings_of(result)
    for reason, count in result.summary.reasons.most_common(3):
        lines.append(f"{count} x {reason}")
    speed = f"{found.get('rows_per_s', 0):,.1f} rows/s, {found.get('tokens_per_s', 0):,.0f} tokens/s"
    lines.append(f"{speed}, {found.get('cached_tokens_share', 0):.1%} of the tokens from the prefix cache")
    if "flops" in found:
        saved = 1 - found["flops"] / found["flops_without_cache"]
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        lines.append(f"{flops_in_words(found['flops'])} computed, {saved:.1%} saved by the cache{mfu}")
        if peak and not mfu:
            lines.append(f"no MFU: the job was faster than the peak of {peak / 1e12:.3g} TFLOP/s; give --peak-tflops")
    return lines


def warnings_of(result: JobResult) -> list[str]:
    """What a person should know before the labels are used."""
    summary, lines = result.summary, []
    if (words := little_mass(summary.mean_mass)) is not None:
        lines.append(words)
    if summary.outside:
        most = ", ".join(f"{name!r} ({count:,})" for name, count in summary.outside.most_common(3))
        lines.append(
            f"{sum(summary.outside.values()):,} true labels are none of the labels, and count as wrong: {most}"
        )
    if summary.cut:
        lines.append(f"{summary.cut:,} rows were too long and were cut")
    return lines


def settings_in_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """What was asked, for a person: only what was given, or decides something."""
    text, gold, *keep = settings["fields"]
    chat, system = settings["chat"]
    other, below = settings["other"]
    first, count = settings["shard"]
    options = ", ".join(_reading_in_words(settings["read as"]))
    calibration = settings["calibration"]
    from_file = len(calibration) == 3 and isinstance(calibration[1], int)
    words = {
        "model": settings["model"],
        "input": settings["input"][0] + (f", {options}" if options else ""),
        "text": text,
        "true label": gold,
        "kept fields": ", ".join(keep),
        "rows": f"the first {settings['limit']:,}" if settings["limit"] is not None else "",
        "part of the rows": f"{first + 1} of {count}" if count > 1 else "",
        "labels": ", ".join(settings["labels"]),
        "descriptions": "\n".join(f"{label}: {words}" for label, words in settings["descriptions"].items()),
        "words of labels": "\n".join(f"{label}: {', '.join(words)}" for label, words in settings["words"].items()),
        "several labels a row": "yes" if settings["several labels a row"] else "",
        "thresholds": ", ".join(f"{label} {value:g}" for label, value in (settings["thresholds"] or {}).items()),
        "no label is sure": f"below {below:g}: {other}" if below is not None else "",
        "prompt": settings["template"],
        "examples in the prompt": "\n".join(f"{text} → {label}" for text, label in settings["examples"]),
        "calibrated on": calibration[0] if from_file else ", ".join(calibration),
        "chat format": f"yes; system message: {system}" if system else "yes" if chat else "",
        "texts that are too long": f"their {settings['truncate'][0]} is cut" if settings["truncate"] else "",
        "score of a label of several tokens": "the mean of its tokens" if settings["length"] == "mean" else "",
        "output": settings["format"],
    }
    return {name: value for name, value in words.items() if value}


def _reading_in_words(read_as: Mapping[str, Any]) -> Iterator[str]:
    """What was said of how the input is read, beyond its name."""
    if form := read_as.get("format"):
        yield f"read as {FileFormat(**form)}"
    if encoding := read_as.get("encoding"):
        yield f"in {encoding}"
    if delimiter := read_as.get("delimiter"):
        yield f"fields divided by {delimiter!r}"
    if (quote := read_as.get("quote", '"')) != '"':
        yield f"quoted by {quote}" if quote else "without quotes"
    if not read_as.get("header", True):
        yield "without a line of names"


def html_report(result: JobResult, peak: float | None = None) -> str:
    """The report as one page without links: readable anywhere, years later."""
    from jinja2 import Environment, PackageLoader

    summary = result.summary
    environment = Environment(loader=PackageLoader("asyncep.jobs", "."), autoescape=True, trim_blocks=True)
    return environment.get_template(_TEMPLATE).render(
        figures=figures_of(result, peak),
        settings=settings_in_words(result.settings),
        warnings=warnings_of(result),
        output=str(result.output),
        runs=result.runs,
        summary=summary,
        labels=summary.known_labels(),
        reasons=summary.reasons.most_common(),
        pictures=list(_pictures(summary)),
        flops=flops_in_words,
    )


def _picture(draw: Any, summary: Summary) -> str:
    """A drawing as an SVG in a data URL."""
    # Not pyplot: it has state of its own and looks for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure, summary)
    raw = io.BytesIO()
    figure.savefig(raw, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(raw.getvalue()).decode()


def _pictures(summary: Summary) -> Iterator[tuple[str, str]]:
    """Headings and drawings of what there is to draw."""
    few = len(summary.known_labels()) <= _MOST_LABELS_DRAWN
    if any(summary.certainty):
        yield "Certainty", _picture(_draw_certainty, summary)
    if summary.pairs and few:
        yield "Confusion", _picture(_draw_confusion, summary)
    if summary.pairs:
        yield "Calibration", _picture(_draw_calibration, summary)
    if summary.multi and summary.judged and few:
        yield "Precision and recall", _picture(_draw_labels, summary)


def _draw_certainty(figure: Any, summary: Summary) -> None:
    figure.set_size_inches(5, 3)
    axes = figure.add_subplot()
    axes.bar([(i + 0.5) / BINS for i in range(BINS)], summary.certainty, width=0.9 / BINS)
    what = "the most probable label" if summary.multi else "the chosen label"
    axes.set(xlim=(0, 1), xlabel=f"probability of {what}", ylabel="rows", title="how certain the labels are")


def _draw_labels(figure: Any, summary: Summary) -> None:
    labels = summary.known_labels()
    figure.set_size_inches(6, 1 + 0.4 * len(labels))
    axes = figure.add_subplot()
    for offset, name in ((-0.2, "precision"), (0.2, "recall")):
        values = [getattr(summary.judge(label), name) or 0.0 for label in labels]
        axes.barh([y + offset for y in range(len(labels))], values, height=0.36, label=name)
    axes.set_yticks(range(len(labels)), _plain(labels))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), title="precision and recall of each label")
    axes.legend(loc="lower right")


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
    axes.set_xticks(range(len(labels)), _plain(labels), rotation=45, ha="right")
    axes.set_yticks(range(len(golds)), _plain(golds))
    axes.set(xlabel="predicted", ylabel="true", title="share of each true label")
    for y, gold in enumerate(golds):
        for x, label in enumerate(labels):
            if count := summary.pairs[gold, label]:
                axes.text(x, y, count, ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")


def _plain(labels: Sequence[str]) -> list[str]:
    """Labels as they are: between two dollar signs a drawing would see a formula."""
    return [label.replace("$", r"\$") for label in labels]


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
