"""A sweep of a language model as people read it, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyruntime.profile.page import Page, Point, busy

if TYPE_CHECKING:
    from pyruntime.profile.sweep import Report, Row


def page(report: Report) -> Page:
    """Table and plot."""
    reference = _reference(report)
    rows = [_cells(report, row, reference) for row in report.rows]
    points = [
        Point(
            f"{row.value:.3g}",
            row.quality.accuracy,
            1 - row.prefill.macs_saved,
            1 - row.prefill.time_saved,
        )
        for row in report.rows
        if row.value is not None
    ]
    return Page(
        title=_title(report),
        table=[list(rows[0]), *(list(row.values()) for row in rows)],
        notes=_notes(report),
        accuracy="next-token accuracy",
        labels=report.axis,
        points=points,
    )


def plain(report: Report) -> dict[str, Any]:
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
    return {"axis": report.axis, "setting": report.setting, "noise": report.noise, "rows": rows}


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
        *busy(report.noise),
    ]
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
