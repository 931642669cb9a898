"""A damaged folder is refused, and everything wrong with it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime.errors import FormatError
from pyruntime.format.convert import convert
from pyruntime.format.load import read, write_calibration
from tests.checkpoints import write_gateskip_pt, write_hf_folder

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A converted GateSkip model in several shards."""
    write_hf_folder(tmp_path / "base")
    write_gateskip_pt(tmp_path / "gated.pt", tmp_path / "base")
    convert(tmp_path / "gated.pt", tmp_path / "dst", shard_bytes=60_000)
    return tmp_path / "dst"


def problems(folder: Path, verify: bool = True) -> list[str]:
    with pytest.raises(FormatError) as caught:
        read(folder, verify=verify)
    return str(caught.value).splitlines()


def edit(folder: Path, change: Edit) -> None:
    path = folder / "runtime.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_several_damages_are_listed_together(model: Path) -> None:
    first, second, third, *_ = sorted(model.glob("weights-*"))
    whole = bytearray(first.read_bytes())
    whole[-1] ^= 1  # one bit of the last number
    first.write_bytes(whole)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    lines = problems(model)
    assert len(lines) == 3
    for path, what in ((first, "sha256 is"), (second, "expected"), (third, "No such file")):
        (line,) = [line for line in lines if str(path) in line]
        assert what in line


def test_a_flipped_bit_passes_only_without_verification(model: Path) -> None:
    path = sorted(model.glob("weights-*"))[-1]
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert len(problems(model)) == 1
    read(model, verify=False)


def test_a_shard_of_another_model_of_the_same_size(model: Path) -> None:
    a, b = sorted(model.glob("weights-*"))[:2]
    data = b.read_bytes()
    edit(model, lambda d: d["shards"][a.name].update(bytes=len(data)))
    a.write_bytes(data)
    lines = problems(model, verify=False)
    assert any("missing tensor" in line for line in lines)
    assert any("unknown tensor" in line for line in lines)


def test_a_shard_that_is_no_safetensors_file(model: Path) -> None:
    path = sorted(model.glob("weights-*"))[0]
    path.write_bytes(b"x" * path.stat().st_size)
    (line,) = problems(model, verify=False)
    assert "not a safetensors file" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "format version 2 is not known; this runtime reads vers"),
        (lambda d: d.update(format="gguf"), "format is 'gguf', expected 'pyruntime'"),
        (lambda d: d.update(family="vit"), "family 'vit' is not known"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("provenance"), "missing key 'provenance'"),
        (lambda d: d["architecture"].update(hidden=1), "architecture: unknown key 'hidden'"),
        (lambda d: d["gates"].pop("rule"), "gates: missing key 'rule'"),
        (lambda d: d["gates"].update(gate_type="matrix"), "gate_type must be one of"),
        (lambda d: d["tensors"].pop("norm.weight"), "missing tensor norm.weight"),
        (lambda d: d["tensors"]["norm.weight"].update(shape=[41]), "has shape [41], expected [40"),
        (lambda d: d["tensors"]["norm.weight"].update(shape="x"), "shape must be integers"),
        (lambda d: d["tensors"]["norm.weight"].update(dtype="float64"), "has dtype float64, exp"),
        (lambda d: d["tensors"]["embed.weight"].update(layout="panel"), "has layout panel, expec"),
        (lambda d: d["tensors"]["embed.weight"].update(shard="x"), "names an unknown shard 'x'"),
        (lambda d: d["tensors"]["embed.weight"].pop("shard"), "must have exactly"),
        (lambda d: d["shards"].update({"../x": {"sha256": "0", "bytes": 1}}), "must be a file na"),
        (lambda d: d["shards"].update(x={"sha256": 0, "bytes": 1}), "shard 'x' must be"),
        (lambda d: d.update(shards=[]), "shards must be an object"),
        (lambda d: d.update(calibration={"kind": "gateskip"}), "missing key 'budgets'"),
    ],
)  # fmt: skip
def test_manifest(model: Path, change: Edit, message: str) -> None:
    edit(model, change)
    lines = problems(model)
    assert any(message in line for line in lines), lines


def test_an_unknown_tensor_in_the_manifest(model: Path) -> None:
    edit(model, lambda d: d["tensors"].update(spy=dict(d["tensors"]["norm.weight"])))
    assert any("unknown tensor spy" in line for line in problems(model))


def test_not_a_model_folder(tmp_path: Path) -> None:
    (line,) = problems(tmp_path)
    assert "not a runtime model folder" in line
    (line,) = problems(tmp_path / "nowhere")
    assert "not a runtime model folder" in line
    (tmp_path / "runtime.json").write_text("{")
    (line,) = problems(tmp_path)
    assert "cannot be read" in line


def calibration() -> dict[str, Any]:
    grid = [[0.5, None]] * 3
    return {
        "kind": "gateskip", "budgets": [1.0, 0.5], "thresholds": [grid, grid], "kept": [1.0, 0.5],
        "tokens": 10, "data_sha256": "0" * 64, "default_budget": 1.0,
    }  # fmt: skip


def test_calibration_is_stored_and_removed(model: Path) -> None:
    write_calibration(model, calibration())
    assert read(model).calibration == calibration()
    write_calibration(model, None)
    assert read(model).calibration is None
    assert not list(model.glob(".runtime.json*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "moe"}, "kind is 'moe'"),
        ({"budgets": [0.5, 1.0]}, "budgets must descend"),
        ({"budgets": [2.0, 1.0]}, "budgets must be numbers in"),
        ({"thresholds": [[[0.5, None]] * 2] * 2}, r"of shape \[2, 3, 2\]"),
        ({"kept": [1.0]}, "kept must hold one entry per budget"),
        ({"default_budget": None}, "default_budget must be in"),
    ],
)
def test_calibration_that_does_not_fit(model: Path, change: dict[str, Any], message: str) -> None:
    before = (model / "runtime.json").read_bytes()
    with pytest.raises(FormatError, match=message):
        write_calibration(model, {**calibration(), **change})
    assert (model / "runtime.json").read_bytes() == before


def test_calibration_without_gates(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(FormatError, match="has no gates"):
        write_calibration(tmp_path / "dst", calibration())
