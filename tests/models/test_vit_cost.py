"""What is counted, against the numbers that papers report and against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import ExitSpec, Preprocess, VisionSpec, WidthSpec
from pyruntime.models.vision_cost import VisionCost
from tests.models.vision_models import exits_of, spec_of

PREPROCESS = Preprocess((0.5,) * 3, (0.25,) * 3)


def t2t(layers: int, classes: int = 10, image: int = 224) -> VisionSpec:
    """T2T-ViT-7 or -14 with JEI-DNN's exits."""
    width, heads, ratio = (256, 4, 2) if layers == 7 else (384, 6, 3)
    return VisionSpec(
        "t2t_vit", (image, image), "t2t", 16, width, layers, heads, ratio * width, classes, 1e-5, 1,
        PREPROCESS, qkv_bias=False, exits=exits_of(layers=layers),
    )  # fmt: skip


def vit(width: int, heads: int, layers: int = 12, image: int = 224) -> VisionSpec:
    return VisionSpec(
        "timm_vit", (image, image), "patch", 16, width, layers, heads, 4 * width, 1000, 1e-6, 1,
        PREPROCESS,
    )  # fmt: skip


# networkslab/dynn's op counter, executed; of all exits and the final head, and the latter in M.
OFFICIAL: list[tuple[VisionSpec, list[float], float]] = [
    (t2t(7), [0.409, 0.506, 0.603, 0.700, 0.797, 0.894, 1], 13.518),
    (t2t(7, 100), [0.406, 0.504, 0.601, 0.699, 0.796, 0.893, 1], 13.685),
    (t2t(14), [0.158, 0.223, 0.287, 0.352, 0.416, 0.480, 0.545, 0.609, 0.674, 0.738, 0.803, 0.867,
               0.931, 1], 45.865),
    (t2t(14, 100), [], 46.360),
    (t2t(7, image=32), [0.222, 0.352, 0.481, 0.611, 0.740, 0.870, 1], 4.2295),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "shares", "millions"), OFFICIAL)
def test_the_metric_of_the_papers_code(
    spec: VisionSpec, shares: list[float], millions: float
) -> None:
    cost, last = VisionCost.of(spec), len(spec.exits)
    whole = cost.repo_metric(last)
    assert whole / 1e6 == pytest.approx(millions, abs=6e-4)
    if shares:
        found = [cost.repo_metric(level) / whole for level in range(last + 1)]
        assert found == pytest.approx(shares, abs=6e-4)


@pytest.mark.parametrize(
    ("spec", "stem", "block", "total"),
    [(t2t(7), 284.5, 123.2, 1147), (t2t(14), 299.0, 320.3, 4783)],
)
def test_macs_of_t2t(spec: VisionSpec, stem: float, block: float, total: float) -> None:
    cost = VisionCost.of(spec)
    assert cost.stem / 1e6 == pytest.approx(stem, abs=0.05)
    assert cost.block / 1e6 == pytest.approx(block, abs=0.05)
    whole = cost.stem + spec.num_layers * cost.block
    assert whole / 1e6 == pytest.approx(total, abs=0.5)


def test_macs_of_t2t_on_small_images() -> None:
    cost = VisionCost.of(t2t(7, image=32))
    whole = cost.stem + 7 * cost.block
    heads = sum(cost.exits) + cost.head
    assert (whole + heads) / 1e6 == pytest.approx(24.3, abs=0.05)
    shares = [(cost.stem + (level + 1) * cost.block) / whole for level in range(7)]
    assert shares == pytest.approx([0.348, 0.457, 0.565, 0.674, 0.783, 0.891, 1], abs=6e-4)


@pytest.mark.parametrize(
    ("width", "heads", "patches", "giga"),
    [(192, 3, 49, 0.28), (384, 6, 75, 1.69), (384, 6, 196, 4.60), (768, 12, 196, 17.56)],
)
def test_macs_of_vit(width: int, heads: int, patches: int, giga: float) -> None:
    """L (12 D^2 n + 2 n^2 D) + (n - 1) 3 p^2 D + D classes, the last block whole."""
    spec = vit(width, heads)
    cost = VisionCost.of(spec)
    n, d = patches + 1, width
    block = 12 * d * d * n + 2 * n * n * d
    stem = patches * 3 * 256 * d
    if patches == 196:
        assert (cost.block, cost.stem, cost.head) == (block, stem, 1000 * d)
    assert (12 * block + stem + cost.head) / 1e9 == pytest.approx(giga, abs=5e-3)
    last = 2 * d * d * n + (2 * d * d + 8 * d * d) + 2 * n * d
    assert cost.stage(0, n) == 11 * block + last


def test_an_image_pays_for_what_it_passed() -> None:
    exits = (
        ExitSpec(0, "jei_dnn", 1.0),
        ExitSpec(2, "learned", 0.5, cascade=True, norm="own"),
        ExitSpec(3, "max_prob", 0.5, outputs="geometric"),
    )
    spec = spec_of(num_layers=6, exits=exits)
    cost, d, c = VisionCost.of(spec), 40, 7
    heads = [d * c + 4, (d + c) * (c + 1), d * c + 3 * c]
    assert list(cost.exits) == heads
    assert [list(stage) for stage in cost.stages] == [[0], [1, 2], [3], [4, 5]]
    n = 7
    block = 4 * d * d * n + 2 * n * n * d + 2 * d * 52 * n
    last = 2 * d * d * n + 2 * d * d + 2 * n * d + 2 * d * 52
    stem = 6 * 48 * d
    passed = [stem + block + heads[0]]
    passed.append(passed[-1] + 2 * block + heads[1])
    passed.append(passed[-1] + block + heads[2])
    passed.append(passed[-1] + block + last + d * c)
    assert [cost.image(level) for level in range(4)] == passed
    levels = torch.tensor([3, 0, 0, 2])
    assert cost.executed(levels).tolist() == [passed[level] for level in levels.tolist()]
    assert cost.dense() == stem + 5 * block + last + d * c
    shorter = cost.executed(levels, torch.tensor([7, 7, 3, 7]))
    assert shorter.tolist()[:2] == [passed[3], passed[0]] and int(shorter[2]) < passed[0]
    with pytest.raises(InvalidInput, match="level"):
        cost.image(4)


@pytest.mark.parametrize(
    ("changes", "reads", "head"),
    [
        ({"pool": "distilled", "prefix_tokens": 2}, 2, 2 * 7 * 40),
        ({"pool": "mean", "prefix_tokens": 0}, None, 7 * 40),
        ({"pool": "class_mean", "prefix_tokens": 5}, None, 7 * 80),
    ],
)
def test_the_last_block_of_other_heads(
    changes: dict[str, Any], reads: int | None, head: int
) -> None:
    spec = spec_of(exits=(), **changes)
    cost, n, d = VisionCost.of(spec), spec.tokens, 40
    asks = n if reads is None else reads
    assert cost.head == head
    assert cost.last_block == 2 * d * d * (n + asks) + 2 * asks * n * d + 2 * d * 52 * asks


def test_learners_are_counted_apart() -> None:
    spec = spec_of(exits=(), width=WidthSpec(4, 9, 5))
    cost, n, d = VisionCost.of(spec), 7, 40
    gates = 4 * 4 * d * n + 5 * d * n
    assert cost.block == gates + 2 * n * n * d
    learners = 4 * 2 * d * (4 * 5 * n + 9 * n)
    last = 4 * 2 * d * (2 * 5 * n + 2 * 5 + 9)
    fixed = cost.stem + 3 * cost.block + cost.last_block + cost.head
    assert cost.dense() == fixed + 3 * learners + last
