"""Models of adaptive width: against the partial sums of the oracle, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyruntime
from pyruntime.format.load import read
from pyruntime.format.spec import WidthSpec
from pyruntime.models import vit
from pyruntime.models.vit import VisionTransformer
from tests.models.vision_models import model_of, pictures, spec_of, tensors_of
from tests.oracle import acm
from tests.vision_checkpoints import write_acm

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, dict[str, Any]] = {
    "both": {},
    "mlp": {"attention_bottleneck": 0},
    "attention": {"mlp_bottleneck": 0},
    "output biases": {"final_bias": True, "gate_hidden": None},
}


def opened(path: Path, rule: str = "paper", **shape: Any) -> tuple[VisionTransformer, acm.State]:
    state = write_acm(path / "final.pth", **shape)
    pyruntime.convert(path / "final.pth", path / "model")
    container = read(path / "model")
    spec = container.spec
    object.__setattr__(spec.width, "rule", rule)
    return VisionTransformer(spec, container.tensors), state  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["paper", "official", "kminus"])
def test_parity_with_partial_sums(tmp_path: Path, kind: str, rule: acm.Rule) -> None:
    model, state = opened(tmp_path, rule, **KINDS[kind])
    images = pictures(model.spec, 9)
    expected = acm.forward(state, images, 5, 3, rule)
    torch.testing.assert_close(model.forward(images), expected, atol=1e-4, rtol=1e-4)


def test_rules_differ(tmp_path: Path) -> None:
    found = []
    for rule in ("paper", "official", "kminus"):
        model, _ = opened(tmp_path / rule, rule)
        found.append(model.forward(pictures(model.spec, 9)))
    assert float((found[0] - found[2]).abs().max()) > 1e-3
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_learners_that_ran_are_counted(tmp_path: Path) -> None:
    """By hand, from the choices the oracle makes of the same hidden states."""
    model, state = opened(tmp_path)
    images = pictures(model.spec, 3)
    packed = model.embed(images)
    ran = model.run_stage(packed, 0, features=True).macs
    assert ran.dtype == torch.int64
    learned = ran - model.cost.stage(0)
    z = model.embed(images).x.view(3, 5, 40)
    total = torch.zeros(3, dtype=torch.int64)
    for i in range(2):
        layer = f"encoder.layers.encoder_layer_{i}"
        attention = f"{layer}.self_attention"

        def run(name: str, x: Tensor, bottleneck: int) -> Tensor:
            total.add_(acm.choices(state, name, x).sum(1) * 2 * 40 * bottleneck)
            return acm.module(state, name, x, 3, "paper")

        normed = acm.norm(state, f"{layer}.ln_1", z, 1e-6)
        q, k, v = (run(f"{attention}.{part}_proj", normed, 5) for part in "qkv")
        z = z + run(f"{attention}.o_proj", acm.attend(q, k, v, 5), 5)
        z = z + run(f"{layer}.mlp", acm.norm(state, f"{layer}.ln_2", z, 1e-6), 9)
    assert learned.tolist() == total.tolist()
    short = model.run_stage(model.embed(images), 0).macs - model.cost.stage(0)
    assert bool((short < learned).all())
    cost = model.cost
    assert bool(
        (cost.executed(torch.zeros(3, dtype=torch.int64), None, short) < cost.dense()).all()
    )


def test_all_learners_cost_what_dense_says() -> None:
    spec = spec_of(exits=(), width=WidthSpec(3, 9, 5))
    tensors = tensors_of(spec)
    for name, tensor in tensors.items():
        if name.endswith("width.bias"):
            assert isinstance(tensor, Tensor)
            tensor[-1] = 1e4  # the largest k always
    model = VisionTransformer(spec, tensors)
    learned = model.run_stage(model.embed(pictures(spec, 2)), 0).macs - model.cost.stage(0)
    found = model.cost.executed(torch.tensor([0, 0]), None, learned)
    assert found.tolist() == [model.cost.dense()] * 2


@pytest.mark.parametrize("rule", ["paper", "kminus", "official"])
def test_batch_mates_matter_to_the_official_rule_alone(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(exits=(), width=WidthSpec(4, 9, 5, True, rule))
    model = model_of(spec)
    images = pictures(spec, 6)
    whole = model.forward(images)
    alone = torch.cat([model.forward(image[None]) for image in images])
    close = torch.allclose(whole, alone, atol=1e-5)
    assert close == (rule != "official")
    monkeypatch.setattr(vit, "PART_ROWS", 10)  # parts are no batches
    torch.testing.assert_close(model.forward(images), whole, atol=1e-5, rtol=1e-5)


def test_no_images() -> None:
    model = model_of(spec_of(exits=(), width=WidthSpec(4, 9, 5)))
    packed = model.embed(pictures(model.spec, 0))
    assert model.run_stage(packed, 0).macs.shape == (0,)
    assert model.classify(packed).shape == (0, 7)
