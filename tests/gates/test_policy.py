"""Policies are values, and refuse by name what they cannot mean."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import SCALE_SOURCES, ComputePolicy, ExpertPolicy, ScalePolicy

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
        (
            {"scales": "fine"},
            "scales: expected one of learned, .*or random:TOKENS:SEED, got 'fine'",
        ),
        ({"scales": {"threshold": math.inf}}, "scales: threshold must be a finite number"),
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


SCALES = st.one_of(
    st.fixed_dictionaries(
        {"source": st.sampled_from(["learned", "variance", "entropy"])},
        optional={
            "threshold": st.floats(-9, 9) | st.lists(st.floats(-9, 9), min_size=1, max_size=3),
            "tokens": st.integers(1, 999),
        },
    ),
    st.fixed_dictionaries(
        {"source": st.sampled_from(["random", "quadtree"]), "tokens": st.integers(1, 999)},
        optional={"seed": st.integers(0, 2**62)},
    ),
    st.fixed_dictionaries({"source": st.sampled_from(["all_fine", "all_coarse"])}),
    st.fixed_dictionaries({"threshold": st.floats(-9, 9)}),
)


@given(SCALES)
def test_scales_are_their_json(fields: dict[str, Any]) -> None:
    policy = ScalePolicy.of(fields)
    assert ScalePolicy.of(json.loads(json.dumps(fields))) == policy
    assert ScalePolicy.of(policy) is policy and hash(policy) == hash(ScalePolicy.of(fields))
    asked = ComputePolicy(scales=fields)  # type: ignore[arg-type]  # JSON
    assert asked == ComputePolicy(scales=policy) and asked.scale_policy == policy


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all_fine", ScalePolicy("all_fine")),
        ("all_coarse", ScalePolicy("all_coarse")),
        ("learned", ScalePolicy("learned")),
        ("random:31:7", ScalePolicy("random", tokens=31, seed=7)),
        ("random:31", ScalePolicy("random", tokens=31)),
        (0, ScalePolicy(threshold=0.0)),
        (-1.5, ScalePolicy(threshold=-1.5)),
    ],
)
def test_scales_by_their_names(value: Any, expected: ScalePolicy) -> None:
    assert ScalePolicy.of(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected at least one of source, threshold, tokens"),
        ({"seed": 3}, "expected at least one of source, threshold, tokens"),
        ({"source": "guess"}, "source must be one of learned, variance, .* got 'guess'"),
        ({"source": "all_fine", "threshold": 1.0}, "threshold belongs to learned, variance, entr"),
        ({"source": "random", "tokens": 9, "threshold": 1.0}, "threshold belongs to"),
        ({"source": "all_coarse", "tokens": 9}, "all_coarse leaves nothing for tokens to choose"),
        ({"source": "random"}, "random needs tokens"),
        ({"source": "quadtree"}, "quadtree needs tokens"),
        ({"threshold": "1"}, "threshold must be a finite number, .* got '1'"),
        ({"threshold": []}, "threshold must be a finite number"),
        ({"threshold": [1.0, math.nan]}, "threshold must be a finite number"),
        ({"threshold": True}, "threshold must be a finite number"),
        ({"tokens": 0}, "tokens must be an integer of 1 or more, got 0"),
        ({"tokens": 2.0}, "tokens must be an integer"),
        ({"source": "random", "tokens": 9, "seed": -1}, "seed must be an integer"),
        ({"depth": 1}, "unknown field 'depth'; known: source, threshold, tokens, seed"),
        ("random", "random needs tokens"),
        ("random:", "or random:TOKENS:SEED, got 'random:'"),
        ("random:1:2:3", "random:TOKENS:SEED"),
        ("random:-1", "random:TOKENS:SEED"),
        ("all_fine:3", "random:TOKENS:SEED, got 'all_fine:3'"),
        (True, "expected a number, a source, .* got True"),
        (None, "expected a number, a source"),
        ([1], "expected a number, a source"),
    ],
)
def test_scales_refuse(value: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"scales: .*{message}"):
        ScalePolicy.of(value)


def test_every_source_has_a_policy() -> None:
    for source in SCALE_SOURCES:
        tokens = 9 if source in ("random", "quadtree") else None
        assert ScalePolicy(source, tokens=tokens).source == source
    assert str(ScalePolicy("random", tokens=9, seed=2)) == "source=random,tokens=9,seed=2"
