"""A real server process around the fake model: `python -m tests.serve.fake_server [options]`."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from pyruntime.engine.engine import Engine, EngineConfig
from pyruntime.serve.lifecycle import ServeConfig, run
from tests.engine.fakes import FakeModel, runtime_with_text, spec


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-waiting", type=int, default=16)
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    parser.add_argument("--stall-seconds", type=float, default=30.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    engine_config = EngineConfig(max_num_seqs=args.max_num_seqs)
    config = ServeConfig(
        port=0,
        max_waiting=args.max_waiting,
        drain_seconds=args.drain_seconds,
        stall_seconds=args.stall_seconds,
        engine=engine_config,
    )
    with tempfile.TemporaryDirectory() as folder:

        def load() -> Engine:
            time.sleep(args.load_seconds)
            model = FakeModel(args.step_seconds)
            runtime = runtime_with_text(Path(folder), model=model, spec=spec(max_positions=4096))
            return Engine(runtime, engine_config)  # type: ignore[arg-type]

        return run(load, "fake", config)


if __name__ == "__main__":
    sys.exit(main())
