"""One function per command. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pyruntime.cli.bar import progress_bar
from pyruntime.errors import InvalidInput, Unavailable


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
            preprocess=args.preprocess,
            heads=args.heads,
            exit=args.exit,
            width_rule=args.width_rule,
            image_size=args.image_size,
            patch_size=args.patch_size,
            scales=args.scales,
            reduce=args.reduce,
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


def classify(args: argparse.Namespace) -> int:
    from pyruntime.cli.classify import classify

    return classify(args)


def calibrate(args: argparse.Namespace) -> int:
    from pyruntime.cli.measure import calibrate

    return calibrate(args)


def profile(args: argparse.Namespace) -> int:
    from pyruntime.cli.measure import profile

    return profile(args)


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
