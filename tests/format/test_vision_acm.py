"""Adaptive Computation Modules: learners and gates of the folder compute what the file's would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec, WidthSpec, vision_tensors
from tests.checkpoints import State
from tests.format.vision_values import expected, to_timm, values
from tests.vision_checkpoints import write_acm

LAYER = "encoder.layers.encoder_layer_1"
PLACES = [("mlp", "layers.1.mlp", 0)] + [
    (f"self_attention.{part}_proj", f"layers.1.attn.{part}", 1) for part in "qkvo"
]


def all_sums(state: State, module: str, x: Tensor, learners: int) -> Tensor:
    """Every partial sum of the official module [N + 1, T, d], after forward_all of its code.

    The activation is the identity, so that nothing hides a wrong number.
    """
    hidden = x @ state[f"{module}.w1"] + state[f"{module}.b1"]
    w2 = state[f"{module}.w2"]
    size = len(w2) // learners
    parts = [torch.zeros(len(x), w2.shape[1], dtype=x.dtype)]
    parts += [hidden[:, i * size : (i + 1) * size] @ w2[i * size : (i + 1) * size]
              for i in range(learners)]  # fmt: skip
    stacked = torch.stack(parts)
    if f"{module}.b2" in state:
        stacked = stacked + state[f"{module}.b2"].view(learners + 1, 1, -1)
    return stacked.cumsum(0)


def gate(state: State, module: str, x: Tensor) -> Tensor:
    """Logits of the official gate."""
    start = f"{module}.gating_network"
    layers = ["fc"] if f"{start}.fc.weight" in state else ["net.0", "net.1", "net.2"]
    for layer in layers:
        x = x @ state[f"{start}.{layer}.weight"].t() + state[f"{start}.{layer}.bias"]
    return x


@pytest.mark.parametrize("gate_hidden", [6, None])
@pytest.mark.parametrize("final_bias", [False, True])
def test_modules(tmp_path: Path, final_bias: bool, gate_hidden: int | None) -> None:
    learners = 4
    state = write_acm(
        tmp_path / "final.pth", learners=learners, final_bias=final_bias, gate_hidden=gate_hidden
    )
    convert(tmp_path / "final.pth", tmp_path / "dst", width_rule="kminus")
    container = read(tmp_path / "dst")
    spec = container.spec
    assert isinstance(spec, VisionSpec)
    assert spec.width == WidthSpec(learners, 9, 5, final_bias, "kminus")
    assert (spec.source_family, spec.mlp_size, spec.exits) == ("acm_vit", 36, ())
    found = {name: values(tensor).double() for name, tensor in container.tensors.items()}
    exact = {name: tensor.double() for name, tensor in state.items()}
    x = torch.randn(11, 40, dtype=torch.float64)
    for theirs, ours, least in PLACES:
        module = f"{LAYER}.{theirs}"
        wanted = all_sums(exact, module, x, learners)
        up, bias = found[f"{ours}.up.weight"], found[f"{ours}.up.bias"]
        down, total = found[f"{ours}.down.weight"], torch.zeros(11, 40, dtype=torch.float64)
        assert up.shape == (learners, up.shape[1], 40) and down.shape == up.mT.shape
        if final_bias:
            total = total + found[f"{ours}.down.bias"][0]
        for k in range(learners + 1):
            if k:
                total = total + (x @ up[k - 1].t() + bias[k - 1]) @ down[k - 1].t()
                if final_bias:
                    total = total + found[f"{ours}.down.bias"][k]
            torch.testing.assert_close(total, wanted[k], rtol=1e-12, atol=1e-12)
        weight, offset = found[f"{ours}.width.weight"], found[f"{ours}.width.bias"]
        assert weight.shape == (learners + 1 - least, 40)
        torch.testing.assert_close(
            x @ weight.t() + offset, gate(exact, module, x), rtol=1e-6, atol=1e-6
        )


def test_the_rest_of_the_model(tmp_path: Path) -> None:
    state = to_timm(write_acm(tmp_path / "final.pth"))
    convert(tmp_path / "final.pth", tmp_path / "dst")
    container = read(tmp_path / "dst")
    spec = container.spec
    assert isinstance(spec, VisionSpec)
    plain = [t.name for t in vision_tensors(spec)
             if not any(p in t.name for p in (".up.", ".down.", ".width."))]  # fmt: skip
    for name in plain:
        assert torch.equal(values(container.tensors[name]), expected(state, spec, name)), name
    assert len(plain) > 10


@pytest.mark.parametrize(
    ("bottlenecks", "dense"),
    [({"mlp_bottleneck": 0}, "layers.0.mlp.up.weight"),
     ({"attention_bottleneck": 0}, "layers.0.attn.qkv.weight"),
     ({"attention_bottleneck": 0, "split": True}, "layers.0.attn.qkv.bias")],
)  # fmt: skip
def test_one_part_is_adaptive(tmp_path: Path, bottlenecks: dict[str, Any], dense: str) -> None:
    state = to_timm(write_acm(tmp_path / "final.pth", **bottlenecks))
    convert(tmp_path / "final.pth", tmp_path / "dst")
    container = read(tmp_path / "dst")
    spec = container.spec
    assert isinstance(spec, VisionSpec) and spec.width is not None
    assert torch.equal(values(container.tensors[dense]), expected(state, spec, dense))
    missing = (spec.width.mlp_bottleneck == 0, spec.width.attention_bottleneck == 0)
    assert missing == ("mlp_bottleneck" in bottlenecks, "attention_bottleneck" in bottlenecks)


def test_a_trained_temperature_is_left_out(tmp_path: Path) -> None:
    extra = {f"{LAYER}.mlp.gating_network.gs_tau": torch.ones(1)}
    write_acm(tmp_path / "final.pth", extra=extra)
    convert(tmp_path / "final.pth", tmp_path / "dst")


def test_refusals(tmp_path: Path) -> None:
    path, dst = tmp_path / "final.pth", tmp_path / "dst"
    gone = f"{LAYER}.mlp.gating_network.net.1.bias"
    extra = {f"{LAYER}.mlp.b1": torch.ones(28), f"{LAYER}.mlp.gating_network.net.2.bias":
             torch.ones(3)}  # fmt: skip
    write_acm(path, drop=(gone,), extra=extra)
    with pytest.raises(ConversionError) as caught:
        convert(path, dst)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4, lines
    assert any(f"missing {gone} [6]" in line for line in lines)
    assert any(f"misshapen {LAYER}.mlp.b1 [28], expected [27]" in line for line in lines)
    assert any("net.2.bias [3], expected [4]" in line for line in lines)
    first = LAYER.replace("_1", "_0")
    write_acm(path, drop=tuple(f"{first}.self_attention.k_proj.{n}" for n in ("w1", "b1", "w2")))
    with pytest.raises(UnsupportedModel, match=r"adaptive modules in q, v, o alone"):
        convert(path, dst)
    write_acm(path, extra={f"{first}.mlp.w1": torch.ones(40, 26)})
    with pytest.raises(ConversionError, match="26 columns for 3 learners"):
        convert(path, dst)
    write_acm(path, mlp_bottleneck=0, attention_bottleneck=0)
    with pytest.raises(ConversionError, match="width_rule given, but nothing in it is adaptive"):
        convert(path, dst, width_rule="paper")
    assert not dst.exists()
