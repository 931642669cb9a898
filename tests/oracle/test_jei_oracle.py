"""The runtime against JEI-DNN's masked evaluation of T2T-ViT: same levels, same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyruntime
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec
from pyruntime.models.vit import VisionTransformer
from tests.models.vision_models import limits_of, staged
from tests.oracle import t2t
from tests.vision_checkpoints import State, t2t_state, write_jei_dnn

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(
    path: Path, image: tuple[int, int], layers: int
) -> tuple[VisionTransformer, State, Tensor]:
    """A model whose attention is selective, whose gates let some images leave everywhere."""
    random = torch.Generator().manual_seed(1)
    state = t2t_state(layers=layers, image=image)
    images = torch.randn(60, 3, *image, generator=random)
    extra: State = {}
    for n, scale in ((1, 0.3), (2, 0.15)):
        layer = f"tokens_to_token.attention{n}"
        # Of long keys and queries the features vanish beside the 1e-8.
        kqv = state[f"{layer}.kqv.weight"]
        extra[f"{layer}.kqv.weight"] = torch.cat([kqv[:128] * scale, kqv[128:]])
        extra[f"{layer}.w"] = torch.randn(32, 64, generator=random)
    heads = t2t.all_heads(state | extra, images)
    weight = torch.tensor([[40.0, -10.0, 40.0, 5.0]])
    for i in range(layers - 1):
        mean = t2t.features(heads[:, i]).mean(0)
        extra[f"gates.{i}.linear.weight"] = weight
        extra[f"gates.{i}.linear.bias"] = -(weight @ mean) - 1.5
    source = path / "ckpt_0.5_91.5.pth"
    state = write_jei_dnn(
        source, layers=layers, image=image, extra=extra, preprocess={"image_size": list(image)}
    )
    pyruntime.convert(source, path / "model", dtype="float32")
    container = read(path / "model")
    assert isinstance(container.spec, VisionSpec)
    return VisionTransformer(container.spec, container.tensors), state, images


@pytest.mark.parametrize("image", [(32, 32), (48, 64)])
def test_levels_and_logits(tmp_path: Path, image: tuple[int, int]) -> None:
    model, state, images = opened(tmp_path, image, 6)
    expected = t2t.evaluate(state, images)
    found = staged(model, images, limits_of(model, 60))
    # At a tie a last bit decides.
    spent = torch.nn.functional.pad(expected.gates, (1, 0))[:, :-1].cumsum(1)
    reached = torch.arange(5) <= expected.levels[:, None]
    tie = (reached & ((spent + 2 * expected.gates - 1).abs() < 1e-5)).any(1)
    assert int(tie.sum()) <= 2
    assert torch.equal(found.levels[~tie], expected.levels[~tie])
    torch.testing.assert_close(found.logits[~tie], expected.logits[~tie], atol=1e-4, rtol=1e-4)
    assert len(set(found.levels.tolist())) > 2
    torch.testing.assert_close(model.forward(images), expected.heads[:, -1], atol=1e-4, rtol=1e-4)


def test_confidences_are_the_closed_form(tmp_path: Path) -> None:
    """S + 2 g of gates that stay, from the oracle's gates."""
    model, state, images = opened(tmp_path, (32, 32), 4)
    gates = t2t.evaluate(state, images).gates
    limits = limits_of(model, 60)
    limits[..., 0] = torch.nan
    for number, confidence in enumerate(staged(model, images, limits).confidences):
        expected = gates[:, :number].sum(1) + 2 * gates[:, number]
        torch.testing.assert_close(confidence, expected, atol=1e-4, rtol=1e-4)


def test_masses_are_a_distribution() -> None:
    gates = torch.rand(500, 6, generator=torch.Generator().manual_seed(0)) * 0.6
    levels, mass = t2t.compose(gates)
    assert bool((mass >= 0).all()) and bool((mass.sum(1) <= 1 + 1e-6).all())
    spent = torch.nn.functional.pad(gates, (1, 0))[:, :-1].cumsum(1)
    leaves = spent + 2 * gates >= 1
    closed = torch.where(leaves.any(1), leaves.int().argmax(1), 6)
    assert torch.equal(levels, closed)


def test_the_specification_of_gates() -> None:
    """Numbers that networkslab/dynn computes."""
    logits = torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [10, -10, 0, 0]])
    expected = [
        [0.64391428, 0.94753695, 0.40703145, 0.45542863],
        [0.25, 1.3862944, 0, 1.3862944],
        [0.99990916, 9.9879899e-4, 0.99986374, 8.2446e-8],
    ]
    torch.testing.assert_close(t2t.features(logits), torch.tensor(expected), atol=2e-7, rtol=1e-5)
    rows = {
        (0.05, 0.2, 0.1, 0.3, 0.1, 0.2): 5,
        (0.45, 0.05, 0.55, 0.1, 0.1, 0.1): 2,
        (0.3,) * 6: 2,
        (0.4,) * 6: 1,
        (0.9,) * 6: 0,
        (0.02, 0.03, 0.04, 0.05, 0.06, 0.9): 5,
        (0.1,) * 6: 6,
    }
    assert t2t.compose(torch.tensor(list(rows)))[0].tolist() == list(rows.values())


def test_the_oracle_can_disagree(tmp_path: Path) -> None:
    """It sees a wrong slice order, a wrong skip and a wrong feature: the tests above can fail."""
    model, state, images = opened(tmp_path, (32, 32), 3)
    actual = model.forward(images)
    for name in ("w", "kqv.weight", "proj.bias", "mlp.2.weight"):
        key = f"tokens_to_token.attention2.{name}"
        changed = state | {key: state[key] * 1.05}
        assert float((t2t.all_heads(changed, images)[:, -1] - actual).abs().max()) > 1e-4
    kqv = state["tokens_to_token.attention1.kqv.weight"]
    swapped = {"tokens_to_token.attention1.kqv.weight": kqv.roll(64, 0)}
    assert float((t2t.all_heads(state | swapped, images)[:, -1] - actual).abs().max()) > 1e-3
