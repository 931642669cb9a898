"""`pyruntime calibrate` and `pyruntime profile`, for language models and for images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyruntime.cli import policies
from pyruntime.cli.bar import progress_bar
from pyruntime.engine.runtime import Runtime, load
from pyruntime.engine.vision import VisionRuntime, load_vision
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.format.manifest import read_manifest
from pyruntime.format.spec import VisionSpec
from pyruntime.profile import report
from pyruntime.profile.calibrate import Calibrated
from pyruntime.profile.calibrate import calibrate as calibrate_text
from pyruntime.profile.data import Corpus, read_corpus
from pyruntime.profile.image_data import ImageSet, read_images
from pyruntime.profile.page import Reported
from pyruntime.profile.sweep import sweep
from pyruntime.profile.vision_calibrate import calibrate_vision
from pyruntime.profile.vision_sweep import sweep_vision

# Options of one kind of model, with their defaults: None in the namespace is not given.
_TEXT: dict[str, Any] = {
    "tokens": 16384, "length": None, "mode": "calibrated", "call_tokens": 2048,
}  # fmt: skip
_IMAGES: dict[str, Any] = {"samples": None, "batch": 8}


def calibrate(args: argparse.Namespace) -> int:
    """Find thresholds, store them in the folder, and print what each budget keeps."""
    is_vision = _settle(args)
    options = {"default_budget": args.default_budget, "max_drop": args.max_drop}
    with progress_bar("calibrating") as progress:
        if is_vision:
            vision = load_vision(args.model)
            images = _images(args, vision)
            options["batch"] = args.batch
            found = calibrate_vision(vision, images, progress=progress, **options)
        else:
            runtime = load(args.model)
            corpus = _corpus(args, runtime)
            found = calibrate_text(runtime, corpus, progress=progress, **options)
    write_calibration(args.model, found.record)
    _print_calibration(args.model, found)
    return 0


def profile(args: argparse.Namespace) -> int:
    """Measure a sweep and show it."""
    is_vision = _settle(args)
    axis, values = policies.sweep(args.sweep)
    with progress_bar("profiling") as progress:
        result: Reported
        if is_vision:
            vision = load_vision(args.model)
            result = sweep_vision(
                vision,
                _images(args, vision),
                values,
                axis=axis,
                batch=args.batch,
                repeats=args.repeats,
                progress=progress,
            )
        else:
            runtime = load(args.model)
            result = sweep(
                runtime,
                _corpus(args, runtime),
                values,
                args.mode.split(","),
                axis=axis,
                call_tokens=args.call_tokens,
                repeats=args.repeats,
                progress=progress,
            )
    print(report.text(result))
    for path, render in ((args.json, report.to_json), (args.html, report.to_html)):
        if path is not None:
            path.write_text(render(result), encoding="utf-8")
            print(f"wrote {path}")
    return 0


def _settle(args: argparse.Namespace) -> bool:
    """Whether the folder holds a vision model. Fills in the defaults of its kind's options.

    Raises:
        InvalidInput: an option of the other kind.
    """
    is_vision = isinstance(read_manifest(args.model).spec, VisionSpec)
    own, other = (_IMAGES, _TEXT) if is_vision else (_TEXT, _IMAGES)
    for name in other:
        if getattr(args, name, None) is not None:
            kind = "classifies images" if is_vision else "is a language model"
            raise InvalidInput(f"--{name.replace('_', '-')} is set, but {args.model} {kind}")
    for name, default in own.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)
    return is_vision


def _print_calibration(model: Path, found: Calibrated) -> None:
    record = found.record
    print("budget   kept  accuracy")
    for budget, kept, quality in zip(
        record["budgets"], record["kept"], found.qualities, strict=True
    ):
        chosen = "  default" if budget == record["default_budget"] else ""
        print(f"{budget:6.3f}  {kept:5.3f}  {quality.accuracy:8.2%}{chosen}")
    amount = f"{record['samples']} images" if "samples" in record else f"{record['tokens']} tokens"
    default = record["default_budget"]
    chosen = "the checkpoint's own rule by default"
    if default is not None:
        chosen = f"default budget {default:g}"
    print(f"{model}: calibrated on {amount}, {chosen}")


def _images(args: argparse.Namespace, runtime: VisionRuntime) -> ImageSet:
    return read_images(_only(args.data), runtime.spec, limit=args.samples)


def _only(paths: Sequence[Path]) -> Path:
    if len(paths) != 1:
        raise InvalidInput(f"--data: expected one folder or .npz file of images, got {len(paths)}")
    return paths[0]


def _corpus(args: argparse.Namespace, runtime: Runtime) -> Corpus:
    longest = runtime.spec.max_positions
    length = min(512, longest) if args.length is None else args.length
    if length > longest:
        raise InvalidInput(f"--length {length}: the context of this model holds {longest}")
    return read_corpus(
        args.data,
        runtime.tokenizer,
        vocab_size=runtime.spec.vocab_size,
        length=length,
        limit=args.tokens,
    )
