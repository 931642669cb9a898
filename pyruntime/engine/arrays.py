"""Arrays of other libraries as tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput

_CPU, _PINNED = 1, 3  # device types of DLPack


class Array(Protocol):
    """NumPy, CuPy and whatever else has DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


def as_tensor(name: str, array: object) -> Tensor:
    """A tensor on the CPU, outside of autograd; it shares the array's memory where it can.

    Args:
        name: what errors call it.

    Raises:
        InvalidInput: no array, or one of a device or layout that torch cannot use.
    """
    if isinstance(array, Tensor):
        return array.detach().cpu()
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise InvalidInput(f"{name}: expected an array, got {type(array).__name__}")
    device, _ = array.__dlpack_device__()
    if device not in (_CPU, _PINNED) and not torch.cuda.is_available():
        raise InvalidInput(f"{name}: is on a device torch cannot use here; copy it to the host")
    copy = getattr(array, "copy", None)
    # Torch 2.13 aborts the process on a stride that runs backwards.
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()) and copy is not None:
        array = copy()
    try:
        return torch.utils.dlpack.from_dlpack(array).cpu()
    except (BufferError, ValueError, TypeError, RuntimeError) as error:
        if copy is None or not isinstance(error, BufferError):
            raise InvalidInput(f"{name}: cannot be read: {error}") from None
    return torch.utils.dlpack.from_dlpack(copy()).cpu()  # a copy of read-only memory is not
