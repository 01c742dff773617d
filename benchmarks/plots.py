"""Curves of a section, as a picture beside its table. Needs matplotlib (``pip install imds[plot]``)."""

from __future__ import annotations

import importlib
from pathlib import Path

from table import Section


def draw(section: Section, path: Path) -> bool:
    """Draw the section's curves, a line for each server and curve; return False without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rows = [row for row in section.rows if row.curve]
    for row in rows:
        for server in row.runs:
            lines.setdefault((row.curve, server), []).append((row.x, row.median(server)))
    curves = list(dict.fromkeys(row.curve for row in rows))
    styles = dict(zip(dict.fromkeys(server for _, server in lines), ("-o", "--s", ":^", "-.d"), strict=False))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for (curve, server), points in lines.items():
        colour = f"C{curves.index(curve)}"
        axes.plot(
            *zip(*points, strict=True), styles.get(server, "-"), color=colour, label=f"{server}: {curve}"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(section.axis)
    axes.set_ylabel(rows[0].unit)
    axes.set_title(section.title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return True
