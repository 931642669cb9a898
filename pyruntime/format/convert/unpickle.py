"""torch.save archives with foreign objects in them: tensors come out, nothing else is brought in.

Training code saves its settings beside the weights: argparse namespaces, OmegaConf trees, numpy
scalars. torch's own restricted loader refuses such a file whole. Here every class and function that
is not on a short list becomes a `Stub`, which swallows whatever the pickle does to it. Nothing is
imported, and nothing is called but what rebuilds tensors and containers.
"""

from __future__ import annotations

import collections
import pickle
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyruntime.errors import ConversionError
from pyruntime.format.convert.checkpoint import require_archive

# What reading a file raises that was cut off, altered, or made to do harm.
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError,
    TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


class Stub:
    """Stands for an object of a class that is not read; made classes have that one's name."""

    def __new__(cls, *_: Any, **__: Any) -> Stub:
        """Whatever the arguments: they are dropped."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Stub:
        """What a made-up function returns."""
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Drop it: pickled lists of a foreign class call this."""

    def extend(self, _: Any) -> None:
        """Drop them."""


class _Allowed:
    """A function that a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, _: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name} of a function")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor of a {type(storage).__name__}")
    made: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return made


def _parameter(data: Any, *_: Any) -> Any:
    return data


_ALLOWED: Mapping[tuple[str, str], Any] = types.MappingProxyType({
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_parameter),
    ("torch", "Size"): torch.Size,
})  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The only door to the outside: what is not on the list is made up."""
        known = _ALLOWED.get((module, name))
        if known is not None:
            return known
        # Not getattr, which would import the parts of torch that load lazily.
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        return type(f"{module}.{name}", (Stub,), {})


def load(path: Path) -> dict[Any, Any]:
    """The dictionary that a torch.save archive holds, tensors mapped from the file.

    Raises:
        ConversionError: another kind of file, a damaged one, or no dictionary.
    """
    require_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load would hand a compiled program to its own interpreter.
            if any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist()):
                raise ConversionError(f"{path}: a TorchScript program; only tensors are read")
        # torch takes a pickle module for its class Unpickler, and adds the mapped storages.
        module: Any = types.SimpleNamespace(Unpickler=_Unpickler, __name__=__name__)
        data = torch.load(
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module
        )
    except _DAMAGE as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path}: damaged torch file: {first}") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ConversionError(f"{path}: holds a {kind}, expected a dictionary of tensors")
    return data
