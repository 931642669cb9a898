"""Images to tokens by the tokens-to-token stem of T2T-ViT (arXiv 2101.11986) with performers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.layers.norm import LayerNorm
from pyruntime.layers.residual import Linear
from pyruntime.ops.weight import Weight

_EPSILON = 1e-8  # of the denominator of the attention (yitu-opensource/T2T-ViT token_performer.py)


@dataclass(frozen=True, slots=True, eq=False)
class TokenPerformer:
    """One layer of linear attention over random features (Performer, arXiv 2009.14794), float32.

    The skip around the attention starts at the values, not at the input.

    Attributes:
        kq: [2 * E, C], keys then queries.
        v: [E, C].
        features: [M, E], frozen random directions.
        proj, up, down: [E, E].
    """

    norm1: LayerNorm
    kq: Linear
    v: Linear
    features: Weight
    proj: Linear
    norm2: LayerNorm
    up: Linear
    down: Linear

    def __call__(self, ops: ModuleType, x: Tensor, images: int) -> Tensor:
        """Tokens float32 [B * T, E] of x float32 [B * T, C], T rows of every image."""
        normed = self.norm1(ops, x)
        kq = ops.segment_matmul(normed, self.kq.weight, bias=self.kq.bias)
        out: Tensor = ops.segment_matmul(normed, self.v.weight, bias=self.v.bias)
        attended = self._attend(self._positive_features(ops, kq), out, images)
        _add(ops, attended, self.proj, out)
        inner = ops.segment_matmul(
            self.norm2(ops, out), self.up.weight, bias=self.up.bias, epilogue="gelu"
        )
        _add(ops, inner, self.down, out)
        return out

    def _positive_features(self, ops: ModuleType, kq: Tensor) -> Tensor:
        """exp(w u - |u|^2 / 2) / sqrt(M) of keys and queries u, [B * T, 2, M]."""
        u = kq.view(-1, self.features.in_features)
        phi: Tensor = ops.segment_matmul(u, self.features)
        phi -= u.square().sum(1, keepdim=True).mul_(0.5)
        phi.exp_().mul_(1.0 / math.sqrt(self.features.out_features))
        return phi.view(-1, 2, self.features.out_features)

    def _attend(self, phi: Tensor, v: Tensor, images: int) -> Tensor:
        """phi(q) (sum phi(k) v^T) / (phi(q) sum phi(k) + eps) of every image, [B * T, E]."""
        keys, queries = phi.unflatten(0, (images, -1)).unbind(2)
        state = torch.bmm(keys.transpose(1, 2), v.view(images, -1, v.shape[1]))
        # The denominator is one more column, not a product of its own: torch sums a matrix times a
        # vector in another order when there is but one image.
        state = torch.cat([state, keys.sum(1)[:, :, None]], 2)
        attended = torch.bmm(queries, state)
        return (attended[..., :-1] / (attended[..., -1:] + _EPSILON)).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class TokensToTokens:
    """Overlapping unfolds with a performer after each but the last.

    Attributes:
        layers: the performers.
        unfolds: kernel, stride and padding before every layer and before `project`.
        project: [D, 9 * E].
    """

    layers: tuple[TokenPerformer, ...]
    unfolds: tuple[tuple[int, int, int], ...]
    project: Linear

    def rows_of(self, height: int, width: int) -> int:
        """Rows of the largest matrix that one image needs."""
        rows, columns = _grid(height, width, *self.unfolds[0])
        return rows * columns

    def __call__(self, ops: ModuleType, images: Tensor) -> Tensor:
        """Tokens of images float32 [B, C, H, W], float32 [B * N, D], raster by raster."""
        count, _, height, width = images.shape
        tokens, in_channels_last = images, False
        for layer, unfold in zip(self.layers, self.unfolds, strict=False):
            rows = ops.patches(tokens, *unfold, channels_last=in_channels_last)
            height, width = _grid(height, width, *unfold)
            tokens = layer(ops, rows, count).view(count, height, width, -1)
            in_channels_last = True
        rows = ops.patches(tokens, *self.unfolds[-1], channels_last=in_channels_last)
        found: Tensor = ops.segment_matmul(rows, self.project.weight, bias=self.project.bias)
        return found


def _grid(height: int, width: int, size: int, stride: int, padding: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return (
        (height + 2 * padding - size) // stride + 1,
        (width + 2 * padding - size) // stride + 1,
    )


def _add(ops: ModuleType, x: Tensor, linear: Linear, out: Tensor) -> None:
    ops.segment_matmul(x, linear.weight, bias=linear.bias, out=out, accumulate=True)
