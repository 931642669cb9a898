"""Planners on the device: launches of ``csrc/cuda/plan.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import INT_MAX, THREADS, WARP, ceil_div, check, check_device
from pyruntime.ops.cuda.kernels import kernels_of
from pyruntime.ops.topk import TopK
from pyruntime.plan import Plan

CHUNK = 256  # choices that one warp owns
HISTOGRAM = 12_000  # int32 of shared memory of a block: 48 KB less what the scan needs
TILE_WARPS = 8  # of a block of the three-launch form
MAX_SEGMENTS, MAX_SLOTS = 1024, 64  # of plan_topk
FUSED_SCORES = 16_384  # scores one block chooses from in one launch; above, choosing has its own


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """Keep row n unless ``scores[n] <= tau``; see `pyruntime.ops.reference.plan_threshold`."""
    check("plan_threshold", "scores", scores, (torch.float32,), (-1,))
    count, single = scores.shape[0], tau.dim() == 0
    check("plan_threshold", "tau", tau, (torch.float32,), () if single else (count,))
    check_device("plan_threshold", scores, tau=tau)
    source = (scores.data_ptr(), tau.data_ptr(), 0 if single else 1)
    return _sort("threshold", source, _Target(scores, count, 1, 1, scores if weighted else None))


def plan_partition(labels: Tensor, segments: int, weights: Tensor | None = None) -> Plan:
    """Choices grouped by label; see `pyruntime.ops.reference.plan_partition`.

    A label outside [0, segments) is dropped: reporting one would mean waiting for the device.
    """
    check("plan_partition", "labels", labels, (torch.int32,), (-1,) * min(labels.dim(), 2))
    count, choices = labels.shape if labels.dim() == 2 else (labels.shape[0], 1)
    if weights is not None:
        check("plan_partition", "weights", weights, (torch.float32,), tuple(labels.shape))
    check_device("plan_partition", labels, weights=weights)
    source = (labels.data_ptr(), segments)
    return _sort("labels", source, _Target(labels, count, choices, segments, weights))


def plan_topk(
    logits: Tensor,
    rule: TopK,
    selection_bias: Tensor | None = None,
    limits: Tensor | None = None,
) -> Plan:
    """The segments ``rule`` picks for every row; see `pyruntime.ops.reference.plan_topk`.

    A warp holds a row in registers: at most 1024 segments, 64 slots and 32 groups.
    """
    check("plan_topk", "logits", logits, (torch.float32,), (-1, -1))
    count, experts = logits.shape
    rule.check(experts)
    if experts > MAX_SEGMENTS or rule.k > MAX_SLOTS or rule.groups > WARP:
        raise InvalidInput(
            f"plan_topk: at most {MAX_SEGMENTS} segments, {MAX_SLOTS} slots and {WARP} groups on a "
            f"GPU, got {experts}, {rule.k} and {rule.groups}"
        )
    if selection_bias is not None:
        check("plan_topk", "selection_bias", selection_bias, (torch.float32,), (experts,))
    if limits is not None:
        check("plan_topk", "limits", limits, (torch.float32,), (count, 3))
    check_device("plan_topk", logits, selection_bias=selection_bias, limits=limits)
    ids = torch.empty(count, rule.k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(count, rule.k, dtype=torch.float32, device=logits.device)
    target = _Target(logits, count, rule.k, experts, weights)
    choose = (
        logits.data_ptr(),
        0 if selection_bias is None else selection_bias.data_ptr(),
        0 if limits is None else limits.data_ptr(),
        *(rule.k, rule.flags, rule.groups, rule.top_groups, rule.epsilon, rule.scale),
        *(count, experts, ids.data_ptr(), weights.data_ptr()),
    )
    items = 2 if experts <= 2 * WARP else 8 if experts <= 8 * WARP else 32
    fits = items < 32 and target.total <= target.warps * CHUNK
    if fits and 0 < count * experts <= FUSED_SCORES:
        warps = min(target.warps, max(ceil_div(target.total, CHUNK), count))  # a warp per row
        target.kernels.launch(
            f"plan_topk_small_{items}",
            (1, 1),
            (warps * WARP, 1),
            *choose,
            *target.fields,
            shared=target.shared(warps),
        )
        return target.plan
    if count:
        rows = THREADS // WARP
        grid = (ceil_div(count, rows), 1)
        target.kernels.launch(f"plan_topk_choose_{items}", grid, (THREADS, 1), *choose)
    return _sort("labels", (ids.data_ptr(), experts), target)


def quantile(scores: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile; see `pyruntime.ops.reference.quantile`."""
    check("quantile", "scores", scores, (torch.float32,), (-1,))
    count = scores.shape[0]
    if not 0.0 <= q <= 1.0 or count == 0:
        raise InvalidInput(
            f"quantile: needs q in [0, 1] and at least one score, got q={q} of {count}"
        )
    ordered = scores.sort().values
    rank = q * (count - 1)
    below = int(rank)
    if rank == below:
        return ordered[below].clone()
    low, high = ordered[below], ordered[below + 1]
    return low + (high - low) * (rank - below)


