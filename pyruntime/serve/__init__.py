"""The HTTP server. `serve(path)` runs it; the rest of the package is how."""

from __future__ import annotations

from pyruntime.errors import Unavailable

try:
    from pyruntime.serve.lifecycle import ServeConfig, serve
except ModuleNotFoundError as error:
    if error.name not in ("starlette", "uvicorn", "pydantic", "orjson"):
        raise
    raise Unavailable(
        f"serving needs the package `{error.name}`: pip install 'pyruntime[serve]'"
    ) from error

__all__ = ["ServeConfig", "serve"]
