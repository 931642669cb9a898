"""The `pyruntime` command: one line per error, 1 for a refused request, 2 for a wrong option."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pyruntime.cli.options import parser
from pyruntime.errors import PyRuntimeError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PyRuntimeError as error:
        print(f"pyruntime: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"pyruntime: error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
