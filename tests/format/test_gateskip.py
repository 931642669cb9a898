"""Every variant of a GateSkip file, and everything its sidecar can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import ConversionError
from pyruntime.format.convert import Report, convert
from pyruntime.format.load import read
from pyruntime.format.spec import decoder_tensors
from tests.checkpoints import State, write_gateskip_pt, write_hf_folder
from tests.format.test_convert import values
from tests.moe_checkpoints import write_moe_folder


def make(tmp_path: Path, gate_type: str = "vector", **options: Any) -> tuple[State, Report]:
    """Write a base and a GateSkip file, convert, and return (state dict, report)."""
    base = tmp_path / "base"
    if not base.exists():
        write_hf_folder(base)
    state = write_gateskip_pt(tmp_path / "gated.pt", base, gate_type, **options)
    return state, convert(tmp_path / "gated.pt", tmp_path / "dst", overwrite=True)


def refusal(tmp_path: Path, gate_type: str = "vector", **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        make(tmp_path, gate_type, **options)
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "gated.pt", "gated.json"}
    return str(caught.value)


def check_gates(tmp_path: Path, state: State) -> None:
    container = read(tmp_path / "dst")
    assert container.gates is not None
    base = {tensor.name for tensor in decoder_tensors(container.spec, None)}
    found = container.tensors.keys() - base
    assert found
    for name in found:
        shared = name.startswith("gates.")
        layer, branch = ("0", name.split(".")[1]) if shared else name.split(".")[1:3]
        rest = name.split(".", 2 if shared else 4)[-1]
        for ours, theirs in (("up.", "0."), ("down.", "2.")):
            rest = rest.replace(ours, theirs)
        wrapped = {"attn": "self_attn", "mlp": "mlp"}[branch]
        original = state[f"model.layers.{layer}.{wrapped}.gate.gate.{rest}"]
        assert torch.equal(values(container.tensors[name]).float(), original.float()), name


@pytest.mark.parametrize("gate_type", ["vector", "scalar", "mlp", "mlp_scalar"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": True},
        {"shared": True, "sidecar": {"shared": None}},
        {"gate_mlp": False},
        {"gate_attention": False, "shared": True},
        {"gating_mode": "before_module", "actually_gate": False},
        {"adapter": True},
        {"adapter": True, "gate_mlp": False},
        {"tied_copy": True, "extra": {}},
    ],
)
def test_variants(tmp_path: Path, gate_type: str, options: dict[str, Any]) -> None:
    options = {**options, "mlp_scalar": gate_type == "mlp_scalar"}
    write_hf_folder(tmp_path / "base", tie="tied_copy" in options)
    state, report = make(tmp_path, gate_type.removesuffix("_scalar"), **options)
    gates = report.gates
    assert gates is not None
    assert gates.gate_type == gate_type.removesuffix("_scalar")
    assert gates.mlp_scalar == options["mlp_scalar"]
    assert gates.shared == options.get("shared", False)
    assert gates.gate_attention == options.get("gate_attention", True)
    assert gates.gate_mlp == options.get("gate_mlp", True)
    assert gates.gating_mode == options.get("gating_mode", "after_module")
    assert gates.actually_gate == options.get("actually_gate", True)
    check_gates(tmp_path, state)
    # G23: the MLP's own gate_proj went to the MLP, not to the gate.
    packed = values(read(tmp_path / "dst").tensors["layers.0.mlp.gate_up.weight"])
    name = "model.layers.0.mlp.module.gate_proj.weight"
    assert torch.equal(packed[:52], state[name if gates.gate_mlp else name.replace("module.", "")])


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [("model.", "state_dict"), ("module.", None), ("base_model.model.", None), ("", "module"),
     ("_orig_mod.module.", None), ("base_model.model.", "state_dict")],
)  # fmt: skip
def test_wrapped_names(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    if wrapper == "module":  # a plain key of the file, unlike Lightning's wrapper
        prefix, wrapper = "module.", None
    state, _ = make(tmp_path, prefix=prefix, wrapper=wrapper)
    check_gates(tmp_path, state)


def test_sidecar_is_needed_only_for_what_tensors_hide(tmp_path: Path) -> None:
    keys = ("gate_type", "mlp_scalar", "shared", "gate_attention", "gate_mlp", "rule",
            "skip_ratio", "kv_mode")  # fmt: skip
    _, report = make(tmp_path, sidecar=dict.fromkeys(keys))
    assert report.gates is not None
    assert (report.gates.rule, report.gates.skip_ratio) == ("calibrated", 0.0)
    text = refusal_after(tmp_path, sidecar={"gating_mode": None, "actually_gate": None})
    assert "gating_mode is needed" in text
    assert "actually_gate is needed" in text


def refusal_after(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        make(tmp_path, **options)
    return str(caught.value)


def test_base_and_sidecar_can_be_given(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "base")
    write_gateskip_pt(tmp_path / "gated.pt", tmp_path / "base", sidecar={"base_model": None})
    (tmp_path / "gated.json").rename(tmp_path / "notes.json")
    options: dict[str, Any] = {"sidecar": tmp_path / "notes.json", "base": tmp_path / "base"}
    convert(tmp_path / "gated.pt", tmp_path / "dst", **options)
    with pytest.raises(ConversionError, match="base model unknown"):
        convert(tmp_path / "gated.pt", tmp_path / "dst2", sidecar=tmp_path / "notes.json")
    with pytest.raises(ConversionError, match="gating_mode is needed"):
        convert(tmp_path / "gated.pt", tmp_path / "dst2", base=tmp_path / "base")
    with pytest.raises(ConversionError, match="no such file"):
        convert(tmp_path / "gated.pt", tmp_path / "dst2", sidecar=tmp_path / "none.json")


def test_thresholds_become_a_calibration(tmp_path: Path) -> None:
    thresholds = [[0.5, None], [0.25, 0.75], [0.1, 0.2]]
    make(tmp_path, sidecar={"thresholds": thresholds, "skip_ratio": 0.25})
    calibration = read(tmp_path / "dst").calibration
    assert calibration is not None
    assert calibration["thresholds"][1] == thresholds
    assert (calibration["budgets"], calibration["default_budget"]) == ([1.0, 0.75], 0.75)


def test_mixed_dtypes_follow_the_backbone(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "base", dtype=torch.bfloat16)
    _, report = make(tmp_path, adapter=True)
    assert report.spec.dtype == "bfloat16"
    assert any("gate weights are rounded" in note for note in report.notes)
    _, report = make(tmp_path, "scalar", adapter=True)
    assert not report.notes  # a scalar gate is small enough to stay in float32


GATE = "model.layers.1.mlp.gate.gate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sidecar": {"gate_type": "scalar"}}, "gate_type is 'scalar', but the tensors say 'vec"),
        ({"sidecar": {"gate_mlp": False}}, "gate_mlp is False, but the tensors say True"),
        ({"sidecar": {"gating_mod": "x"}}, "unknown key 'gating_mod', nearest: 'gating_mode'"),
        ({"sidecar": {"gating_mode": "both"}}, "gating_mode must be one of 'after_module', 'bef"),
        ({"sidecar": {"actually_gate": "yes"}}, "actually_gate must be bool, is 'yes'"),
        ({"sidecar": {"skip_ratio": 2}}, "skip_ratio must be in [0, 1], is 2"),
        ({"sidecar": {"rule": "random"}}, "rule must be one of"),
        ({"sidecar": {"base_model": "meta/Llama"}}, "(base_model 'meta/Llama' of"),
        ({"sidecar": {"thresholds": [[0.5, 0.5]]}}, "thresholds need the skip_ratio"),
        ({"sidecar": {"thresholds": [[0.5]], "skip_ratio": 0.5}}, "of shape [2, 3, 2]"),
        ({"sidecar": {"shared": True}}, "contradicting model.layers.1.self_attn.gate.gate.weight"),
        ({"drop": (f"{GATE}.bias",)}, f"missing {GATE}.bias [40]"),
        ({"extra": {f"{GATE}.weight": torch.ones(39, 40)}}, f"misshapen {GATE}.weight [39, 40]"),
        ({"extra": {f"{GATE}.lora_A": torch.ones(4, 40)}}, f"unused {GATE}.lora_A [4, 40]"),
        ({"extra": {"model.model.norm.weight": torch.ones(40)}}, "both called model.norm.weight"),
        ({"extra": {"model.step": 3}}, "model.step is a int, not a dense tensor"),
        ({"extra": {f"{GATE}.weight": torch.full((40, 40), torch.inf)}}, f"{GATE}.weight: NaN"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, **options)


def test_a_wrapper_without_its_gate_is_not_taken_for_ungated(tmp_path: Path) -> None:
    drop = tuple(f"model.layers.{i}.mlp.gate.gate.{kind}" for i in range(3)
                 for kind in ("weight", "bias"))  # fmt: skip
    text = refusal(tmp_path, drop=drop, sidecar={"gate_mlp": None})
    assert "unused model.layers.0.mlp.module.gate_proj.weight" in text
    assert "nearest name: model.layers.0.mlp.gate_proj.weight" in text


def test_a_file_without_gates(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "base", files="bin")
    with pytest.raises(ConversionError, match="holds no GateSkip gates"):
        convert(tmp_path / "base/pytorch_model.bin", tmp_path / "dst", base=tmp_path / "base")


def test_sidecar_that_is_not_json(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "gated.json").write_text(json.dumps([1]))
    with pytest.raises(ConversionError, match="expected an object, is list"):
        convert(tmp_path / "gated.pt", tmp_path / "dst", overwrite=True)


def test_gates_on_experts_are_refused(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "base")
    write_gateskip_pt(tmp_path / "gated.pt", tmp_path / "base")
    write_moe_folder(tmp_path / "base")
    with pytest.raises(ConversionError, match="gates on an expert model are not implemented"):
        convert(tmp_path / "gated.pt", tmp_path / "dst")
