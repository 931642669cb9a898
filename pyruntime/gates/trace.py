"""What was executed: decisions, exact multiply-accumulates, and the paths taken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Record of one forward pass over N rows of L layers.

    Attributes:
        kept: bool [L, 2, N], whether a row ran attention (0) and the MLP (1); replayable.
        macs_per_row: int64 [N], multiply-accumulates executed for each row, gates and K/V included.
        macs_dense_per_row: int64 [N], those of the same model without gates, every branch run.
        paths: how many branches ran "all" rows, "packed" ones, "none", or "dense" (every row,
            because packing was measured not to pay).
        mode: the routing rule.
        kv_mode: "dense", or "copy" where skipped rows took keys and values of the layer below.
        budgets: float32 [N], the compute budget each row was given.
    """

    kept: Tensor
    macs_per_row: Tensor
    macs_dense_per_row: Tensor
    paths: dict[str, int]
    mode: str
    kv_mode: str
    budgets: Tensor

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return int(self.macs_per_row.sum())

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of the ungated dense model on the same rows."""
        return int(self.macs_dense_per_row.sum())

    @property
    def skipped_share(self) -> float:
        """GateSkip's own metric: mean over branches of the share of rows that were skipped."""
        return 1.0 - float(self.kept.float().mean()) if self.kept.numel() else 0.0

    def per_token_compute(self) -> Tensor:
        """Executed over dense multiply-accumulates of each row, float32 [N].

        Above 1 where gates cost more than they save.
        """
        return self.macs_per_row.float() / self.macs_dense_per_row.float()
