"""A sweep of early exits and mixed scales as people read it, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyruntime.profile.page import Histogram, Page, Point, busy

if TYPE_CHECKING:
    from pyruntime.profile.vision_sweep import VisionReport, VisionRow


def page(report: VisionReport) -> Page:
    """Table, plot and where images left."""
    reference = report.rows[0].quality.accuracy
    rows = [_cells(report, row, reference) for row in report.rows]
    swept = report.rows[1:]
    exits = len(report.rows[0].quality.histogram) - 1
    return Page(
        title=_title(report),
        table=[list(rows[0]), *(list(row.values()) for row in rows)],
        notes=_notes(report),
        accuracy="accuracy",
        labels=report.axis,
        points=[
            Point(_label(row), row.quality.accuracy, 1 - row.quality.macs_saved,
                  1 - row.timed.time_saved)
            for row in swept
            if row.rule != "coarse"  # so far off that the others would lie on one spot
        ],
        histogram=None if not exits else Histogram(
            [*(f"exit {number}" for number in range(exits)), "final"],
            [(_label(row), row.quality.histogram) for row in swept],
        ),
    )  # fmt: skip


def plain(report: VisionReport) -> dict[str, Any]:
    """Every number, unrounded."""
    rows = []
    for row in report.rows:
        timed, quality = row.timed, row.quality
        rows.append({
            report.axis: row.value, "rule": row.rule,
            "quality": asdict(quality) | {"macs_saved": quality.macs_saved},
            "timed": asdict(timed) | {
                "macs_saved": timed.macs_saved, "time_saved": timed.time_saved,
                "ideal_share": row.ideal_share, "rho": row.realised, "rho_macs": timed.realised,
            },
        })  # fmt: skip
    return {"axis": report.axis, "setting": report.setting, "noise": report.noise, "rows": rows}


def _label(row: VisionRow) -> str:
    return row.rule if row.value is None else f"{row.value:.3g}"


def _title(report: VisionReport) -> str:
    s = report.setting
    parts = [f"{s['images']} images"]
    parts += [f"{s['exits']} exits ({s['criterion']})"] if s["exits"] else []
    parts += [f"mixed scales ({s['scales']})"] if s["scales"] else []
    return (
        f"{s['model']}: {', '.join(parts)}; time of "
        f"{s['timed_images']} images in batches of {s['batch']}, {s['dtype']}, {s['backend']}, "
        f"{s['threads']} threads, {s['processor']}"
    )


def _notes(report: VisionReport) -> list[str]:
    dense, levels = "the model without exits", " Levels count from 0."
    if report.setting["scales"]:
        dense = "all patches fine and no exits" if report.setting["exits"] else "all patches fine"
        tokens = (
            f" Tokens: patches of any size and prefix rows, {report.setting['tokens']} at most."
        )
        levels = tokens + (levels if report.setting["exits"] else "")
    notes = [
        f"dense: {dense}, the baseline of accuracy, work and time. own: the checkpoint's own rule."
        f"{levels}",
        "MACs saved: exact, heads and gates counted, of all images. time: median of "
        f"{report.setting['repeats']} runs in turn with dense ones. ECE: expected calibration "
        "error, 15 bins of equal numbers of images.",
        "ρ: time saved / the time that could be saved at best, every block and head taking its "
        "measured time for the images still there"
        + (", in proportion to their patches' work" if report.setting["scales"] else "")
        + ". ρ MACs: time saved / MACs saved of the timed "
        "images, as if all multiply-accumulates took the same time.",
    ]
    if any(row.quality.repo_metric is not None for row in report.rows):
        notes.append(
            "Mul-Adds: what JEI-DNN's code reports, which counts a linear layer once whatever the "
            "number of tokens; for comparison with the paper, not with the clock."
        )
    return notes + busy(report.noise)


def _cells(report: VisionReport, row: VisionRow, reference: float) -> dict[str, str]:
    """Cells by header; every row of a report has the same ones."""
    quality, timed = row.quality, row.timed
    dense = row.rule == "dense"
    cells = {
        report.axis: _label(row),
        "accuracy": f"{quality.accuracy:.2%}",
        "change": "–" if dense else f"{100 * (quality.accuracy - reference):+.2f}",
        "ECE": f"{quality.calibration_error:.3f}",
        "mean tokens": f"{quality.mean_tokens:.1f}",
        "mean level": f"{quality.mean_level:.2f}",
        "MACs saved": "–" if dense else f"{quality.macs_saved:.1%}",
        "Mul-Adds": f"{quality.repo_metric or 0:.1%}",
        "time": f"{1e3 * timed.seconds:.1f} ms",
        "time saved": "–" if dense else f"{timed.time_saved:.1%}",
        "ρ": _share(row.realised),
        "ρ MACs": _share(timed.realised),
    }
    if quality.repo_metric is None:
        del cells["Mul-Adds"]
    if not report.setting["scales"]:
        del cells["mean tokens"]
    if not report.setting["exits"]:
        del cells["mean level"]
    return cells


def _share(realised: float | None) -> str:
    return "–" if realised is None else f"{realised:.2f}"
