"""Vision models as data: what a record may say, and the tensors it demands."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import FormatError
from pyruntime.format.spec import (
    ExitSpec,
    Preprocess,
    VisionSpec,
    WidthSpec,
    from_dict,
    model_tensors,
    to_dict,
    vision_tensors,
)

SEEN = Preprocess((0.5,) * 3, (0.2,) * 3)
PLAIN = VisionSpec(
    source_family="x", image_size=(32, 48), stem="patch", patch_size=16, hidden_size=64,
    num_layers=4, num_heads=4, mlp_size=96, num_classes=7, norm_eps=1e-6, prefix_tokens=1,
    preprocess=SEEN,
)  # fmt: skip
LEARNED = {"criterion": "learned", "threshold": 0.5}


def numbers(**fields: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields)


EXITS = numbers(
    strict=st.booleans(), norm=st.sampled_from(["shared", "own", "none"]),
    pool=st.sampled_from(["class", "mean"]), tau=st.floats(0.1, 2),
    outputs=st.sampled_from(["own", "sum", "geometric", "arithmetic"]),
    composition=st.sampled_from(["mass_sum", "independent"]),
)  # fmt: skip


@given(
    exits=st.lists(EXITS, max_size=3),
    criterion=st.sampled_from(["jei_dnn", "max_prob", "entropy", "patience", "learned"]),
    threshold=st.none() | st.floats(-5, 5),
    width=st.none() | st.builds(
        WidthSpec, st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.booleans(),
        st.sampled_from(["paper", "official", "kminus"]),
    ),
    fields=numbers(
        labels=st.just(tuple("abcdefg")), qk_norm=st.booleans(), pre_norm=st.booleans(),
        qkv_bias=st.booleans(), patch_bias=st.booleans(), stem=st.sampled_from(["patch", "t2t"]),
        pool=st.sampled_from(["class", "mean", "class_mean"]), prefix_tokens=st.integers(1, 5),
    ),
)  # fmt: skip
def test_round_trip(
    exits: list[Any], criterion: Any, threshold: Any, width: Any, fields: dict[str, Any]
) -> None:
    made = tuple(ExitSpec(n, criterion, threshold, **one) for n, one in enumerate(exits))
    spec = dataclasses.replace(PLAIN, exits=made, width=width, **fields)
    again = from_dict(VisionSpec, json.loads(json.dumps(to_dict(spec))), "x")
    assert again == spec
    names = [tensor.name for tensor in vision_tensors(spec)]
    assert len(set(names)) == len(names)
    assert [t.name for t in model_tensors(spec, None)] == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0, "num_layers": 0}, "hidden_size must be at least 1, is 0; num_layers"),
        ({"num_heads": 5}, "5 heads do not divide 64 channels"),
        ({"image_size": (32,)}, "image_size must be a height and a width"),
        ({"image_size": (32, 40)}, r"patches of 16 do not tile \(32, 40\)"),
        ({"prefix_tokens": 0}, "pool 'class' needs 1 prefix tokens"),
        ({"pool": "class_mean", "prefix_tokens": 0}, "pool 'class_mean' needs 1"),
        ({"pool": "distilled"}, "pool 'distilled' needs 2 prefix tokens"),
        ({"exits": (ExitSpec(1, "margin", 0.0), ExitSpec(1, "margin", 0.0))}, "must rise"),
        ({"exits": (ExitSpec(3, "margin", 0.0),)}, "lie outside of blocks 0 to 2"),
        ({"exits": (ExitSpec(0, "margin", 0.0, cascade=True),)}, "no exit before it to read"),
        ({"exits": (ExitSpec(0, "learned", 0.0, constant_class=7),)}, "class 7 of 7"),
        ({"pool": "mean", "norm_after_pool": True, "exits": (ExitSpec(0, "margin", 0.0),)},
         "shares a norm that follows the pooling"),
        ({"labels": ("a",)}, "1 labels for 7 classes"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(PLAIN, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preprocess((0.5,), (0.5, 0.5)), "need a number per channel each"),
        (lambda: Preprocess((0.5,), (0.0,)), "std must be positive"),
        (lambda: Preprocess((0.5,), (0.5,), crop=0.0), r"crop must be in \(0, 1\]"),
        (lambda: ExitSpec(0, "jei_dnn", 1.0, tau=0.0), "tau must be positive"),
        (lambda: ExitSpec(0, "margin", 1.0, constant_class=1), "only a learned gate"),
        (lambda: WidthSpec(0), "learners must be at least 1"),
        (lambda: WidthSpec(1, -1), "a bottleneck must be 0 or more"),
    ],
)
def test_records_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make()


@pytest.mark.parametrize(
    ("exit_", "shapes"),
    [
        (ExitSpec(0, "max_prob", 0.9), {"head.weight": (7, 64), "head.bias": (7,)}),
        (ExitSpec(0, "jei_dnn", 1.0), {"gate.weight": (4,), "gate.bias": (1,)}),
        (ExitSpec(0, **LEARNED), {"head.weight": (8, 64), "head.bias": (8,)}),
        (ExitSpec(0, constant_class=1, **LEARNED), {"head.weight": (1, 64), "head.bias": (1,)}),
        (ExitSpec(0, "margin", 0.0, norm="own"), {"norm.weight": (64,), "norm.bias": (64,)}),
        (ExitSpec(0, "margin", 0.0, outputs="geometric"),
         {"ensemble.weight": (1,), "ensemble.bias": (7,)}),
    ],
)  # fmt: skip
def test_tensors_of_an_exit(exit_: ExitSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    spec = dataclasses.replace(PLAIN, exits=(exit_,), dtype="bfloat16")
    found = {t.name: t for t in vision_tensors(spec)}
    for name, shape in shapes.items():
        assert found[f"exits.0.{name}"].shape == shape
    assert all(t.dtype == "float32" for name, t in found.items() if name.startswith("exits."))
    assert found["layers.0.mlp.up.weight"].dtype == "bfloat16"


def test_a_cascade_reads_the_logits_before() -> None:
    exits = (ExitSpec(0, "margin", 0.0), ExitSpec(2, "margin", 0.0, cascade=True))
    found = {t.name: t.shape for t in vision_tensors(dataclasses.replace(PLAIN, exits=exits))}
    assert found["exits.1.head.weight"] == (7, 71)
    assert found["exits.1.cascade.weight"] == (7,)
    assert "exits.0.cascade.weight" not in found
