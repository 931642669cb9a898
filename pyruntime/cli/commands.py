"""One function per command. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyruntime.cli.bar import progress_bar
from pyruntime.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from pyruntime.engine.runtime import Runtime
    from pyruntime.profile.data import Corpus


def convert(args: argparse.Namespace) -> int:
    from pyruntime.format.convert import convert

    with progress_bar("converting") as progress:
        report = convert(
            args.src,
            args.dst,
            dtype=args.dtype,
            quantize=args.quantize,
            base=args.base,
            sidecar=args.sidecar,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(report)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from pyruntime.format.inspect import describe, text

    print(json.dumps(describe(args.model), indent=1) if args.json else text(args.model))
    return 0


def generate(args: argparse.Namespace) -> int:
    from pyruntime.cli.generate import generate

    return generate(args)


def calibrate(args: argparse.Namespace) -> int:
    from pyruntime.engine.runtime import load
    from pyruntime.format.load import write_calibration
    from pyruntime.profile.calibrate import calibrate

    runtime = load(args.model)
    with progress_bar("calibrating") as progress:
        found = calibrate(
            runtime,
            _corpus(args, runtime),
            default_budget=args.default_budget,
            max_drop=args.max_drop,
            progress=progress,
        )
    write_calibration(args.model, found.record)
    print("budget   kept  accuracy")
    for budget, kept, quality in zip(
        found.record["budgets"], found.record["kept"], found.qualities, strict=True
    ):
        chosen = "  default" if budget == found.record["default_budget"] else ""
        print(f"{budget:6.2f}  {kept:5.3f}  {quality.accuracy:8.2%}{chosen}")
    print(
        f"{args.model}: calibrated on {found.record['tokens']} tokens, default budget "
        f"{found.record['default_budget']:g}"
    )
    return 0


def profile(args: argparse.Namespace) -> int:
    from pyruntime.cli import policies
    from pyruntime.engine.runtime import load
    from pyruntime.profile import report
    from pyruntime.profile.sweep import sweep

    axis, values = policies.sweep(args.sweep)
    runtime = load(args.model)
    with progress_bar("profiling") as progress:
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


def serve(args: argparse.Namespace) -> int:
    from pyruntime.engine.engine import EngineConfig

    try:
        from pyruntime.serve.lifecycle import serve
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"the server needs the package {error.name}: pip install 'pyruntime[serve]'"
        ) from None
    return serve(
        args.model,
        args.host,
        args.port,
        model_name=args.model_name,
        max_waiting=args.max_waiting,
        drain_seconds=args.drain_seconds,
        engine=EngineConfig(
            max_num_seqs=args.max_num_seqs,
            max_step_tokens=args.max_step_tokens,
            max_model_len=args.max_model_len,
            kv_bytes=args.kv_mib << 20,
        ),
    )


def bench(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[2] / "bench"
    scripts = sorted(path.stem for path in folder.glob("bench_*.py"))
    if not scripts:
        raise Unavailable("benchmarks come with the source: run this in a checkout")
    if args.name is None:
        print("\n".join(scripts))
        return 0
    if args.name not in scripts:
        raise InvalidInput(f"no benchmark {args.name!r}; there are {', '.join(scripts)}")
    command = [sys.executable, "-m", f"bench.{args.name}", *args.arguments]
    return subprocess.run(command, cwd=folder.parent, check=False).returncode


def doctor(args: argparse.Namespace) -> int:
    from pyruntime.cli.doctor import report

    print(report())
    return 0


def _corpus(args: argparse.Namespace, runtime: Runtime) -> Corpus:
    from pyruntime.profile.data import read_corpus

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
