"""Thresholds at any budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.calibration import Calibration


def record(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "gateskip",
        "budgets": [1.0, 0.8, 0.4],
        "thresholds": [
            [[0.1, None], [0.2, 0.3]],
            [[0.3, None], [0.4, 0.5]],
            [[0.7, None], [0.6, 0.6]],
        ],
        "default_budget": 0.8,
    } | changes


@pytest.mark.parametrize(
    ("budget", "attention"), [(1.0, -torch.inf), (0.9, 0.2), (0.8, 0.3), (0.6, 0.5), (0.4, 0.7)]
)
def test_thresholds_are_linear_between_grid_budgets(budget: float, attention: float) -> None:
    tau = Calibration(record()).tau(budget)
    assert tau.shape == (2, 2) and tau.dtype == torch.float32
    assert float(tau[0, 0]) == pytest.approx(attention)
    assert float(tau[0, 1]) == -torch.inf  # null: a branch that never skips


def test_the_ends_of_the_range() -> None:
    calibration = Calibration(record())
    assert bool((calibration.tau(1.0) == -torch.inf).all())
    assert calibration.tau(0.0).tolist() == [[torch.inf, -torch.inf], [torch.inf, torch.inf]]
    assert calibration.default_budget == 0.8
    assert (
        Calibration({k: v for k, v in record().items() if k != "default_budget"}).default_budget
        == 1
    )


def test_budget_zero_always_skips_when_the_grid_starts_at_never() -> None:
    """The record a GateSkip sidecar becomes: null everywhere at budget 1, numbers at its own."""
    sidecar = Calibration(record(budgets=[1.0, 0.75], thresholds=[[[None, None]], [[0.5, None]]]))
    assert sidecar.tau(0.75).tolist() == [[0.5, -torch.inf]]
    assert sidecar.tau(0.0).tolist() == [[torch.inf, -torch.inf]]


@given(st.floats(0.4, 1), st.floats(0.4, 1))
def test_less_budget_never_skips_less(a: float, b: float) -> None:
    calibration = Calibration(record())
    low, high = calibration.tau(max(a, b)), calibration.tau(min(a, b))
    assert bool((low <= high).all()) and not bool(low.isnan().any() or high.isnan().any())


@pytest.mark.parametrize("budget", [0.05, 0.39])
def test_a_budget_outside_the_grid_is_refused(budget: float) -> None:
    with pytest.raises(InvalidInput, match=rf"budget {budget}: thresholds are stored from 1.0 to"):
        Calibration(record()).tau(budget)


def test_asking_does_not_change_the_record() -> None:
    calibration = Calibration(record())
    for budget in (1.0, 0.8, 0.5, 0.0):
        calibration.tau(budget).fill_(9.0)
    assert float(calibration.tau(0.8)[0, 0]) == pytest.approx(0.3)


@pytest.mark.parametrize("budgets", [[1.0, 0.4, 0.8], [1.0, 0.8]])
def test_a_record_that_does_not_fall_is_refused(budgets: list[float]) -> None:
    with pytest.raises(InvalidInput, match="calibration: budgets must fall"):
        Calibration(record(budgets=budgets))


def experts(**changes: Any) -> dict[str, Any]:
    """Three expert layers of which one is never cut, two experts per token."""
    return {
        "kind": "experts",
        "budgets": [1.0, 0.75, 0.5],
        "thresholds": [[1.0, 0.9, None], [0.8, 0.7, None], [0.6, 0.5, None]],
        "default_budget": 0.75,
    } | changes


@pytest.mark.parametrize(
    ("budget", "mass"),
    [(1.0, torch.inf), (0.9, 0.92), (0.75, 0.8), (0.6, 0.68), (0.51, 0.608), (0.5, 0.0)],
)
def test_masses_are_linear_and_the_smallest_budget_runs_one_expert(
    budget: float, mass: float
) -> None:
    found = Calibration(experts()).mass(budget)
    assert found.shape == (3,) and found.dtype == torch.float32
    assert float(found[0]) == pytest.approx(mass)
    assert float(found[2]) == torch.inf


@given(st.floats(0.5, 1), st.floats(0.5, 1))
def test_less_budget_never_needs_more_mass(a: float, b: float) -> None:
    calibration = Calibration(experts())
    high, low = calibration.mass(max(a, b)), calibration.mass(min(a, b))
    assert bool((low <= high).all()) and not bool(low.isnan().any() or high.isnan().any())


def test_a_budget_below_one_expert_is_refused() -> None:
    assert Calibration(experts()).least == 0.5 and Calibration(record()).least == 0.0
    with pytest.raises(InvalidInput, match=r"budget 0\.4: the smallest of this model is 0\.5"):
        Calibration(experts()).mass(0.4)


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match="kind 'other' is not one of gateskip, experts, exits, scales"
    ):
        Calibration(record(kind="other"))


def test_exits() -> None:
    """Null is never; the smallest budget is the last entry as it stands; no default budget."""
    exits = Calibration({
        "kind": "exits",
        "budgets": [1.0, 0.8, 0.5],
        "thresholds": [[0.9, None], [0.7, None], [0.3, None]],
        "default_budget": None,
    })  # fmt: skip
    assert exits.default_budget is None and exits.least == 0.5
    for budget, expected in {1.0: torch.inf, 0.9: 0.8, 0.8: 0.7, 0.65: 0.5, 0.5: 0.3}.items():
        first, second = exits.confidence(budget).tolist()
        assert first == pytest.approx(expected) and second == torch.inf
    with pytest.raises(InvalidInput, match=r"smallest of this model is 0\.5"):
        exits.confidence(0.4)


def scales(**changes: Any) -> dict[str, Any]:
    """Patches, then two exits."""
    return {
        "kind": "scales",
        "budgets": [1.0, 0.6, 0.3],
        "thresholds": [[None, None, None], [2.0, None, 0.5], [None, 0.25, 0.75]],
        "default_budget": None,
    } | changes


@pytest.mark.parametrize(
    ("budget", "scale", "exits"),
    [
        (1.0, torch.inf, [torch.inf, torch.inf]),
        (0.99, 2.0, [torch.inf, 0.5]),
        (0.6, 2.0, [torch.inf, 0.5]),
        (0.59, torch.inf, [0.25, 0.75]),
        (0.3, torch.inf, [0.25, 0.75]),
    ],
)
def test_scales_take_the_costliest_entry_that_a_budget_allows(
    budget: float, scale: float, exits: list[float]
) -> None:
    found = Calibration(scales())
    assert found.scale(budget) == scale
    assert found.confidence(budget).tolist() == exits
    assert found.default_budget is None and found.least == 0.3


def test_scales_below_the_smallest_budget() -> None:
    with pytest.raises(InvalidInput, match=r"smallest of this model is 0\.3"):
        Calibration(scales()).scale(0.29)
