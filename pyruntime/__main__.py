"""`python -m pyruntime` is the `pyruntime` command."""

from __future__ import annotations

import sys

from pyruntime.cli import main

sys.exit(main())