class _Target:
    """A plan of N * K choices in S segments about to be written, and what its launches share."""

    def __init__(
        self,
        like: Tensor,
        count: int,
        choices: int,
        segments: int,
        choice_weights: Tensor | None = None,
    ) -> None:
        self.total = count * choices
        if self.total > INT_MAX:
            raise InvalidInput(f"plan: {count} rows x {choices} choices exceed {INT_MAX}")
        if not 1 <= segments <= HISTOGRAM:
            raise InvalidInput(f"plan: segments must lie in [1, {HISTOGRAM}], got {segments}")
        self.segments = segments
        self.warps = min(WARP, HISTOGRAM // segments)  # the most a block may have
        # One allocation for the three index tensors, and offsets first: they are read by every op.
        memory = torch.empty(segments + 1 + 2 * self.total, dtype=torch.int32, device=like.device)
        offsets, choices_of = memory[: segments + 1], memory[segments + 1 :]
        rows, inverse = choices_of[: self.total], choices_of[self.total :]
        weights = None if choice_weights is None else torch.empty_like(choice_weights).view(-1)
        self.plan = Plan(rows, offsets, weights, inverse.view(count, choices), count, self.total)
        self.device = like.device
        # PlanOut of plan.cu
        self.fields = (
            rows.data_ptr(),
            offsets.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            inverse.data_ptr(),
            0 if choice_weights is None else choice_weights.data_ptr(),
            choices,
        )
        self.kernels = kernels_of(like.device.index)

    def shared(self, warps: int) -> int:
        """Bytes of the histograms of a block."""
        return 4 * warps * self.segments


def _sort(kind: str, source: tuple[int, ...], target: _Target) -> Plan:
    """The stable counting sort of plan.cu over the choices that ``source`` labels."""
    total, segments, kernels = target.total, target.segments, target.kernels
    if total == 0:
        target.plan.offsets.zero_()
        return target.plan
    if total <= target.warps * CHUNK:
        # A thread per segment where possible: the scan over segments is one pass then.
        warps = max(ceil_div(total, CHUNK), min(target.warps, ceil_div(segments, WARP)))
        kernels.launch(
            f"plan_{kind}_small",
            (1, 1),
            (warps * WARP, 1),
            *source,
            *target.fields,
            total,
            shared=target.shared(warps),
        )
        return target.plan
    warps = min(target.warps, TILE_WARPS)
    tiles = ceil_div(total, warps * CHUNK)
    if tiles * segments > INT_MAX:
        raise InvalidInput(f"plan: {total} choices of {segments} segments are too many")
    counts = torch.empty(segments * tiles, dtype=torch.int32, device=target.device)
    at, block, shared = counts.data_ptr(), (warps * WARP, 1), target.shared(warps)
    kernels.launch(f"plan_{kind}_count", (tiles, 1), block, *source, at, total, shared=shared)
    offsets = target.plan.offsets.data_ptr()
    kernels.launch("plan_scan", (1, 1), (1024, 1), at, offsets, tiles, segments)
    kernels.launch(
        f"plan_{kind}_scatter",
        (tiles, 1),
        block,
        *source,
        *target.fields,
        *(at, total),
        shared=shared,
    )
    return target.plan
