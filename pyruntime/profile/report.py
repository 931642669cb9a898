"""A sweep as a table, as JSON, and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from pyruntime.profile.page import Histogram, Page, Reported

_BLUE = "#2563eb"


def text(report: Reported) -> str:
    """The table and what its columns mean."""
    page = report.page()
    blocks = [page.title, "", *_aligned(page.table), ""]
    if page.histogram is not None:
        blocks += [*_aligned(_shares(page.histogram)), ""]
    return "\n".join([*blocks, *page.notes])


def to_json(report: Reported) -> str:
    """Every number, unrounded."""
    return json.dumps(report.plain(), indent=1) + "\n"


def to_html(report: Reported) -> str:
    """A page with the table and a plot of accuracy against work and time."""
    page = report.page()
    notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in page.notes)
    histogram = "" if page.histogram is None else _bars(page.histogram)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>pyruntime profile</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }}
table {{ border-collapse: collapse; margin: 1.5rem 0 }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap }}
p {{ color: #555; margin: .3rem 0 }}
</style>
<h1>Accuracy against compute</h1>
<p>{html.escape(page.title)}</p>
{_plot(page)}
{_table(page.table)}{histogram}
{notes}
</html>
"""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row are headers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _shares(histogram: Histogram) -> list[list[str]]:
    rows = [[label, *(f"{share:.1%}" for share in shares)] for label, shares in histogram.rows]
    return [["left at", *histogram.levels], *rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    headers, *others = rows
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in others
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"


def _plot(page: Page) -> str:
    """Inline SVG: accuracy over the share of dense work (filled) and of dense time (hollow)."""
    points = page.points
    shares = [share for point in points for share in (point.work, point.time)]
    accuracy = [point.accuracy for point in points]
    left, right = min(shares) - 0.03, max(1.0, *shares) + 0.03
    low, high = min(accuracy) - 0.01, max(accuracy) + 0.01

    def x(share: float) -> float:
        return 60 + 560 * (share - left) / (right - left)

    def y(value: float) -> float:
        return 300 - 270 * (value - low) / (high - low)

    def dots(shares: Sequence[float], style: str) -> list[str]:
        return [
            f'<circle cx="{x(s):.1f}" cy="{y(a):.1f}" r="5" {style}/>'
            for s, a in zip(shares, accuracy, strict=True)
        ]

    parts = ['<svg viewBox="0 0 660 360" width="660" role="img">']
    for step in range(11):
        share = step / 10
        if left <= share <= right:
            parts.append(f'<path d="M{x(share):.1f} 30V300" stroke="#eee"/>'
                         f'<text x="{x(share):.1f}" y="318" text-anchor="middle" font-size="12">'
                         f"{share:.0%}</text>")  # fmt: skip
    for value in (min(accuracy), max(accuracy)):
        parts.append(f'<text x="52" y="{y(value) + 4:.1f}" text-anchor="end" font-size="12">'
                     f"{value:.1%}</text>")  # fmt: skip
    parts += dots([point.work for point in points], f'fill="{_BLUE}"')
    parts += dots([point.time for point in points], f'fill="none" stroke="{_BLUE}"')
    parts += [
        f'<text x="{x(point.work):.1f}" y="{y(point.accuracy) - 10:.1f}" text-anchor="middle" '
        f'font-size="11">{html.escape(point.label)}</text>'
        for point in points
    ]
    parts.append(f'<text x="340" y="345" text-anchor="middle" font-size="12">{page.accuracy} '
                 "over the share of dense MACs (filled) and of dense time (hollow); labels: "
                 f"{page.labels}</text></svg>")  # fmt: skip
    return "\n".join(parts)


def _bars(histogram: Histogram) -> str:
    """Inline SVG: a bar for every policy, cut where images left; early exits are dark."""
    step, last = 26, max(len(histogram.levels) - 1, 1)
    bottom = step * len(histogram.rows)
    parts = [f'\n<svg viewBox="0 0 660 {bottom + 30}" width="660" role="img">']
    for number, (label, shares) in enumerate(histogram.rows):
        left = 120.0
        parts.append(f'<text x="112" y="{number * step + 15}" text-anchor="end" font-size="12">'
                     f"{html.escape(label)}</text>")  # fmt: skip
        for level, share in enumerate(shares):
            title = f"{html.escape(histogram.levels[level])}: {share:.1%}"
            place = f'x="{left:.1f}" y="{number * step}" width="{500 * share:.1f}" height="20"'
            paint = f'fill="{_BLUE}" fill-opacity="{1 - 0.85 * level / last:.2f}"'
            parts.append(f"<rect {place} {paint}><title>{title}</title></rect>")
            left += 500 * share
    parts.append(f'<text x="370" y="{bottom + 18}" text-anchor="middle" font-size="12">'
                 "where images left: the earlier, the darker</text></svg>")  # fmt: skip
    return "\n".join(parts)
