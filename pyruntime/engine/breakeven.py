"""Where packing stops to pay, measured on the loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from pyruntime.layers.mlp import MLP
from pyruntime.models.decoder import Decoder
from pyruntime.plan import Plan

_ROWS = 128
_SHARES = (0.98, 0.95, 0.9, 0.8, 0.7)
_REPEATS = 5


def measure_break_even(model: Decoder) -> float:
    """Kept share from which running every row is faster than packing the kept ones.

    Times one feed-forward branch on 128 rows at a few kept shares; 1.0 means that packing always
    pays, and is assumed of a model that has expert layers only. The plan decides what a row gets
    either way, so timing noise can never change a result.
    """
    mlp = next((mlp for _, mlp in model.layers if isinstance(mlp, MLP)), None)
    if mlp is None:
        return 1.0
    network, ops = mlp.network, model.ops
    random = torch.Generator().manual_seed(0)  # the caller's seed is not ours to advance
    h = torch.randn(_ROWS, model.spec.hidden_size, generator=random)
    h = h.to(getattr(torch, model.spec.dtype))

    def branch(plan: Plan, run: Plan) -> None:
        packed = run.kept != _ROWS
        y = network(ops, h, run if packed else None)
        if run is not plan:
            y = ops.gather(y, plan)
        ops.combine(y, plan, h)

    everyone = Plan.all(_ROWS)
    for share in _SHARES:
        labels = torch.full((_ROWS,), -1, dtype=torch.int32)
        labels[torch.randperm(_ROWS, generator=random)[: round(share * _ROWS)]] = 0
        plan = ops.plan_partition(labels, 1)
        packed, dense = [], []
        for _ in range(_REPEATS):
            packed.append(_seconds(partial(branch, plan, plan)))
            dense.append(_seconds(partial(branch, plan, everyone)))
        if min(packed) <= min(dense):
            return 1.0 if share == _SHARES[0] else share
    return _SHARES[-1]


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
