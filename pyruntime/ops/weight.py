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
        int8      as bfloat16, with W[s, n, k] = data * scale[s, n] and -127 <= data <= 127

    Out of range entries are zero. ``interleaved`` marks a pair of matrices (gate, up) whose panels
    hold 16 columns of each, so that ``silu(gate) * up`` needs no second pass; then N counts both.
    ``scale`` is float32 [S, N] of int8 matrices, None of others; of a pair the gate rows come
    first, then the up rows, as in a bias. int8 multiplies activations of either dtype.
    """

    data: Tensor
    out_features: int
    in_features: int
    layout: str = "panel"
    interleaved: bool = False
    scale: Tensor | None = None

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

    def quantize(self) -> Weight:
        """int8 of float matrices: each row n gets the scale absmax / 127 and is rounded to it.

        Symmetric, per output channel, half to even, so the error of an entry is at most half its
        scale. A row of zeros (or too small for a normal scale) has the scale 0. The panels are
        converted one matrix at a time, so little more than the result is allocated.

        Raises:
            InvalidInput: int8 already, or an entry is not finite.
        """
        if self.data.dtype == torch.int8:
            raise InvalidInput("quantize: the weight is int8 already")
        if self.layout == "dense":
            if self.interleaved:
                return Weight.pack_gate_up(*self.data.chunk(2, dim=1)).quantize()
            return Weight.pack(self.data).quantize()
        rows = self.data.shape[1] * PANEL
        shape = panel_shape(self.segments, rows, self.in_features, torch.int8)
        data = torch.empty(shape, dtype=torch.int8)
        columns = torch.empty(shape[0], shape[1], PANEL)
        for to, scale, panels in zip(data, columns, self.data, strict=True):
            wide = panels.float()
            if wide.dim() == 3:  # float32 panels [P, K, 32]
                wide = torch.nn.functional.pad(wide, (0, 0, 0, wide.shape[1] % 2))
                wide = wide.unflatten(1, (-1, 2)).transpose(2, 3)
            size = wide.abs().amax((1, 3))
            if not bool(size.isfinite().all()):
                raise InvalidInput("quantize: the weight has entries that are not finite")
            scale.copy_(size / 127)
            scale[scale < torch.finfo(torch.float32).tiny] = 0.0
            divisor = torch.where(scale > 0, scale, torch.inf)
            to.copy_(wide.div_(divisor[:, None, :, None]).round_())
        return Weight(
            data, self.out_features, self.in_features, "panel", self.interleaved,
            self._logical_rows(columns[:, :, None]).flatten(1).contiguous(),
        )  # fmt: skip

    def dense(self) -> Tensor:
        """The matrices as [S, N, K]; an interleaved pair comes back as gate rows, then up rows.

        int8 comes back multiplied by its scale, as float32.
        """
        matrices = self.data
        if self.layout == "panel":
            if matrices.dim() == 5:
                matrices = matrices.transpose(3, 4).flatten(2, 3)  # [S, P, K, 32]
            matrices = self._logical_rows(matrices)[:, :, : self.in_features]
        if self.scale is None:
            return matrices
        return matrices.float() * self.scale[:, :, None]

    def _logical_rows(self, panels: Tensor) -> Tensor:
        """Panels [S, P, K, 32] as matrices [S, N, K]; of a pair gate rows, then up rows."""
        segments, _, depth, _ = panels.shape
        rows = panels.transpose(2, 3)
        if not self.interleaved:
            return rows.reshape(segments, -1, depth)[:, : self.out_features]
        pair = torch.unflatten(rows, 2, (2, HALF)).transpose(1, 2)
        pair = pair.reshape(segments, 2, -1, depth)[:, :, : self.out_features // 2]
        return pair.reshape(segments, self.out_features, depth)

    def take_rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [n] of the first matrix, [n, K]: one layout serves lookup and head.

        int8 comes back multiplied by its scale, as float32.
        """
        if self.layout == "dense":
            return self.data[0][ids]
        taken = self.data[0][ids // PANEL, :, ids % PANEL]
        taken = taken.reshape(ids.numel(), -1)[:, : self.in_features]
        return taken if self.scale is None else taken.float() * self.scale[0][ids, None]


def panel_shape(segments: int, rows: int, depth: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the panel layout of ``segments`` matrices [rows, depth]."""
    panels = -(-rows // PANEL)
    if dtype in (torch.bfloat16, torch.int8):
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
