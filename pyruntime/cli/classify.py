"""`pyruntime classify`: what images show, and what it cost to see it."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyruntime.cli import policies, words
from pyruntime.cli.regions import RegionFiles
from pyruntime.engine.classification import Classification
from pyruntime.engine.classifier import Classifier
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy


def classify(args: argparse.Namespace) -> int:
    """One block per image as it is done, then one line of totals; or one JSON object."""
    policy = ComputePolicy(
        budget=args.budget,
        exit=None if args.exit is None else policies.exits(args.exit),
        scales=None if args.scales is None else policies.scales(args.scales),
    )
    files = None if args.regions is None else RegionFiles(args.regions, args.images)
    results: list[Classification] = []
    drawn: list[Path] = []
    options = {"top": args.top, "native": args.native, "max_patches": args.max_patches}
    with Classifier(args.model, **options) as classifier:
        if files is not None and classifier.runtime.spec.scales is None:
            raise InvalidInput("--regions: this model has one scale only")
        with contextlib.closing(classifier.stream(args.images, policy)) as answers:
            for number, (path, result) in enumerate(zip(args.images, answers, strict=True)):
                results.append(result)
                if not args.json:
                    print(words.line(str(path), result), flush=True)
                if files is not None:
                    drawn.append(files.draw(number, classifier, result))
    if args.json:
        print(json.dumps(_report(args.images, results, drawn), indent=1))
        return 0
    if len(results) > 1:
        print(_total(results))
    for place in drawn:
        print(f"wrote {place}")
    return 0


def _total(results: Sequence[Classification]) -> str:
    count = len(results)
    executed = sum(result.macs for result in results)
    dense = sum(result.macs_dense for result in results)
    seen = ""
    if results[0].exits:
        levels = sum(result.level for result in results) / count
        seen = f"mean level {levels:.2f} of {results[0].exits}, "
    if results[0].stops is not None:
        tokens, whole = (
            sum(each) / count
            for each in zip(*((r.tokens, r.tokens_dense) for r in results), strict=True)
        )
        seen += f"mean {tokens:.1f} of {whole:.1f} tokens, "
    total = words.macs(executed, dense)
    return f"\n{count} images, {seen}{total}, mean compute {executed / dense:.1%}"


def _report(
    images: Sequence[Path], results: Sequence[Classification], drawn: Sequence[Path]
) -> dict[str, Any]:
    """Plain JSON types."""
    executed = sum(result.macs for result in results)
    dense = sum(result.macs_dense for result in results)
    facts = [_facts(str(path), result) for path, result in zip(images, results, strict=True)]
    for one, place in zip(facts, drawn, strict=False):
        one["drawn"] = str(place)
    total = {
        "images": len(results),
        "macs": executed,
        "macs_dense": dense,
        "compute": executed / dense,
    }
    return {"images": facts, "total": total}


def _facts(path: str, result: Classification) -> dict[str, Any]:
    regions = result.regions
    return {
        "image": path,
        "top": [
            {"index": label.index, "name": label.name, "probability": label.probability}
            for label in result.top
        ],
        "level": result.level,
        "exits": result.exits,
        "tokens": result.tokens,
        "tokens_dense": result.tokens_dense,
        "fine_regions": None if regions is None else regions.tolist(),
        "macs": result.macs,
        "macs_dense": result.macs_dense,
        "compute": result.compute,
        "queue_seconds": result.queue_seconds,
        "run_seconds": result.run_seconds,
    }
