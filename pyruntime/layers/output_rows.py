"""Some of the outputs of a linear layer, without a second copy of its weights."""

from __future__ import annotations

import dataclasses

from pyruntime.layers.residual import Linear
from pyruntime.ops.weight import PANEL, Weight


def output_rows(linear: Linear, start: int, stop: int) -> Linear:
    """The layer that computes outputs start to stop of `linear`, which is one matrix.

    Where panels end at both, it shares `linear`'s memory; else it has panels of its own.
    """
    weight = linear.weight
    if start % PANEL or (stop % PANEL and stop != weight.out_features):
        part = Weight.pack(weight.dense()[0, start:stop].contiguous())
    else:
        panels = weight.data[:, start // PANEL : -(-stop // PANEL)]
        part = dataclasses.replace(weight, data=panels, out_features=stop - start)
    return Linear(part, None if linear.bias is None else linear.bias[start:stop])
