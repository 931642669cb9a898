"""The paged key/value cache: storage only; who owns which block is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import DecoderSpec

BLOCK = 32  # tokens of a block: one panel of the attention kernel (csrc/ops.h)
HEAD_PAD = 32


class PagedKV:
    """Keys and values of every layer, in the panel layout that attention multiplies with.

    Attributes:
        keys: per layer, bfloat16 [blocks, heads, D/2, 32, 2] or float32 [blocks, heads, D, 32];
            D is head_dim padded to a multiple of 32.
        values: per layer, bfloat16 [blocks, heads, D/32, 16, 32, 2] or float32 [.., D/32, 32, 32].
    """

    def __init__(self, spec: DecoderSpec, num_blocks: int, block_size: int = BLOCK) -> None:
        if block_size != BLOCK:
            raise InvalidInput(f"the cache has blocks of {BLOCK} tokens, got {block_size}")
        padded = -(-spec.head_dim // HEAD_PAD) * HEAD_PAD
        lead = (spec.num_layers, num_blocks, spec.num_kv_heads)
        if spec.dtype == "bfloat16":
            keys = torch.zeros(*lead, padded // 2, BLOCK, 2, dtype=torch.bfloat16)
            values = torch.zeros(*lead, padded // 32, BLOCK // 2, 32, 2, dtype=torch.bfloat16)
        else:
            keys = torch.zeros(*lead, padded, BLOCK)
            values = torch.zeros(*lead, padded // 32, BLOCK, 32)
        self._keys, self._values = keys, values
        self.keys: list[Tensor] = list(keys.unbind(0))
        self.values: list[Tensor] = list(values.unbind(0))
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_block(spec: DecoderSpec) -> int:
        """Memory of one block over all layers."""
        padded = -(-spec.head_dim // HEAD_PAD) * HEAD_PAD
        size = 2 if spec.dtype == "bfloat16" else 4
        return 2 * spec.num_layers * spec.num_kv_heads * padded * BLOCK * size

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that change hands: a NaN a former owner left would outlive its request,
        because 0 * NaN is NaN in the places that attention weighs with 0."""
        if blocks:
            index = torch.tensor(blocks)
            self._keys.index_fill_(1, index, 0.0)
            self._values.index_fill_(1, index, 0.0)

    def copy_from_below(self, layer: int, slots: Tensor) -> None:
        """Entries `slots` int [n] of a layer become those of the layer below (kv mode "copy")."""
        block, offset = slots.long() // BLOCK, slots.long() % BLOCK
        below, keys = self.keys[layer - 1], self.keys[layer]
        keys[block, :, :, offset] = below[block, :, :, offset]
        below, values = self.values[layer - 1], self.values[layer]
        if values.dtype == torch.bfloat16:
            pair, odd = offset // 2, offset % 2
            values[block, :, :, pair, :, odd] = below[block, :, :, pair, :, odd]
        else:
            values[block, :, :, offset] = below[block, :, :, offset]
