"""Refusals of the native ops: every message names op, argument, expected and actual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops import TopK, Weight, native
from pyruntime.plan import Plan
from tests.ops.strategies import segments_plan

X, PLAN = torch.zeros(4, 8), Plan.all(4)
W = Weight.pack(torch.zeros(5, 8))
PAIR = Weight.pack_gate_up(torch.zeros(5, 8), torch.zeros(5, 8))
two = segments_plan([2, 2], 0)
I4 = torch.arange(4).int()
KEYS, VALUES = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 1, 32, 32)


def attend(**changed: Any) -> Tensor:
    """A legal call with some arguments changed."""
    arguments = {
        "q": X, "rows": None, "positions": I4, "sequences": I4, "block_tables": I4[:, None],
        "keys": KEYS, "values": VALUES, "head_dim": 4, "scale": 1.0,
    }  # fmt: skip
    return native.attention(**(arguments | changed))


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "scores dtype": (
        lambda: native.plan_threshold(X[0].double(), torch.tensor(0.0)),
        "plan_threshold: scores must be a contiguous CPU torch.float32 tensor of rank 1, got "
        r"contiguous torch.float64 \[8\] on cpu",
    ),
    "tau rows": (
        lambda: native.plan_threshold(X[0], torch.zeros(3)),
        "plan_threshold: tau has 3 rows, scores 8",
    ),
    "topk rank": (
        lambda: native.plan_topk(X[0], TopK(1)), "plan_topk: logits must be .* rank 2, got .*"
    ),
    "topk k": (lambda: native.plan_topk(X, TopK(9)), r"plan_topk: k must lie in \[1, 8\], got 9"),
    "topk bias": (
        lambda: native.plan_topk(X, TopK(1), X), "plan_topk: selection_bias must .* rank 1, got .*"
    ),
    "topk limits": (
        lambda: native.plan_topk(X, TopK(1), None, X[0]), "plan_topk: limits must .* rank 2, got .*"
    ),
    "label weights": (
        lambda: native.plan_partition(torch.zeros(2, dtype=torch.int32), 2, X),
        "plan_partition: weights must be .* rank 1, got .*",
    ),
    "labels": (
        lambda: native.plan_partition(X[0], 2),
        "plan_partition: labels must be .*int32.*got contiguous torch.float32",
    ),
    "gather rows": (
        lambda: native.gather(X[:3], PLAN),
        r"gather: x must be a contiguous CPU tensor \[4, H\], got .*\[3, 8\]",
    ),
    "gather strided": (lambda: native.gather(X.T.contiguous().T, PLAN), "gather: x .*got strided"),
    "compact rows": (lambda: native.compact(X[:3], PLAN), r"compact: x must .*\[4, ...\], got .*"),
    "compact segments": (
        lambda: native.compact(X, two), "compact: the plan must have one segment, has 2"
    ),
    "combine dtype": (
        lambda: native.combine(X, PLAN, X.bfloat16()),
        "combine: out must be .*float32.* got contiguous torch.bfloat16",
    ),
    "combine rows": (
        lambda: native.combine(X[:3], PLAN, X),
        r"combine: a plan of 4 of 4 rows needs packed \[4, H\].*got \[3, 8\] and \[4, 8\]",
    ),
    "combine channels": (
        lambda: native.combine(X, PLAN, X.clone(), X[:, :7].contiguous()),
        r"combine: channel_weights must be \[4, 8\], got .*\[4, 7\]",
    ),
    "matmul dtype": (
        lambda: native.segment_matmul(X.double(), W), "segment_matmul: x must be .*got .*float64"
    ),
    "matmul k": (
        lambda: native.segment_matmul(X[:, :7].contiguous(), W),
        "segment_matmul: x .*needs .*K=7, got panel torch.float32 K=8",
    ),
    "matmul weight dtype": (
        lambda: native.segment_matmul(X.bfloat16(), W), "segment_matmul: .*got panel torch.float32"
    ),
    "matmul dense": (
        lambda: native.segment_matmul(X, Weight(torch.zeros(1, 5, 8), 5, 8, "dense")),
        "segment_matmul: .*got dense",
    ),
    "matmul epilogue": (
        lambda: native.segment_matmul(X, W, epilogue="tanh"),
        "segment_matmul: epilogue must be one of .*got 'tanh'",
    ),
    "matmul pair": (
        lambda: native.segment_matmul(X, PAIR), "exactly for interleaved.*got 'none'"
    ),
    "matmul out": (
        lambda: native.segment_matmul(X, W, out=torch.zeros(4, 6)),
        r"segment_matmul: out must be .*\[4, 5\], got .*\[4, 6\]",
    ),
    "matmul out and out dtype": (
        lambda: native.segment_matmul(X, W, out=X[:, :5].contiguous(), out_dtype=torch.bfloat16),
        "segment_matmul: out must be .*bfloat16.*got contiguous torch.float32",
    ),
    "gather out": (
        lambda: native.gather(X, PLAN, out=torch.zeros(8, 4).T), "gather: out must .*got strided"
    ),
    "matmul no pair": (
        lambda: native.segment_matmul(X, W, epilogue="silu_mul"), "interleaved=False"
    ),
    "matmul segments": (
        lambda: native.segment_matmul(X, W, two),
        "segment_matmul: the plan has 2 segments, the weight 1",
    ),
    "matmul no plan": (
        lambda: native.segment_matmul(X, Weight.pack(torch.zeros(2, 5, 8))),
        "segment_matmul: 2 matrices need a plan",
    ),
    "matmul packed rows": (
        lambda: native.segment_matmul(X[:3], W, PLAN), r"x must be \[4, K\] packed rows, got"
    ),
    "matmul source rows": (
        lambda: native.segment_matmul(X[:3], W, PLAN, gather=True), r"\[4, K\] to gather from, got"
    ),
    "matmul bias": (
        lambda: native.segment_matmul(X, W, bias=torch.zeros(4)),
        r"bias must be \[1, 5\], got .*\[4\]",
    ),
    "matmul out dtype": (
        lambda: native.segment_matmul(X, W, out_dtype=torch.float16),
        "segment_matmul: out_dtype must be .*got torch.float16",
    ),
    "rotate heads": (lambda: native.rotate(X, X, I4, None, 3), "rotate: 8 columns .*heads of 3"),
    "rotate angles": (
        lambda: native.rotate(X, X, I4, None, 4), r"rotate: cos_sin must be \[positions, 4\]"
    ),
    "rotate positions": (lambda: native.rotate(X, X, I4[:3], None, 8), r"positions must be \[4\]"),
    "append cache": (
        lambda: native.append(X, X[:, :4].clone(), I4, I4, KEYS, KEYS[0, 0, 0], 4),
        r"a cache of 1 blocks and 1 heads of 4 has 1024 keys and as many values, got .* and \[32\]",
    ),
    "append slots": (
        lambda: native.append(X, X[:, :4].clone(), I4, I4.long(), KEYS, VALUES, 4),
        "append: slots must be .*int32.*got contiguous torch.int64",
    ),
    "append heads": (
        lambda: native.append(X, X[:, :2].clone(), I4, I4, KEYS, VALUES, 2), r"kv must be \[N, 4\]"
    ),
    "attention rows": (lambda: attend(rows=I4[:2].clone()), r"attention: rows must be \[4\]"),
    "attention sequences": (lambda: attend(sequences=I4[:2].clone()), r"sequences must be \[4\]"),
    "attention tables": (lambda: attend(block_tables=I4), "block_tables must be .* rank 2"),
    "attention cache dtype": (
        lambda: attend(keys=KEYS.bfloat16()), "attention: keys must be .*float32.*bfloat16"
    ),
    "attention cache": (lambda: attend(head_dim=64), "a cache of 1 blocks and 1 heads of 64 has"),
    "attention sinks": (lambda: attend(sinks=torch.zeros(3)), r"sinks must be \[2\]"),
    "attention window": (lambda: attend(window=-1), "window at least 0, got -1"),
    "norm weight": (
        lambda: native.rms_norm(X, torch.ones(7), 0.0),
        r"rms_norm: weight must be \[8\], got .*\[7\]",
    ),
    "norm probe": (
        lambda: native.rms_norm(X, torch.ones(8), 0.0, torch.ones(9)),
        r"rms_norm: probe must be \[8\]",
    ),
    "layer norm bias": (
        lambda: native.layer_norm(X, torch.ones(8), torch.ones(7), 0.0),
        r"layer_norm: bias must be \[8\], got .*\[7\]",
    ),
    "layer norm rows": (
        lambda: native.layer_norm(X, torch.ones(8), torch.ones(8), 0.0, I4.long()),
        "layer_norm: rows must be .*int32.*got contiguous torch.int64",
    ),
    "layer norm out dtype": (
        lambda: native.layer_norm(X, torch.ones(8), torch.ones(8), 0.0, None, torch.float16),
        "layer_norm: out_dtype must be .*got torch.float16",
    ),
    "patches rank": (
        lambda: native.patches(X, 1, 1), "patches: images must be .* rank 4, got .*"
    ),
    "patches out dtype": (
        lambda: native.patches(KEYS, 1, 1, out_dtype=torch.float16),
        "patches: out_dtype must be .*got torch.float16",
    ),
    "gate dtype": (lambda: native.gate(X.bfloat16()), "gate: logits must be .*got .*bfloat16"),
    "weight rank": (
        lambda: Weight.pack(torch.zeros(3)),
        r"Weight: expected .*got torch.float32 \[3\]",
    ),
    "weight dtype": (lambda: Weight.pack(torch.zeros(3, 3).half()), "Weight: expected .*float16"),
    "weight pair": (
        lambda: Weight.pack_gate_up(torch.zeros(3, 3), torch.zeros(3, 4)),
        r"gate \[3, 3\] .* and up \[3, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_op_argument_expected_and_actual(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(InvalidInput, match=f"(?s){message}"):
        call()
