"""The rows of one step, packed: no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """N rows of B sequences; rows of one sequence are contiguous, positions ascending.

    Attributes:
        tokens: int64 [N].
        positions: int32 [N], place of a row in its sequence.
        slots: int32 [N], place of its keys and values in the cache: block * 32 + offset.
        seq_ids: int32 [N], its row of `block_tables`.
        block_tables: int32 [B, max_blocks], cache blocks of every sequence.
        logit_rows: int64 [M], rows whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    seq_ids: Tensor
    block_tables: Tensor
    logit_rows: Tensor

    @property
    def num_rows(self) -> int:
        """N."""
        return self.tokens.shape[0]
