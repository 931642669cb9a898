"""What policies mean for the patches of a model."""

from __future__ import annotations

from typing import Any

import pytest

from pyruntime import ComputePolicy
from pyruntime.engine.scale_rules import ScaleRules, calibrated_rule
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess, ScaleGateSpec, ScaleSpec
from pyruntime.gates.scale import ScaleRule
from tests.engine.scale_models import scale_spec
from tests.models.vision_models import spec_of

LEARNED = ScaleSpec((2,), gate=ScaleGateSpec((4,), threshold=0.25))
ENTROPY = ScaleSpec((2, 4), source="entropy", thresholds=(4.0, 5.75))


def rules(scales: ScaleSpec | None, **changes: Any) -> ScaleRules:
    return ScaleRules(scale_spec(image_size=(16, 32), scales=scales, **changes), None)


@pytest.mark.parametrize(
    ("scales", "asked", "expected"),
    [
        (LEARNED, None, ScaleRule("learned", (0.25,))),
        (LEARNED, "learned", ScaleRule("learned", (0.25,))),
        (LEARNED, 2, ScaleRule("learned", (2.0,))),
        (LEARNED, {"threshold": -1, "tokens": 40}, ScaleRule("learned", (-1.0,), 40)),
        (LEARNED, {"tokens": 40}, ScaleRule("learned", (), 40)),
        (LEARNED, {"source": "entropy", "threshold": 4}, ScaleRule("entropy", (4.0,))),
        (LEARNED, {"source": "variance", "tokens": 40}, ScaleRule("variance", (), 40)),
        (LEARNED, "random:40:3", ScaleRule("random", (), 40, 3)),
        (LEARNED, "all_coarse", ScaleRule("all_coarse")),
        (ENTROPY, None, ScaleRule("entropy", (5.75, 4.0))),  # the coarsest first
        (ENTROPY, "entropy", ScaleRule("entropy", (5.75, 4.0))),
        (ENTROPY, 3, ScaleRule("entropy", (3.0, 3.0))),
        (ENTROPY, {"threshold": [2.0, 3.0]}, ScaleRule("entropy", (3.0, 2.0))),
        (ENTROPY, {"source": "quadtree", "tokens": 40}, ScaleRule("quadtree", (), 40)),
    ],
)
def test_policies_as_rules(scales: ScaleSpec, asked: Any, expected: ScaleRule) -> None:
    assert rules(scales).resolve(ComputePolicy(scales=asked)) == expected
    if asked is None:
        assert rules(scales).resolve(None) == expected
    assert rules(scales).resolve(ComputePolicy(budget=1.0)) == ScaleRule("all_fine")


@pytest.mark.parametrize(
    ("scales", "asked", "message"),
    [
        (LEARNED, {"source": "entropy"}, "'entropy' needs thresholds or tokens"),
        (LEARNED, {"threshold": [1.0, 2.0]}, r"for each of the ratios \[2\], got \[1.0, 2.0\]"),
        (ENTROPY, {"threshold": [1.0]}, r"for each of the ratios \[2, 4\], got \[1.0\]"),
        (ENTROPY, "learned", "no learned gate"),
        (ScaleSpec((2,), source="random"), None, "'random' needs tokens"),
        (ScaleSpec((2,), source="all_fine"), 0.5, "all_fine, which decides here, knows no thres"),
        (None, "all_fine", "scales is set, but this model has one scale only"),
        (None, 0.5, "one scale only"),
    ],
)
def test_policies_that_are_refused(scales: ScaleSpec | None, asked: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        rules(scales).resolve(ComputePolicy(scales=asked))


def test_budgets_that_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"budget and scales both say .* give one of them"):
        rules(LEARNED).resolve(ComputePolicy(budget=0.5, scales="all_fine"))
    with pytest.raises(InvalidInput, match="run `pyruntime calibrate` first"):
        rules(LEARNED).resolve(ComputePolicy(budget=0.5))
    assert rules(None).resolve(ComputePolicy(budget=0.5)) is None
    two = spec_of(
        image_size=(16, 32), scales=LEARNED, preprocess=Preprocess((0.5,) * 2, (0.5,) * 2)
    )
    with pytest.raises(InvalidInput, match="entropy needs 1 or 3 channels, this model has 2"):
        ScaleRules(two, None).resolve(ComputePolicy(scales={"source": "entropy", "threshold": 4}))


def test_rules_that_do_not_fit_an_image() -> None:
    found = rules(LEARNED)
    few = found.resolve(ComputePolicy(scales={"tokens": 8}))
    found.check(few, 16, 32)
    found.check(None, 16, 32)
    with pytest.raises(InvalidInput, match="tokens=8, but all coarse the image has 10"):
        found.check(few, 16, 33)


def test_calibrated_rules() -> None:
    assert calibrated_rule(LEARNED, float("inf")) == ScaleRule("all_fine")
    assert calibrated_rule(LEARNED, -2.0) == ScaleRule("learned", (-2.0,))
    assert calibrated_rule(ENTROPY, 3.0) == ScaleRule("entropy", (3.0, 3.0))
    assert calibrated_rule(ENTROPY, float("inf")) == ScaleRule("all_fine")
