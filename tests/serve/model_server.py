"""`python -m tests.serve.model_server FOLDER`: the product's own entry, on a free port."""

from __future__ import annotations

import logging
import sys

from pyruntime.serve.lifecycle import serve

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    sys.exit(serve(sys.argv[1], port=0, model_name="model"))
