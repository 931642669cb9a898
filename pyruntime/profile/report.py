"""A sweep as a table, as JSON, and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict

from pyruntime.profile.sweep import Report, Row

_BUSY = 0.1  # relative interquartile range of the times of one and the same computation


def text(report: Report) -> str:
    """The table and what its columns mean."""
    rows = _table(report)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([_title(report), "", *lines, "", *_notes(report)])


def to_json(report: Report) -> str:
    """Every number, unrounded."""
    rows = []
    for row in report.rows:
        prefill = row.prefill
        derived = {name: getattr(prefill, name) for name in ("macs_saved", "time_saved")}
        rows.append({
            report.axis: row.value, "mode": row.mode, "causal": row.causal,
            "quality": asdict(row.quality),
            "prefill": asdict(prefill) | derived | {"rho": prefill.realised},
        })  # fmt: skip
    whole = {"axis": report.axis, "setting": report.setting, "noise": report.noise, "rows": rows}
    return json.dumps(whole, indent=1) + "\n"


def to_html(report: Report) -> str:
    """A page with the table and a plot of accuracy against work and time."""
    headers, *rows = _table(report)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in _notes(report))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>pyruntime profile</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }}
table {{ border-collapse: collapse; margin: 1.5rem 0 }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
p {{ color: #555; margin: .3rem 0 }}
</style>
<h1>Accuracy against compute</h1>
<p>{html.escape(_title(report))}</p>
{_plot(report)}
<table><tr>{head}</tr>
{body}
</table>
{notes}
</html>
"""


def _title(report: Report) -> str:
    s = report.setting
    packing = f"; rows are packed below {s['packed_below']:.0%} kept" if s["gated"] else ""
    return (
        f"{s['model']}: {s['tokens']} tokens; prefill of {s['timed_sequences']} sequences, "
        f"{s['timed_tokens']} tokens, {s['dtype']}, {s['backend']}, {s['threads']} threads, "
        f"{s['processor']}{packing}"
    )


def _notes(report: Report) -> list[str]:
    gated = (
        "dense: the same weights without gates, the baseline of work and time. Gated weights were "
        f"trained with gates, so changes of accuracy are against the largest {report.axis}."
    )
    whole = "dense: the whole model, the baseline of accuracy, work and time."
    notes = [
        gated if report.setting["gated"] else whole,
        "MACs saved: exact, gates and keys/values counted, of the timed prefill. prefill: median "
        f"of {report.setting['repeats']} runs in turn with dense ones. ρ: time saved / MACs saved.",
    ]
    if report.noise > _BUSY:
        notes.append(
            f"This machine was busy: the middle half of the dense runs spans {report.noise:.0%} of "
            "their median. Conclude nothing from these times; repeat on an idle machine."
        )
    other = sorted({row.mode for row in report.rows if not row.causal})
    if other:
        notes.append(
            f"{', '.join(other)}: not causal. Later tokens and the other sequences of the call "
            "decide with, so generating token by token does not reproduce these rows."
        )
    return notes


def _reference(report: Report) -> float:
    rows = [row for row in report.rows if (row.value is not None) == report.setting["gated"]]
    return max(rows, key=lambda row: row.value or 0.0).quality.accuracy


def _table(report: Report) -> list[list[str]]:
    """Headers, then the cells of every row."""
    reference = _reference(report)
    rows = [_cells(report, row, reference) for row in report.rows]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def _cells(report: Report, row: Row, reference: float) -> dict[str, str]:
    """Cells by header; every row of a report has the same ones."""
    quality, prefill = row.quality, row.prefill
    cells = {
        report.axis: f"{row.value or 0:.3g}",
        "mode": row.mode if row.causal else f"{row.mode}*",
        "ppl": f"{quality.perplexity:.2f}",
        "accuracy": f"{quality.accuracy:.2%}",
        "change": f"{100 * (quality.accuracy - reference):+.2f}",
        "skipped": f"{quality.skipped_share:.1%}",
        "mean experts": f"{quality.experts_per_token or 0:.2f}",
        "MACs saved": f"{prefill.macs_saved:.1%}",
        "prefill": f"{1e3 * prefill.seconds:.1f} ms",
        "time saved": f"{prefill.time_saved:.1%}",
        "ρ": "–" if prefill.realised is None else f"{prefill.realised:.2f}",
    }
    if row.value is None:
        own = (report.axis, "change", "skipped", "MACs saved", "time saved")
        cells |= dict.fromkeys(own, "–")
    if quality.experts_per_token is None:
        del cells["mean experts"]
    elif not report.setting["gated"]:
        del cells["skipped"]
    return cells


def _plot(report: Report) -> str:
    """Inline SVG: accuracy over the share of dense work (filled) and of dense time (hollow)."""
    rows = [row for row in report.rows if row.value is not None]
    work = [1 - row.prefill.macs_saved for row in rows]
    spent = [1 - row.prefill.time_saved for row in rows]
    accuracy = [row.quality.accuracy for row in rows]
    left, right = min(work + spent) - 0.03, max(1.0, *work, *spent) + 0.03
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

    blue = "#2563eb"
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
    parts += dots(work, f'fill="{blue}"') + dots(spent, f'fill="none" stroke="{blue}"')
    parts += [
        f'<text x="{x(s):.1f}" y="{y(a) - 10:.1f}" text-anchor="middle" font-size="11">'
        f"{row.value:.3g}</text>"
        for s, a, row in zip(work, accuracy, rows, strict=True)
    ]
    parts.append('<text x="340" y="345" text-anchor="middle" font-size="12">next-token accuracy '
                 "over the share of dense MACs (filled) and of dense time (hollow); labels: "
                 f"{report.axis}</text></svg>")  # fmt: skip
    return "\n".join(parts)
