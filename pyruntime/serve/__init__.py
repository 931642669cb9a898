"""The HTTP server. `serve(path)` runs it; the rest of the package is how."""

from __future__ import annotations

from pyruntime.serve.lifecycle import ServeConfig, serve

__all__ = ["ServeConfig", "serve"]
