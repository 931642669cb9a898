"""The HTTP server: `pyruntime.serve.lifecycle.serve(path)` runs it."""
