"""Every error a user can cause. Catch PyRuntimeError to catch them all."""

from __future__ import annotations


class PyRuntimeError(Exception):
    """Base of all errors raised on purpose: it names the thing, the expected and the actual."""


class InvalidInput(PyRuntimeError, ValueError):
    """An argument, request or token the runtime cannot accept."""


class FormatError(PyRuntimeError):
    """A folder in the runtime format that is damaged, incomplete or of an unknown version."""


class ConversionError(PyRuntimeError):
    """A checkpoint that cannot be converted. The destination has not been touched."""


class UnsupportedModel(ConversionError):
    """A checkpoint of an architecture, or with an option, that the runtime does not implement."""


class Unavailable(PyRuntimeError):
    """Something optional (a device, a package, a compiled backend) is missing on this machine."""
