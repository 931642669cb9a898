"""A small random gated model in the runtime format, calibrated on random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyruntime.engine.runtime import full_batch, load
from pyruntime.format.convert import convert
from pyruntime.format.load import write_calibration
from pyruntime.gates.routing import Router
from pyruntime.layers.kv import PagedKV
from tests.checkpoints import write_gateskip_pt, write_hf_folder

BUDGETS = (1.0, 0.75, 0.5, 0.25)


def gated_folder(folder: Path, **shape: Any) -> Path:
    """A vector-gated model whose thresholds at budget b skip 1 - b of random tokens."""
    write_hf_folder(folder / "hf", **shape)
    write_gateskip_pt(folder / "gated.pt", folder / "hf", bias=0.0, std=0.3)
    destination = folder / "model"
    convert(folder / "gated.pt", destination)
    runtime = load(destination)
    layers = runtime.spec.num_layers
    scores: dict[tuple[int, int], Tensor] = {}

    def remember(layer: int, branch: int, row_scores: Tensor) -> Tensor:
        scores[layer, branch] = row_scores.clone()
        return torch.tensor(-torch.inf)

    tokens = torch.randint(3, 259, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    batch, blocks = full_batch([tokens])
    router = Router(runtime.model.ops, batch.num_rows, rule=remember)
    runtime.model.forward(batch, PagedKV(runtime.spec, blocks), router)
    write_calibration(
        destination,
        {
            "kind": "gateskip",
            "budgets": list(BUDGETS),
            "thresholds": [
                [
                    [float(torch.quantile(scores[layer, branch], 1 - budget)) for branch in (0, 1)]
                    for layer in range(layers)
                ]
                for budget in BUDGETS
            ],
            "kept": list(BUDGETS),
            "tokens": 200,
            "data_sha256": "0" * 64,
            "default_budget": 1.0,
        },
    )
    return destination
