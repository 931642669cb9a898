"""Exact multiply-accumulates of a vision transformer, per image, from what was executed.

Counted: every matrix product, attention scores and their weighted sum, gates, heads. Not counted,
like everywhere in the field: norms, activations, softmax, adds.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.format.spec.vision_tensors import (
    T2T_FEATURES,
    T2T_LAYERS,
    T2T_WIDTH,
    exit_rows,
    exit_width,
)


@dataclass(frozen=True, slots=True, eq=False)
class VisionCost:
    """Multiply-accumulates of the parts of one model, for one image.

    Learners of adaptive width are counted as they run (`VisionTransformer.run_stage`); the parts
    here hold their gates alone. Token reduction is counted as it runs, too.

    Attributes:
        stages: the blocks of every stage.
        stem: from pixels to tokens, of an image of the spec's size that is all fine.
        block: of an image of the spec's size.
        last_block: the last one as it runs: only the rows that the final head reads are updated.
        exits: of every early exit: head, gate and ensemble.
        head: the final one.
    """

    spec: VisionSpec
    stages: tuple[range, ...]
    stem: int
    block: int
    last_block: int
    exits: tuple[int, ...]
    head: int
    _stages: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)  # once computed

    @staticmethod
    def of(spec: VisionSpec) -> VisionCost:
        """The costs of a model."""
        ends = [exit_.after_block + 1 for exit_ in spec.exits] + [spec.num_layers]
        starts = [0, *ends[:-1]]
        exits = []
        for number, exit_ in enumerate(spec.exits):
            cost = exit_rows(spec, exit_) * exit_width(spec, exit_)
            cost += 4 * (exit_.criterion == "jei_dnn")
            if exit_.outputs in ("geometric", "arithmetic"):
                cost += (number + 1) * spec.num_classes
            exits.append(cost)
        widths = 1 if spec.pool in ("class", "mean") else 2  # two heads, or one of twice the width
        return VisionCost(
            spec=spec,
            stages=tuple(range(a, b) for a, b in zip(starts, ends, strict=True)),
            stem=_stem(spec),
            block=block_macs(spec, spec.tokens, spec.tokens),
            last_block=block_macs(spec, spec.tokens, _read_rows(spec, spec.tokens)),
            exits=tuple(exits),
            head=widths * spec.num_classes * spec.hidden_size,
        )

    def stage(self, number: int, tokens: int | None = None) -> int:
        """The blocks of a stage as they run, for an image of so many rows (None: the spec's)."""
        spec, blocks = self.spec, self.stages[number]
        count = spec.tokens if tokens is None else tokens
        if (number, count) not in self._stages:
            whole = block_macs(spec, count, count)
            last = whole
            if blocks.stop == spec.num_layers:
                last = block_macs(spec, count, _read_rows(spec, count))
            self._stages[number, count] = (len(blocks) - 1) * whole + last
        return self._stages[number, count]

    def stage_of(self, number: int, lengths: Sequence[int]) -> Tensor:
        """The blocks of a stage for images of these lengths, int64 [n]."""
        known = {length: self.stage(number, length) for length in set(lengths)}
        return torch.tensor([known[length] for length in lengths], dtype=torch.int64)

    def embedding(
        self, patches: Sequence[int], scales: int, regions: Sequence[int] | None = None
    ) -> Tensor:
        """From pixels to tokens, int64 [n].

        Args:
            patches: n * S, those that each image has of every scale, the coarsest first.
            scales: S.
            regions: n, those that the gate looked at; None without one.
        """
        costs = patch_macs(self.spec, scales)
        found = [
            sum(map(operator.mul, patches[i : i + scales], costs))
            for i in range(0, len(patches), scales)
        ]
        if regions is not None:
            each = region_macs(self.spec)
            found = [known + count * each for known, count in zip(found, regions, strict=True)]
        return torch.tensor(found, dtype=torch.int64)

    def image(self, level: int, tokens: int | None = None) -> int:
        """All an image of finest patches runs that leaves at exit `level`, or at the head (G)."""
        last = len(self.exits)
        if not 0 <= level <= last:
            raise InvalidInput(f"cost: level must lie in 0 .. {last}, is {level}")
        ran = sum(self.stage(number, tokens) for number in range(level + 1))
        heads = sum(self.exits[: level + 1])
        return self._stem(tokens) + ran + heads + (self.head if level == last else 0)

    def dense(self, tokens: int | None = None) -> int:
        """The backbone without exits, all patches fine and every learner running: what `forward`
        could run at most, for an image of so many rows (None: the spec's)."""
        blocks = sum(self.stage(number, tokens) for number in range(len(self.stages)))
        return self._stem(tokens) + blocks + self.head + self._all_learners(tokens)

    def executed(
        self, levels: Tensor, tokens: Tensor | None = None, learned: Tensor | int = 0
    ) -> Tensor:
        """int64 [n] that n images ran.

        Args:
            levels: integer [n], where each left.
            tokens: integer [n], rows of each; None is the spec's.
            learned: int64 [n], of learners, from `VisionTransformer.run_stage`.
        """
        lengths = [None] * len(levels) if tokens is None else tokens.tolist()
        pairs = zip(levels.tolist(), lengths, strict=True)
        known: dict[tuple[int, int | None], int] = {}
        found = []
        for pair in pairs:
            if pair not in known:
                known[pair] = self.image(*pair)
            found.append(known[pair])
        return torch.tensor(found, dtype=torch.int64) + learned

    def repo_metric(self, level: int) -> float:
        """The "Mul-Adds" that JEI-DNN's code reports for an image that leaves at a level.

        These are not those of the forward pass: a linear layer counts its weights and biases once,
        whatever the number of tokens; attention is free; a layer norm counts 2.5 and a GELU 4 per
        element; a gate counts the passes over its logits (networkslab/dynn op_counter.py).
        """
        spec, d, tokens = self.spec, self.spec.hidden_size, self.spec.tokens
        classes, norm = spec.num_classes, 2.5 * tokens * d
        qkv = 3 * d * (d + spec.qkv_bias)
        mlp = spec.mlp_size * (d + 1) + d * (spec.mlp_size + 1) + 4 * tokens * spec.mlp_size
        block = 2 * norm + qkv + d * (d + 1) + mlp
        head = classes * (d + 1)
        gate = classes + (classes + 1) + 2 * classes + 5 * classes + 5
        last = len(spec.exits)
        blocks = self.stages[level].stop
        # Their code norms all tokens after every block.
        total = _repo_stem(spec) + blocks * (block + norm)
        for exit_ in spec.exits[: level + 1]:
            total += head + gate * (exit_.criterion == "jei_dnn")
        return total + (norm + head if level == last else 0)

    def _stem(self, tokens: int | None) -> int:
        if tokens is None or self.spec.stem == "t2t":
            return self.stem
        return (tokens - self.spec.prefix_tokens) * patch_macs(self.spec, 1)[-1]

    def _all_learners(self, tokens: int | None) -> int:
        spec, width = self.spec, self.spec.width
        if width is None:
            return 0
        count = spec.tokens if tokens is None else tokens
        updated = _read_rows(spec, count)
        d, last = spec.hidden_size, spec.num_layers - 1
        asking, seen = last * count + updated, spec.num_layers * count
        attention = 2 * width.attention_bottleneck * (asking + seen)
        return 2 * d * width.learners * (attention + width.mlp_bottleneck * asking)


def last_rows(spec: VisionSpec) -> int | None:
    """First rows of an image that the last block updates, as the final head reads no others.

    None for all: it reads them, or learners of the official rule depend on them.
    """
    if spec.width is not None and spec.width.rule == "official":
        return None
    return {"class": 1, "distilled": 2}.get(spec.pool)


def _read_rows(spec: VisionSpec, tokens: int) -> int:
    return last_rows(spec) or tokens


Count = TypeVar("Count", int, Tensor)


def block_macs(spec: VisionSpec, tokens: Count, updated: Count, fed: Count | None = None) -> Count:
    """A block over `tokens` rows that updates so many of them; all integers, or all integer [n].

    Args:
        fed: rows that the feed-forward part sees, where others leave before it; None: `updated`.
    """
    d, width = spec.hidden_size, spec.width
    each, mlp = d * d, 2 * d * spec.mlp_size  # each of q, k, v and o, for one row
    if width is not None and width.attention_bottleneck:
        each = d * width.learners
    if width is not None and width.mlp_bottleneck:
        mlp = d * (width.learners + 1)
    fed = updated if fed is None else fed
    return 2 * each * (updated + tokens) + 2 * d * updated * tokens + mlp * fed


def patch_macs(spec: VisionSpec, scales: int) -> list[int]:
    """Embedding one patch of every scale, the coarsest first."""
    d, channels = spec.hidden_size, len(spec.preprocess.mean)
    fine = channels * spec.patch_size**2 * d
    found = [fine] * scales
    mixed = spec.scales
    if mixed is None or scales == 1:
        return found
    for i, ratio in enumerate(reversed(mixed.ratios)):
        if mixed.embed == "separate" and mixed.kernel == "region":
            found[i] = fine * ratio**2
        elif mixed.embed == "conv":
            # Its finest patches, a convolution of 2 x 2 on every level above them, and the last.
            levels = sum((ratio >> step) ** 2 for step in range(1, ratio.bit_length()))
            found[i] += fine * ratio**2 + levels * 4 * d * d + d * d
    return found


def region_macs(spec: VisionSpec) -> int:
    """The scale gate for one region."""
    mixed = spec.scales
    if mixed is None or mixed.gate is None:
        return 0
    pixels = len(spec.preprocess.mean) * (spec.patch_size * mixed.ratios[-1]) ** 2
    widths = (pixels, *mixed.gate.widths, 1)
    return sum(a * b for a, b in itertools.pairwise(widths))


def _stem(spec: VisionSpec) -> int:
    rows, columns = spec.grid
    d = spec.hidden_size
    if spec.stem == "patch":
        return rows * columns * patch_macs(spec, 1)[0]
    total = rows * columns * 9 * T2T_WIDTH * d
    for tokens, width in _performers(spec):
        features = 2 * T2T_WIDTH * T2T_FEATURES  # of keys and queries
        attention = 2 * T2T_FEATURES * T2T_WIDTH + T2T_FEATURES
        total += tokens * (3 * T2T_WIDTH * width + features + attention)
        total += tokens * 3 * T2T_WIDTH**2
    return total


def _repo_stem(spec: VisionSpec) -> float:
    d = spec.hidden_size
    if spec.stem == "patch":
        return _stem(spec)  # a convolution is counted as it runs
    total = float(d * (9 * T2T_WIDTH + 1))
    for tokens, width in _performers(spec):
        total += 2.5 * tokens * (width + T2T_WIDTH) + 4 * tokens * T2T_WIDTH
        total += 3 * T2T_WIDTH * (width + 1) + 3 * T2T_WIDTH * (T2T_WIDTH + 1)
    return total


def _performers(spec: VisionSpec) -> list[tuple[int, int]]:
    """Tokens and channels of both performer layers."""
    height, width = spec.image_size
    found = []
    for channels, size, stride, padding in T2T_LAYERS:
        height = (height + 2 * padding - size) // stride + 1
        width = (width + 2 * padding - size) // stride + 1
        found.append((height * width, channels))
    return found
