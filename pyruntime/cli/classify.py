"""`pyruntime classify`: what images show, and what it cost to see it."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from pyruntime.cli import policies
from pyruntime.engine.classification import Classification, Label
from pyruntime.engine.classifier import Classifier
from pyruntime.gates.policy import ComputePolicy

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def classify(args: argparse.Namespace) -> int:
    """One block per image as it is done, then one line of totals; or one JSON object."""
    policy = ComputePolicy(
        budget=args.budget, exit=None if args.exit is None else policies.exits(args.exit)
    )
    results: list[Classification] = []
    with (
        Classifier(args.model, top=args.top) as classifier,
        contextlib.closing(classifier.stream(args.images, policy)) as answers,
    ):
        for path, result in zip(args.images, answers, strict=True):
            results.append(result)
            if not args.json:
                print(_text(str(path), result), flush=True)
    executed = sum(result.macs for result in results)
    dense = sum(result.macs_dense for result in results)
    if args.json:
        images = [_facts(str(p), r) for p, r in zip(args.images, results, strict=True)]
        total = {
            "images": len(results),
            "macs": executed,
            "macs_dense": dense,
            "compute": executed / dense,
        }
        print(json.dumps({"images": images, "total": total}, indent=1))
    elif len(results) > 1:
        levels = sum(result.level for result in results) / len(results)
        print(
            f"\n{len(results)} images, mean level {levels:.2f} of {results[0].exits}, "
            f"{_macs(executed, dense)}, mean compute {executed / dense:.1%}"
        )
    return 0


def _text(path: str, result: Classification) -> str:
    lines = [
        f"{path}: {_name(result.top[0])} {result.probability:.1%}, level {result.level} of "
        f"{result.exits}, {_macs(result.macs, result.macs_dense)} ({result.compute:.1%}), "
        f"{result.run_seconds * 1e3:.1f} ms"
    ]
    lines += [f"  {label.probability:6.1%}  {_name(label)}" for label in result.top[1:]]
    return "\n".join(lines)


def _name(label: Label) -> str:
    return f"class {label.index}" if label.name is None else label.name


def _macs(executed: int, dense: int) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if dense >= s), (1.0, ""))
    return f"{executed / scale:.3g} of {dense / scale:.3g} {unit}MACs"


def _facts(path: str, result: Classification) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "image": path,
        "top": [
            {"index": label.index, "name": label.name, "probability": label.probability}
            for label in result.top
        ],
        "level": result.level,
        "exits": result.exits,
        "macs": result.macs,
        "macs_dense": result.macs_dense,
        "compute": result.compute,
        "queue_seconds": result.queue_seconds,
        "run_seconds": result.run_seconds,
    }
