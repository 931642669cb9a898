"""Converted test models, and a cache driven by hand: what the engine does, step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.engine.runtime import Output, Runtime, load
from pyruntime.format.convert import convert
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import BLOCK, PagedKV
from tests.checkpoints import write_gateskip_pt, write_hf_folder
from tests.oracle.gateskip import Oracle

Policy = ComputePolicy | None
GATE_TYPES: dict[str, dict[str, Any]] = {
    "vector": {},
    "scalar": {"gate_type": "scalar"},
    "mlp": {"gate_type": "mlp"},
    "mlp scalar": {"gate_type": "mlp", "mlp_scalar": True},
    "shared": {"shared": True},
}
every_gate = pytest.mark.parametrize("gates", GATE_TYPES.values(), ids=list(GATE_TYPES))


def gated(folder: Path, base: Mapping[str, Any] | None = None, **gates: Any) -> tuple[Path, Oracle]:
    """A random gated model: its converted folder, and the oracle over its original tensors."""
    gates = {"bias": 0.0, "std": 0.3, **gates}
    write_hf_folder(folder / "hf", **(base or {}))
    state = write_gateskip_pt(folder / "gated.pt", folder / "hf", **gates)
    convert(folder / "gated.pt", folder / "model")
    return folder / "model", oracle_of(folder / "hf", state, **gates)


def oracle_of(hf: Path, state: dict[str, Tensor], **gates: Any) -> Oracle:
    config = json.loads((hf / "config.json").read_text())
    notes = {key: gates[key] for key in ("gating_mode", "actually_gate") if key in gates}
    return Oracle(state, config, **notes)


def plain(folder: Path, **base: Any) -> Path:
    """A random ungated model, converted."""
    write_hf_folder(folder / "hf", **base)
    convert(folder / "hf", folder / "model")
    return folder / "model"


def opened(path: Path, backend_name: str | None = None) -> Runtime:
    """The runtime, without its timing-dependent choice between packed and dense execution."""
    runtime = load(path, backend_name=backend_name)
    runtime.decisions.packed_below = 1.0
    return runtime


def random_tokens(seed: int, *shape: int) -> Tensor:
    """Ids of bytes: neither padding nor end of sequence."""
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


TOKENS = random_tokens(5, 2, 37)


def logits_of(output: Output) -> Tensor:
    assert isinstance(output.logits, Tensor)
    return output.logits


def skip(ratio: float, **options: Any) -> ComputePolicy:
    return ComputePolicy(budget=1 - ratio, mode="batch_quantile", **options)


def calibration(
    runtime: Runtime, budgets: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
) -> dict[str, Any]:
    """A record whose thresholds are quantiles of the scores of a dense pass over random tokens."""
    seen: dict[tuple[int, int], Tensor] = {}

    def remember(layer: int, branch: int, scores: Tensor) -> Tensor:
        seen[layer, branch] = scores.clone()
        return torch.tensor(-torch.inf)

    session = Session(runtime)
    session.step({"calibration": random_tokens(99, 200).tolist()}, rule=remember)
    layers = range(runtime.spec.num_layers)

    def tau(layer: int, branch: int, budget: float) -> float | None:
        if (layer, branch) not in seen:
            return None
        return float(torch.quantile(seen[layer, branch], 1 - budget))

    return {
        "kind": "gateskip", "budgets": list(budgets),
        "thresholds": [[[tau(i, b, budget) for b in (0, 1)] for i in layers] for budget in budgets],
        "kept": list(budgets), "tokens": 200, "data_sha256": "0" * 64, "default_budget": 1.0,
    }  # fmt: skip


class Session:
    """Sequences on one paged cache; every call of `step` is one forward pass.

    Attributes:
        trace: of the last step.
        router: of the last step.
        seen: tokens so far, by sequence.
    """

    def __init__(self, runtime: Runtime, blocks: int = 64) -> None:
        self.runtime = runtime
        self.kv = PagedKV(runtime.spec, blocks)
        self.free = list(range(blocks))[::-1]  # handed out backwards: no order is special
        self.blocks: dict[str, list[int]] = {}
        self.seen: dict[str, list[int]] = {}
        self.trace: Trace
        self.router: Router

    def fork(self, source: str, target: str, count: int) -> None:
        """A sequence that shares the first `count` cached tokens (whole blocks) of another."""
        assert count % BLOCK == 0
        self.blocks[target] = self.blocks[source][: count // BLOCK]
        self.seen[target] = self.seen[source][:count]

    def step(
        self,
        new: Mapping[str, Sequence[int]],
        policy: Policy | Mapping[str, Policy] = None,
        *,
        replay: Tensor | None = None,
        rule: Any = None,
    ) -> dict[str, Tensor]:
        """Logits [n, V] of the new tokens of every sequence."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for name, ids in new.items():
            mine, seen = self.blocks.setdefault(name, []), self.seen.setdefault(name, [])
            for token in ids:
                if len(seen) == len(mine) * BLOCK:
                    mine.append(self.free.pop())
                tokens.append(token)
                positions.append(len(seen))
                slots.append(mine[-1] * BLOCK + len(seen) % BLOCK)
                seen.append(token)
        width = max(len(self.blocks[name]) for name in new)
        lengths = [len(ids) for ids in new.values()]
        batch = Batch(
            torch.tensor(tokens),
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int32),
            torch.repeat_interleave(torch.arange(len(new)), torch.tensor(lengths)).int(),
            torch.tensor(
                [self.blocks[n] + [0] * (width - len(self.blocks[n])) for n in new],
                dtype=torch.int32,
            ),
            torch.arange(len(tokens)),
        )
        policies = [policy.get(n) if isinstance(policy, Mapping) else policy for n in new]
        self.router = self.runtime.router(batch, policies, replay)
        if rule is not None:
            self.router.rule = rule
        logits = self.runtime.model.forward(batch, self.kv, self.router)
        self.trace = self.runtime.trace(self.router, batch, policies)
        return dict(zip(new, logits.split(lengths), strict=True))

    def chunked(
        self, name: str, ids: Sequence[int], size: int, policy: Policy = None
    ) -> tuple[Tensor, Tensor]:
        """A prompt in pieces of `size`: logits [n, V] and keep masks [L, 2, n]."""
        logits, kept = [], []
        for at in range(0, len(ids), size):
            logits.append(self.step({name: ids[at : at + size]}, policy)[name])
            kept.append(self.trace.kept)
        return torch.cat(logits), torch.cat(kept, -1)

    def greedy(
        self, prompts: Mapping[str, Sequence[int]], count: int, policy: Policy = None
    ) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """`count` greedy tokens of every prompt, and the logits [count, V] they come from."""
        tokens: dict[str, list[int]] = {name: [] for name in prompts}
        logits: dict[str, list[Tensor]] = {name: [] for name in prompts}
        new: Mapping[str, Sequence[int]] = prompts
        for _ in range(count):
            last = {name: rows[-1] for name, rows in self.step(new, policy).items()}
            for name, row in last.items():
                logits[name].append(row)
                tokens[name].append(int(row.argmax()))
            new = {name: ids[-1:] for name, ids in tokens.items()}
        return tokens, {name: torch.stack(rows) for name, rows in logits.items()}
