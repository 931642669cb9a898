"""Policies are values, and refuse by name what they cannot mean."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy, ExpertPolicy

LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "slots": st.integers(1, 64),
        "gap": st.floats(0, 1),
        "mass": st.floats(0, 1, exclude_min=True),
    },
).filter(bool)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 1.5}, r"budget must be a number in \[0, 1\], got 1.5"),
        ({"budget": -0.1}, "budget must be .* got -0.1"),
        ({"budget": True}, "budget must be .* got True"),
        ({"budget": "0.5"}, "budget must be .* got '0.5'"),
        ({"budget": float("nan")}, "budget must be .* got nan"),
        ({"mode": "fast"}, "mode must be one of calibrated, .*got 'fast'"),
        ({"kv_mode": "none"}, "kv_mode must be one of dense, copy, got 'none'"),
        ({"branches": ("attn", "ffn")}, "branches must be among"),
        ({"exit": "always"}, "exit: expected 'never', a number, or an object of .*got 'always'"),
        ({"exit": {"never": True, "level": 1}}, "exit: expected never, or at least one of"),
        ({"exit": {"tau": 0.0}}, "exit: tau must be a positive number, got 0.0"),
        ({"exit": {"level": -1}}, "exit: level must be an integer of 0 or more, got -1"),
        ({"exit": {"depth": 2}}, "exit: unknown field 'depth'"),
        ({"experts": 0}, "slots must be an integer of 1 or more, got 0"),
        ({"experts": True}, "expected an integer, or an object of slots, gap, mass, got True"),
        ({"experts": 1.0}, "expected an integer, or an object"),
    ],
)
def test_policies_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ComputePolicy(**values)


def test_policies_are_values() -> None:
    assert ComputePolicy(budget=0.5) == ComputePolicy(budget=0.5)
    assert len({ComputePolicy(), ComputePolicy(), ComputePolicy(mode="exact_k")}) == 2
    assert ComputePolicy(budget=0).budget == 0 and ComputePolicy(budget=1).budget == 1
    assert ComputePolicy(experts=2) == ComputePolicy(experts=ExpertPolicy(slots=2))
    assert ComputePolicy(experts=2).expert_policy == ExpertPolicy(slots=2)
    assert ComputePolicy().expert_policy is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "at least one of slots, gap, mass"),
        ({"slots": 0}, "slots must be an integer of 1 or more, got 0"),
        ({"slots": 2.0}, "slots must be .* got 2.0"),
        ({"slots": True}, "slots must be .* got True"),
        ({"gap": -0.1}, r"gap must be a number in \[0, 1\], got -0.1"),
        ({"gap": float("nan")}, "gap must be .* got nan"),
        ({"mass": 0}, r"mass must be a number in \(0, 1\], got 0"),
        ({"mass": 1.01}, "mass must be .* got 1.01"),
        ({"mass": "0.5"}, "mass must be .* got '0.5'"),
        ({"depth": 1}, "unknown limit 'depth'; known: slots, gap, mass"),
        ({1: 2}, "unknown limit 1"),
        ([1], r"expected an integer, or an object of slots, gap, mass, got \[1\]"),
        ("2", "expected an integer"),
        (None, "expected an integer"),
    ],
)
def test_expert_limits_refuse(limits: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"experts: .*{message}"):
        ExpertPolicy.of(limits)


@given(LIMITS)
def test_expert_limits_are_their_json(limits: dict[str, Any]) -> None:
    policy = ExpertPolicy(**limits)
    assert ExpertPolicy.of(json.loads(json.dumps(policy.limits))) == policy
    assert ExpertPolicy.of(policy) is policy
    assert hash(policy) == hash(ExpertPolicy(**limits))


@given(LIMITS, st.integers(1, 16))
def test_a_row_of_limits_has_a_place_for_each(limits: dict[str, Any], k: int) -> None:
    slots, gap, mass = ExpertPolicy(**limits).limits_row(k)
    assert slots == limits.get("slots", k)
    assert gap == limits.get("gap", math.inf) and mass == limits.get("mass", math.inf)


def test_limits_as_words() -> None:
    assert str(ExpertPolicy(slots=2, mass=0.8)) == "slots=2,mass=0.8"
