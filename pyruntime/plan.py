"""The Plan: which source rows run, in which segment, and how their results come back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """An executable routing decision; every tensor contiguous and on one device.

    Attributes:
        rows: int32 [R], source row of each packed row, grouped by segment and ascending inside one.
        offsets: int32 [S+1], exclusive prefix sum of segment sizes; ``offsets[S] == R``.
        weights: float32 [R] combine weight of each packed row, or None for 1.
        inverse: int32 [N, K], packed position of the k-th choice of a source row, -1 where dropped.
        num_rows: N, the number of source rows.
        capacity: host-known upper bound of R. On the CPU ``rows`` has exactly R entries; on a GPU
            it has ``capacity`` entries and R lives in ``offsets``: no host ever waits for it.
    """

    rows: Tensor
    offsets: Tensor
    weights: Tensor | None
    inverse: Tensor
    num_rows: int
    capacity: int

    @property
    def num_segments(self) -> int:
        """S, the number of segments."""
        return self.offsets.numel() - 1

    @property
    def kept(self) -> int:
        """R, the number of rows that run (synchronises when the plan lives on a GPU)."""
        return self.rows.numel() if self.rows.device.type == "cpu" else int(self.offsets[-1])

    @property
    def dropped(self) -> int:
        """Choices that do not run: N*K - R."""
        return self.inverse.numel() - self.kept

    @property
    def is_all(self) -> bool:
        """True when every source row runs exactly once, in order: packing would be the identity."""
        return (
            self.num_segments == 1
            and self.inverse.shape[1] == 1
            and self.rows.device.type == "cpu"
            and self.rows.numel() == self.num_rows
        )

    @staticmethod
    def all(num_rows: int, device: torch.device | str = "cpu") -> Plan:
        """The plan in which every one of ``num_rows`` rows runs in one segment."""
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        offsets = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
        return Plan(rows, offsets, None, rows.view(-1, 1), num_rows, num_rows)

    def choices(self) -> Tensor:
        """Segment of every choice, int32 [N, K], -1 where dropped."""
        segment = torch.searchsorted(self.offsets[1:], self.inverse, right=True, out_int32=True)
        return torch.where(self.inverse < 0, -1, segment)

    def slot_weights(self) -> Tensor:
        """Combine weight of every choice, float32 [N, K], 0 where dropped."""
        if self.weights is None:
            return (self.inverse >= 0).float()
        return F.pad(self.weights, (0, 1))[self.inverse.long()]  # -1 finds the zero at the end

    def aligned(self, block: int) -> tuple[Tensor, Tensor]:
        """The block-aligned form that vLLM's and SGLang's grouped kernels take.

        Every segment is padded to whole blocks, so that a block belongs to one segment.

        Args:
            block: rows of a block, at least 1.

        Returns:
            int32 [B * block] flat slots (row * K + choice) of the packed rows, N * K where padded;
            int32 [B] segment of every block.

        Raises:
            InvalidInput: `block` is not positive.
        """
        if block < 1:
            raise InvalidInput(f"plan: a block needs at least one row, got {block}")
        sizes = self.offsets.diff().long()
        blocks = (sizes + block - 1) // block
        device = self.offsets.device
        segments = torch.repeat_interleave(torch.arange(len(sizes), device=device), blocks)
        # Padding before a segment shifts its rows.
        shift = (blocks * block).cumsum(0) - blocks * block - self.offsets[:-1].long()
        packed = torch.arange(self.kept, device=device)
        place = packed + torch.repeat_interleave(shift, sizes)
        position = self.inverse.flatten().long()
        taken = torch.nonzero(position >= 0)[:, 0]
        slots = torch.full(
            (len(segments) * block,), self.inverse.numel(), dtype=torch.int32, device=device
        )
        slots[place[position[taken]]] = taken.int()
        return slots, segments.int()

    def validate(self) -> None:
        """Check every invariant of the class; for tests and for plans made outside the planners.

        Raises:
            InvalidInput: naming the first invariant that does not hold.
        """
        count = self.kept
        rows, inverse = self.rows[:count].long(), self.inverse.long()
        sizes = self.offsets.diff()
        named = {"rows": self.rows, "offsets": self.offsets, "inverse": self.inverse}
        for name, tensor in named.items():
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise InvalidInput(f"plan: {name} must be contiguous int32, got {tensor.dtype}")
        if int(self.offsets[0]) != 0 or bool((sizes < 0).any()) or int(self.offsets[-1]) != count:
            raise InvalidInput(
                f"plan: offsets must rise from 0 to {count}, got {self.offsets.tolist()}"
            )
        if count and (int(rows.min()) < 0 or int(rows.max()) >= self.num_rows):
            raise InvalidInput(f"plan: rows must lie in [0, {self.num_rows})")
        segment = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes)
        if bool((segment.diff() * self.num_rows + rows.diff() < 0).any()):
            raise InvalidInput("plan: rows must ascend inside every segment")
        if self.weights is not None and self.weights[:count].dtype != torch.float32:
            raise InvalidInput(f"plan: weights must be float32, got {self.weights.dtype}")
        if inverse.shape[0] != self.num_rows:
            raise InvalidInput(f"plan: inverse has {inverse.shape[0]} rows, not {self.num_rows}")
        source = torch.arange(self.num_rows, device=rows.device)[:, None].expand_as(inverse)
        taken = inverse >= 0
        if int(taken.sum()) != count or not bool((rows[inverse[taken]] == source[taken]).all()):
            raise InvalidInput("plan: inverse must send every kept choice to its packed row")
        if count and inverse[taken].unique().numel() != count:
            raise InvalidInput("plan: inverse must reach every packed row once")
