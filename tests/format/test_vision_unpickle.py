"""Vision checkpoints are pickles of training code: none of it runs, whatever it is."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyruntime.errors import ConversionError
from pyruntime.format.convert import convert, unpickle
from tests.vision_checkpoints import OmegaConf, write_pth
from tests.vision_states import timm_state


class Call:
    """Unpickling this calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class State:
    """Unpickling this sets a state on what `function` returns."""

    def __init__(self, function: Any, state: Any) -> None:
        self._parts = function, (), state

    def __reduce__(self) -> tuple[Any, ...]:
        return self._parts


class Items(list[Any]):
    """A list and a dictionary of a class that is not there."""


class Table(dict[Any, Any]):
    """See Items."""


def archive(path: Path, data: bytes, name: str = "data.pkl") -> Path:
    """What torch.save writes, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"archive/{name}", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


def bombs(marker: Path) -> dict[str, Any]:
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "import": Call(__import__, "antigravity"),
        "attribute": Call(getattr, Call(__import__, "os"), "system"),
        "partial": Call(collections.namedtuple, "x", touch),
        "state": State(argparse.Namespace, {"__class__": Call(eval, touch)}),
        "nested": [{"a": (Call(eval, touch), {"b": Call(os.system, f"touch {marker}")})}],
        "torch.load": Call(torch.load, "/dev/null"),
        "hub": Call(torch.hub.load, str(marker.parent), "x"),
    }


@pytest.mark.parametrize("kind", [
    "os.system", "eval", "exec", "import", "attribute", "partial", "state", "nested", "torch.load",
    "hub",
])  # fmt: skip
@pytest.mark.parametrize("place", ["beside", "inside", "whole"])
def test_code_does_not_run(tmp_path: Path, kind: str, place: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "vit.pth"
    bomb, state = bombs(marker)[kind], timm_state(image=(8, 8))
    how = {"num_heads": 5}
    if place == "beside":
        write_pth(path, state, wrapper="model", beside={"args": bomb}, preprocess=how)
        convert(path, tmp_path / "dst")
    elif place == "inside":
        write_pth(path, state, wrapper="model", extra={"x": bomb}, preprocess=how)
        with pytest.raises(ConversionError, match="x is a "):
            convert(path, tmp_path / "dst")
    else:
        torch.save(bomb, path)
        with pytest.raises(ConversionError):
            unpickle.load(path)
        with pytest.raises(ConversionError):
            convert(path, tmp_path / "dst")
    assert not marker.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "code",
    [
        # Protocol 0 spellings of a call, of an instance, and of a class from the registry.
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x02\x82\x01.",
        # A state for a function on the list, for a class on the list, and for a made-up class.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00nameK\x01sb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x09\x00\x00\x00_functionK\x01s\x86b.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00nameK\x01sb.",
        b"\x80\x02cos\npath\n}X\x04\x00\x00\x00nameK\x01sb.",
        # A tensor of no storage, a storage that is none, a dotted name.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR.",
        b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.",
        # Nothing at all, no end, and a stack that is empty.
        b"", b"\x80\x02", b".",
    ],
)  # fmt: skip
def test_pickles_written_by_hand(tmp_path: Path, code: bytes) -> None:
    functions = dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor
    path = archive(tmp_path / "x.pth", code)
    with pytest.raises(ConversionError, match=str(path)):
        unpickle.load(path)
    assert (dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor) == functions


def test_functions_that_are_looked_up(tmp_path: Path) -> None:
    """getattr(__import__("os"), "system")("…") is made of stubs all the way."""
    marker = tmp_path / "marker"
    code = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch "
        + str(marker).encode()
        + b"'\ntR."
    )
    with pytest.raises(ConversionError, match=r"holds a builtins\.getattr"):
        unpickle.load(archive(tmp_path / "x.pth", code))
    assert not marker.exists()
    pickle.loads(code)
    assert marker.exists()  # it would have run


def test_random_pickles(tmp_path: Path) -> None:
    """Bytes changed at random are refused or read; nothing else is raised."""
    path = tmp_path / "x.pth"
    torch.save({"state": {"w": torch.ones(3)}, "args": OmegaConf(), "n": [1, 2.5, "x"]}, path)
    with zipfile.ZipFile(path) as file:
        record = next(name for name in file.namelist() if name.endswith("data.pkl"))
        whole = file.read(record)
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        data = bytearray(whole)
        for position in torch.randint(len(data), (3,), generator=random).tolist():
            data[position] = int(torch.randint(256, (1,), generator=random))
        try:
            unpickle.load(archive(path, bytes(data)))
        except ConversionError as error:
            assert str(path) in str(error)


def test_foreign_objects_are_stubs(tmp_path: Path) -> None:
    weights = torch.arange(6.0).view(2, 3)
    saved = {
        "net": collections.OrderedDict(w=weights, p=nn.Parameter(weights + 1), view=weights[:, 1:]),
        "args": argparse.Namespace(lr=0.1), "config": OmegaConf(), "items": Items([1, Path("x")]),
        "table": Table(a=1), "dtype": torch.bfloat16, "size": weights.shape, "set": {1, 2},
        "half": weights.bfloat16(),
    }  # fmt: skip
    torch.save(saved, tmp_path / "x.pth")
    found = unpickle.load(tmp_path / "x.pth")
    assert torch.equal(found["net"]["w"], weights)
    assert torch.equal(found["net"]["p"], weights + 1) and not found["net"]["p"].requires_grad
    assert torch.equal(found["net"]["view"], weights[:, 1:])
    assert torch.equal(found["half"], weights.bfloat16())
    assert (found["dtype"], found["size"]) == (torch.bfloat16, weights.shape)
    for key in ("args", "config", "items", "table", "set"):
        assert isinstance(found[key], unpickle.Stub), key
    assert type(found["args"]).__name__ == "argparse.Namespace"


def test_the_kind_of_a_whole_object_is_told(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(a=1), tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=r"holds a argparse\.Namespace, expected a dict"):
        unpickle.load(tmp_path / "x.pth")


def test_dictionaries_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"w": torch.ones(2), "patch_embed.proj.weight": torch.ones(2)}
    endless |= {"a": endless, "b": endless}
    torch.save({"model": endless}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="more than 8 dictionaries in each other"):
        convert(tmp_path / "x.pth", tmp_path / "dst")


def test_other_files(tmp_path: Path) -> None:
    archive(tmp_path / "program.pth", pickle.dumps({}), "constants.pkl")
    with pytest.raises(ConversionError, match="a TorchScript program"):
        unpickle.load(tmp_path / "program.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"w": torch.ones(2)}))
    with pytest.raises(ConversionError, match="bare pickles are not read"):
        unpickle.load(tmp_path / "bare.pth")
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1000)}, buffer)
    (tmp_path / "half.pth").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(ConversionError, match="damaged torch file"):
        unpickle.load(tmp_path / "half.pth")
