"""Exits: heads, gates and criteria of checkpoints, and the calibration of exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.convert import convert
from pyruntime.format.inspect import describe, text
from pyruntime.format.load import read, write_calibration
from pyruntime.format.spec import ExitSpec, VisionSpec
from tests.checkpoints import write_json
from tests.format.vision_values import check, values
from tests.vision_checkpoints import (
    PREPROCESS,
    write_jei_dnn,
    write_pth,
    write_timm_folder,
    write_warmup_heads,
)
from tests.vision_states import t2t_state, timm_state


def exits(folder: Path) -> tuple[ExitSpec, ...]:
    spec = read(folder).spec
    assert isinstance(spec, VisionSpec)
    return spec.exits


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(source, source.parent / "refused", **options)
    assert not (source.parent / "refused").exists()
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joint_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "ckpt_0.05_91.3.pth"
    state = write_jei_dnn(path, layers=4, dtype=dtype)
    report = convert(path, tmp_path / "dst")
    container = check(tmp_path / "dst", state)
    wanted = tuple(ExitSpec(block, "jei_dnn", 1.0) for block in range(3))
    assert exits(tmp_path / "dst") == wanted
    assert not wanted[0].strict and wanted[0].tau == 0.5 and wanted[0].composition == "mass_sum"
    assert container.manifest.provenance["lambda"] == 0.05
    assert "with 3 exits by jei_dnn" in str(report)


def test_a_name_without_lambda(tmp_path: Path) -> None:
    for name in ("joint.pth", "ckpt_best_1.pth", "ckpt_._1.pth"):
        write_jei_dnn(tmp_path / name)
        convert(tmp_path / name, tmp_path / "dst", overwrite=True)
        assert "lambda" not in read(tmp_path / "dst").manifest.provenance


def test_positions_that_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "joint.pth"
    state = t2t_state(layers=4)
    for positions in ([0, 1, 2], [1, 2, 3], "all"):
        beside = {"intermediate_head_positions": positions}
        write_pth(path, state, wrapper="state_dict", prefix="module.", beside=beside)
        if positions == [0, 1, 2]:
            convert(path, tmp_path / "dst")
            check(tmp_path / "dst", state)
        else:
            text = refusal(path)
            assert f"intermediate_head_positions is {positions!r}, expected [0, 1, 2]" in text


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("max_prob:0.9", ExitSpec(0, "max_prob", 0.9)),
        ("max_logit:-3", ExitSpec(0, "max_logit", -3.0)),
        ("entropy:0.25", ExitSpec(0, "entropy", -0.25, strict=True)),
        ("margin:0.5", ExitSpec(0, "margin", 0.5, strict=True)),
        ("patience:2", ExitSpec(0, "patience", 2.0)),
        ("max_prob", ExitSpec(0, "max_prob", None)),
        ("jei_dnn", ExitSpec(0, "jei_dnn", 1.0)),
        ("jei_dnn:0.8", ExitSpec(0, "jei_dnn", 0.8)),
    ],
)
def test_other_criteria(tmp_path: Path, rule: str, wanted: ExitSpec) -> None:
    path = tmp_path / "joint.pth"
    state = write_jei_dnn(path)
    report = convert(path, tmp_path / "dst", exit=rule)
    check(tmp_path / "dst", state)
    assert exits(tmp_path / "dst")[0] == wanted
    dropped = any("the gates are left out" in note for note in report.notes)
    assert dropped == (not rule.startswith("jei_dnn"))
    assert any("no threshold" in note for note in report.notes) == (rule == "max_prob")
    assert f"--exit {rule}" in read(tmp_path / "dst").manifest.provenance["command"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("confidence:0.9", "no criterion 'confidence' (one of jei_dnn, max_prob,"),
        ("learned:0.5", "no criterion 'learned'"),
        ("max_prob:high", "'high' is no number"),
        ("max_prob:nan", "must be finite"),
        ("max_prob:", "'' is no number"),
    ],
)
def test_criteria_that_are_none(tmp_path: Path, rule: str, message: str) -> None:
    write_jei_dnn(tmp_path / "joint.pth")
    assert message in refusal(tmp_path / "joint.pth", exit=rule)


def test_warmup_heads(tmp_path: Path) -> None:
    path, heads = tmp_path / "backbone.pth", tmp_path / "heads"
    state = t2t_state(layers=4, gates=False)
    bare = tuple(name for name in state if name.startswith("intermediate_heads."))
    write_pth(path, state, wrapper="net", prefix="module.", drop=bare)
    write_warmup_heads(heads, state)
    (heads / "best.pth").write_bytes(b"not a head: its name is no number")
    text = refusal(path, heads=heads)
    assert "3 heads without gates: a criterion must be given (such as max_prob:0.9)" in text
    assert "jei_dnn needs gates" in refusal(path, heads=heads, exit="jei_dnn")
    convert(path, tmp_path / "dst", heads=heads, exit="max_prob:0.9")
    check(tmp_path / "dst", state)
    assert [one.after_block for one in exits(tmp_path / "dst")] == [0, 1, 2]
    # Some of the blocks alone is as good.
    (heads / "1.pth").unlink()
    convert(path, tmp_path / "dst", heads=heads, exit="margin:0.1", overwrite=True)
    check(tmp_path / "dst", state)
    assert [one.after_block for one in exits(tmp_path / "dst")] == [0, 2]


def test_warmup_heads_that_are_wrong(tmp_path: Path) -> None:
    path, heads = tmp_path / "backbone.pth", tmp_path / "heads"
    write_pth(path, t2t_state(exits=0), wrapper="net")
    assert "no heads: looked for files called 0.pth" in refusal(path, heads=heads, exit="margin")
    assert "no heads (intermediate_heads.*)" in refusal(path, exit="margin")
    state = t2t_state(gates=False)
    state["intermediate_heads.0.weight"] = torch.ones(7, 127)
    write_warmup_heads(heads, state)
    text = refusal(path, heads=heads, exit="margin")
    assert "misshapen intermediate_heads.0.weight [7, 127], expected [7, 128]" in text
    (heads / "0.pth").write_bytes(b"PK\x03\x04nothing")
    (heads / "1.pth").write_bytes(b"nothing")
    lines = refusal(path, heads=heads, exit="margin").splitlines()
    assert "damaged torch file" in lines[0] and "bare pickles" in lines[1]
    (heads / "0.pth").unlink()
    torch.save({"state": {"weight": torch.ones(7, 128), "bias": [1.0]}}, heads / "1.pth")
    assert "bias is a list, not a dense tensor" in refusal(path, heads=heads, exit="margin")
    write_jei_dnn(tmp_path / "joint.pth")
    write_warmup_heads(heads, t2t_state())
    assert "intermediate_heads.0.bias is in two files" in refusal(
        tmp_path / "joint.pth", heads=heads
    )


def test_heads_and_gates_that_disagree(tmp_path: Path) -> None:
    path = tmp_path / "joint.pth"
    drop = tuple(f"gates.1.linear.{kind}" for kind in ("weight", "bias"))
    write_jei_dnn(path, layers=4, drop=drop)
    assert "heads without gates: 1" in refusal(path)
    drop = tuple(f"intermediate_heads.{n}.{kind}" for kind in ("weight", "bias") for n in (0, 2))
    write_jei_dnn(path, layers=4, drop=drop)
    assert "gates without heads: 0, 2" in refusal(path)
    write_jei_dnn(path, layers=3, exits=3)
    assert "head 2 of a model whose blocks end at 2" in refusal(path)
    write_jei_dnn(path, layers=3, exits=3, gates=False)
    assert len(refusal(path).splitlines()) == 2
    write_jei_dnn(path, extra={"gates.0.linear.weight": torch.ones(1, 5),
                               "intermediate_heads.1.bias": torch.ones(8)})  # fmt: skip
    lines = refusal(path).splitlines()
    assert lines[0].endswith("2 problems")
    assert "misshapen gates.0.linear.weight [1, 5], expected [1, 4]" in lines
    assert "misshapen intermediate_heads.1.bias [8], expected [7]" in lines


def test_exits_of_a_plain_vit(tmp_path: Path) -> None:
    state = write_timm_folder(tmp_path / "src", exits=2)
    convert(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst", state)
    write_timm_folder(tmp_path / "src", exits=2, fc_norm=True)
    assert "exit 0 shares a norm that follows the pooling" in refusal(tmp_path / "src")


DECLARED: list[dict[str, Any]] = [
    {"after_block": 0, "criterion": "learned", "threshold": 0.8, "constant_class": 2},
    {"after_block": 1, "criterion": "max_prob", "threshold": 0.9, "norm": "own",
     "outputs": "geometric"},
    {"after_block": 2, "criterion": "learned", "threshold": None, "norm": "none", "pool": "mean",
     "outputs": "sum", "cascade": True},
]  # fmt: skip
SHAPES = {
    "0.head.weight": (1, 40), "0.head.bias": (1,), "1.norm.weight": (40,), "1.norm.bias": (40,),
    "1.head.weight": (7, 40), "1.head.bias": (7,), "1.ensemble.weight": (2,),
    "1.ensemble.bias": (7,), "2.head.weight": (8, 47), "2.head.bias": (8,),
    "2.cascade.weight": (7,), "2.cascade.bias": (7,),
}  # fmt: skip


@pytest.mark.parametrize("folder", [False, True])
def test_declared_exits(tmp_path: Path, folder: bool) -> None:
    """Methods without a format of their own: exits in preprocess.json, tensors under our names."""
    extra = {f"exits.{name}": torch.randn(shape) for name, shape in SHAPES.items()}
    how = {"exits": DECLARED, "num_heads": 5}
    if folder:
        source, state = tmp_path / "src", write_timm_folder(tmp_path / "src", layers=4, extra=extra)
        write_json(tmp_path / "preprocess.json", PREPROCESS | how)
    else:
        source = tmp_path / "vit.pth"
        state = write_pth(source, timm_state(layers=4), image=(12, 8), preprocess=how, extra=extra)
    options = {"preprocess": tmp_path / "preprocess.json"} if folder else {}
    convert(source, tmp_path / "dst", **options)
    container = read(tmp_path / "dst")
    assert exits(tmp_path / "dst") == tuple(ExitSpec(**one) for one in DECLARED)
    for name, tensor in extra.items():
        assert torch.equal(values(container.tensors[name]), tensor), name
    assert "after block 0: learned >= 0.8, always class 2" in text(tmp_path / "dst")
    assert "exits are declared, but an exit criterion is given" in refusal(
        source, exit="margin", **options
    )
    assert state.keys() > extra.keys()


def test_declared_exits_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    extra = {f"exits.{name}": torch.randn(shape) for name, shape in SHAPES.items()}

    def told(declared: Any, **options: Any) -> str:
        how = {"exits": declared, "num_heads": 5}
        state = timm_state(layers=4, **options)
        write_pth(path, state, image=(12, 8), preprocess=how, extra=extra)
        return refusal(path)

    lines = told(DECLARED[:2]).splitlines()
    assert len(lines) == 5 and all("unused exits.2." in line for line in lines[1:])
    assert "exits[0]: missing key 'threshold'" in told([{"after_block": 0, "criterion": "margin"}])
    assert "exits must be" in told("all")
    assert "criterion must be one of" in told([{**DECLARED[1], "criterion": "luck"}])
    assert "exits must rise from block to block" in told(DECLARED[::-1])
    assert "there are tensors intermediate_heads.* or gates.*" in told(DECLARED, exits=1)


def calibration() -> dict[str, Any]:
    return {
        "kind": "exits", "budgets": [1.0, 0.7, 0.55], "thresholds": [[None, None], [None, 0.25],
        [-0.5, 3.0]], "kept": [1.0, 0.69, 0.56], "samples": 100, "data_sha256": "0" * 64,
        "default_budget": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    write_jei_dnn(folder / "joint.pth")
    convert(folder / "joint.pth", folder / "dst")
    return folder / "dst"


@pytest.mark.parametrize("default", [None, 1.0, 0.6, 0.55])
def test_calibration_is_stored(model: Path, default: float | None) -> None:
    record = {**calibration(), "default_budget": default}
    write_calibration(model, record)
    assert read(model).calibration == record
    words = "the checkpoint's own rule" if default is None else f"{default:g}"
    assert f"3 budgets from 1 to 0.55 on 100 samples, default {words}" in text(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gateskip"}, "kind is 'gateskip', expected 'exits'"),
        ({"budgets": [0.55, 0.7, 1.0]}, "budgets must descend"),
        ({"budgets": [2.0, 1.0, 0.5]}, "budgets must be numbers in"),
        ({"thresholds": [[None]] * 3}, r"of shape \[3, 2\]"),
        ({"thresholds": [[float("nan"), 1.0]] * 3}, r"numbers or null of shape \[3, 2\]"),
        ({"kept": [1.0]}, "kept must hold one entry per budget"),
        ({"default_budget": 0.5}, r"default_budget must be in \[0.55, 1\]"),
        ({"default_budget": "low"}, "default_budget must be in"),
    ],
)
def test_calibration_that_does_not_fit(model: Path, change: dict[str, Any], message: str) -> None:
    before = (model / "runtime.json").read_bytes()
    with pytest.raises(FormatError, match=message):
        write_calibration(model, {**calibration(), **change})
    missing = calibration()
    del missing["samples"]
    with pytest.raises(FormatError, match="missing key 'samples'"):
        write_calibration(model, missing)
    assert (model / "runtime.json").read_bytes() == before


def test_calibration_without_exits(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(FormatError, match="the model has no exits"):
        write_calibration(tmp_path / "dst", calibration())
    assert "  exits " in text(tmp_path / "dst")


def test_inspect(model: Path) -> None:
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text(model).splitlines()[1:]}
    assert lines["model"] == "t2t_vit vision, float32"
    assert lines["images"] == "32 x 32, tokens-to-token stem of 16: 1 + 4 tokens"
    assert lines["preprocess"].startswith("bilinear, centre crop 0.9, mean 0.5 0.4 0.3")
    assert "exit" in lines and "tokenizer" not in lines and "gates" not in lines
    assert "after block 1: jei_dnn >= 1, mass_sum, tau 0.5" in text(model)
    facts = describe(model)
    assert facts["family"] == "vision"
    assert facts["parameters"]["exits"] == 2 * (7 * 128 + 7 + 4 + 1)
    assert facts["parameters"]["total"] == sum(
        count for part, count in facts["parameters"].items() if part != "total"
    )
