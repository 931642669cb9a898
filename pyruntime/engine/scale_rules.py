"""What compute policies mean for a model of mixed scales: who decides which regions stay coarse."""

from __future__ import annotations

import math

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.format.spec.scales import ScaleSpec, Source
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.policy import THRESHOLD_SOURCES, ComputePolicy, ScalePolicy
from pyruntime.gates.scale import ScaleRule
from pyruntime.gates.scale_layout import ScaleGrid

ALL_FINE = ScaleRule("all_fine")


class ScaleRules:
    """Policies to rules, for one model. Safe to use from several threads."""

    def __init__(self, spec: VisionSpec, calibration: Calibration | None) -> None:
        self.spec = spec
        self.calibration = calibration

    def resolve(self, policy: ComputePolicy | None) -> ScaleRule | None:
        """The rule of one image; None in a model of one scale.

        Without a policy the calibration's default budget holds, and where there is none the
        checkpoint's own rule.

        Raises:
            InvalidInput: the model cannot honour it.
        """
        policy = policy or ComputePolicy()
        scales, chosen, budget = self.spec.scales, policy.scale_policy, policy.budget
        if scales is None:
            if chosen is not None:
                raise InvalidInput("scales is set, but this model has one scale only")
            return None
        if chosen is not None:
            if budget is not None:
                raise InvalidInput(
                    "budget and scales both say which regions stay coarse: give one of them"
                )
            return self._chosen(scales, chosen)
        if budget is None and self.calibration is not None:
            budget = self.calibration.default_budget
        if budget is None:
            return ScaleRule.own(scales)
        if budget == 1.0:
            return ALL_FINE
        if self.calibration is None:
            raise InvalidInput(
                f"budget {budget} needs calibrated thresholds; run `pyruntime calibrate` first"
            )
        return calibrated_rule(scales, self.calibration.scale(budget))

    def check(self, rule: ScaleRule | None, height: int, width: int) -> None:
        """Refuse a rule that images of this size cannot follow.

        Raises:
            InvalidInput: fewer tokens than an image has that is all coarse, and the like.
        """
        scales = self.spec.scales
        if rule is not None and scales is not None:
            rule.check(ScaleGrid.of(height, width, self.spec.patch_size, scales.ratios))

    def _chosen(self, scales: ScaleSpec, chosen: ScalePolicy) -> ScaleRule:
        source = scales.source if chosen.source is None else chosen.source
        channels = len(self.spec.preprocess.mean)
        if source == "learned" and scales.gate is None:
            raise InvalidInput("scales: this model has no learned gate")
        if source == "entropy" and channels not in (1, 3):
            raise InvalidInput(f"scales: entropy needs 1 or 3 channels, this model has {channels}")
        if chosen.threshold is not None:
            thresholds = _given(scales, source, chosen.threshold)
        elif chosen.tokens is None and source == scales.source:
            return ScaleRule.own(scales)
        elif chosen.tokens is None and source == "learned" and scales.gate is not None:
            thresholds = (scales.gate.threshold,)
        else:
            thresholds = ()
        return ScaleRule(source, thresholds, chosen.tokens, chosen.seed)


def calibrated_rule(scales: ScaleSpec, threshold: float) -> ScaleRule:
    """The model's own source at one threshold for all ratios; inf is all fine. See `Calibration`.

    Raises:
        InvalidInput: the source knows no threshold.
    """
    if threshold == math.inf:
        return ALL_FINE
    return ScaleRule(scales.source, _given(scales, scales.source, threshold))


def _given(
    scales: ScaleSpec, source: Source, threshold: float | tuple[float, ...]
) -> tuple[float, ...]:
    """Thresholds of a rule, the coarsest scale first."""
    if source not in THRESHOLD_SOURCES:
        raise InvalidInput(f"scales: {source}, which decides here, knows no threshold")
    if not isinstance(threshold, tuple):
        return (float(threshold),) * len(scales.ratios)
    if len(threshold) != len(scales.ratios):
        raise InvalidInput(
            f"scales: expected a threshold for each of the ratios {list(scales.ratios)}, got "
            f"{list(threshold)}"
        )
    return threshold[::-1]
