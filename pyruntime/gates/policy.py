"""How much compute a request may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyruntime.errors import InvalidInput

CAUSAL_MODES = ("calibrated",)
QUANTILE_MODES = ("batch_quantile", "seq_quantile", "exact_k")
MODES = CAUSAL_MODES + QUANTILE_MODES
KV_MODES = ("dense", "copy")
BRANCHES = ("attn", "mlp")


@dataclass(frozen=True, slots=True)
class ComputePolicy:
    """A compute budget and the rule that spends it; None means what the model folder stores.

    Attributes:
        budget: share of branch executions to keep, in [0, 1]; the skip ratio is 1 - budget.
        mode: ``calibrated`` (fixed thresholds: causal, independent of batch mates), or a published
            non-causal rule: ``batch_quantile``, ``seq_quantile`` or ``exact_k``.
        exit: early-exit setting; no family that is implemented has exits.
        experts: expert-count setting; no family that is implemented has experts.
        kv_mode: ``dense`` computes keys and values of skipped tokens, ``copy`` takes those of the
            layer below (an approximation: measure accuracy before using it).
        branches: the branches that may skip.
        every_second_layer: layers with an even index never skip.

    Raises:
        InvalidInput: a value outside its range.
    """

    budget: float | None = None
    mode: str | None = None
    exit: Any = None
    experts: Any = None
    kv_mode: str | None = None
    branches: tuple[str, ...] = BRANCHES
    every_second_layer: bool = False

    def __post_init__(self) -> None:
        budget = self.budget
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1
        ):
            raise InvalidInput(f"budget must be a number in [0, 1], got {budget!r}")
        if self.mode is not None and self.mode not in MODES:
            raise InvalidInput(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.kv_mode is not None and self.kv_mode not in KV_MODES:
            raise InvalidInput(
                f"kv_mode must be one of {', '.join(KV_MODES)}, got {self.kv_mode!r}"
            )
        if not set(self.branches) <= set(BRANCHES):
            raise InvalidInput(f"branches must be among {BRANCHES}, got {self.branches}")
        for name in ("exit", "experts"):
            if getattr(self, name) is not None:
                raise InvalidInput(f"{name} is set, but this model has none to choose from")

    def may_skip(self, layer: int, branch: int) -> bool:
        """Whether branch 0 (attention) or 1 (MLP) of a layer may skip at all."""
        if self.every_second_layer and layer % 2 == 0:
            return False
        return BRANCHES[branch] in self.branches
