"""Weight: the matrices of ``segment_matmul`` in the layout its kernel streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput

PANEL = 32  # output columns that one kernel pass produces: two 512-bit registers of float32
HALF = PANEL // 2
PAIRED = ("silu_mul", "swiglu_oai")  # epilogues that take an interleaved pair, and only one


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """S matrices [N, K] of one dtype, in one of two layouts.

    ``dense`` is [S, N, K]. ``panel`` is what the CPU kernel reads front to back: 32 output columns
    side by side for one step of K, so that a pass over K touches memory exactly once, in order::

        float32   [S, ceil(N/32), K, 32]              data[s, p, k, j]    = W[s, 32p+j, k]
        bfloat16  [S, ceil(N/32), ceil(K/2), 32, 2]   data[s, p, k, j, b] = W[s, 32p+j, 2k+b]

    Out of range entries are zero. ``interleaved`` marks a pair of matrices (gate, up) whose panels
    hold 16 columns of each, so that ``silu(gate) * up`` needs no second pass; then N counts both.
    """

    data: Tensor
    out_features: int
    in_features: int
    layout: str = "panel"
    interleaved: bool = False

    @property
    def segments(self) -> int:
        """S, the number of matrices."""
        return self.data.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the matrices."""
        return self.data.dtype

    @staticmethod
    def pack(dense: Tensor) -> Weight:
        """Panel layout of [N, K] or [S, N, K] (float32 or bfloat16).

        Raises:
            InvalidInput: another rank or dtype.
        """
        dense = _three_dimensional(dense)
        out_features, in_features = dense.shape[1:]
        return Weight(_to_panels(dense), out_features, in_features)

    @staticmethod
    def pack_gate_up(gate: Tensor, up: Tensor) -> Weight:
        """Interleaved panel layout of two matrices [I, K] or [S, I, K].

        Raises:
            InvalidInput: shapes differ, or another rank or dtype.
        """
        if gate.shape != up.shape or gate.dtype != up.dtype:
            raise InvalidInput(
                f"pack_gate_up: gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} "
                f"{up.dtype} must agree"
            )
        gate, up = _three_dimensional(gate), _three_dimensional(up)
        segments, inner, in_features = gate.shape
        pair = torch.stack([_pad_rows(gate, HALF), _pad_rows(up, HALF)], dim=1)
        rows = pair.view(segments, 2, -1, HALF, in_features).transpose(1, 2)
        panels = _to_panels(rows.reshape(segments, -1, in_features))
        return Weight(panels, 2 * inner, in_features, "panel", True)

    def dense(self) -> Tensor:
        """The matrices as [S, N, K]; an interleaved pair comes back as gate rows, then up rows."""
        if self.layout == "dense":
            return self.data
        if self.data.dim() == 5:
            segments, panels, pairs = self.data.shape[:3]
            rows = self.data.permute(0, 1, 3, 2, 4).reshape(segments, panels * PANEL, pairs * 2)
        else:
            segments, panels, depth = self.data.shape[:3]
            rows = self.data.permute(0, 1, 3, 2).reshape(segments, panels * PANEL, depth)
        rows = rows[:, :, : self.in_features]
        if not self.interleaved:
            return rows[:, : self.out_features]
        pair = rows.view(segments, -1, 2, HALF, self.in_features).transpose(1, 2)
        pair = pair.reshape(segments, 2, -1, self.in_features)[:, :, : self.out_features // 2]
        return pair.reshape(segments, self.out_features, self.in_features)

    def take_rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [n] of the first matrix, [n, K]: one layout serves lookup and head."""
        if self.layout == "dense":
            return self.data[0][ids]
        taken = self.data[0][ids // PANEL, :, ids % PANEL]
        return taken.reshape(ids.numel(), -1)[:, : self.in_features]


def panel_shape(segments: int, rows: int, depth: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the panel layout of ``segments`` matrices [rows, depth]."""
    panels = -(-rows // PANEL)
    if dtype == torch.bfloat16:
        return (segments, panels, -(-depth // 2), PANEL, 2)
    return (segments, panels, depth, PANEL)


def _three_dimensional(dense: Tensor) -> Tensor:
    if dense.dim() == 2:
        dense = dense[None]
    if dense.dim() != 3 or dense.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidInput(
            f"Weight: expected float32 or bfloat16 [N, K] or [S, N, K], "
            f"got {dense.dtype} {list(dense.shape)}"
        )
    return dense


def _pad_rows(rows: Tensor, multiple: int) -> Tensor:
    missing = -rows.shape[1] % multiple
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _to_panels(rows: Tensor) -> Tensor:
    segments, _, depth = rows.shape
    rows = _pad_rows(rows, PANEL)
    if rows.dtype == torch.float32:
        return _transpose_panels(rows.contiguous().view(segments, -1, PANEL, depth))
    if depth % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    # A pair of bfloat16 is moved as one 32-bit word: half the elements to permute.
    words = rows.contiguous().view(torch.int32).view(segments, -1, PANEL, rows.shape[2] // 2)
    return torch.unflatten(_transpose_panels(words).view(torch.bfloat16), -1, (PANEL, 2))


def _transpose_panels(panels: Tensor) -> Tensor:
    """[S, P, 32, K] to [S, P, K, 32], one matrix at a time: torch blocks 2-D transposes only."""
    segments, count, rows, depth = panels.shape
    out = panels.new_empty(segments, count, depth, rows)
    for to, panel in zip(out.flatten(0, 1), panels.flatten(0, 1), strict=True):
        to.copy_(panel.t())
    return out
