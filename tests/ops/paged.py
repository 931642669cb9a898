"""A paged cache of keys and values, and calls of the ops that read and write it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pyruntime.layers.kv import BLOCK, PagedKV
from pyruntime.ops import reference
from tests.ops.strategies import BF16, generator, normal

# (query heads, kv heads): GQA 1, 4 and all, and a group wider than any register tile
# sinks and window of an attention
VARIANTS = [(False, 0), (True, 0), (False, 1), (True, 33), (False, 50), (True, 1000)]
HEADS = [(4, 4), (8, 2), (6, 1), (26, 2), (13, 1)]


@dataclasses.dataclass
class Cache:
    """Sequences of given lengths in shuffled blocks of a paged cache, filled by the reference."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    head_dim: int

    @staticmethod
    def slots(tables: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
        block = tables[sequences.long(), positions.long() // BLOCK]
        return (block * BLOCK + positions % BLOCK).int()


def table(head_dim: int, positions: int = 400) -> Tensor:
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat([angle.cos(), angle.sin()], 1)


def rows_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and sequence of every row."""
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    each = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    return positions, each


class Spec:
    """The part of a DecoderSpec that the cache reads."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim = 1, kv_heads, head_dim
        self.dtype = "bfloat16" if dtype == BF16 else "float32"


def filled(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, ops: Any = reference
) -> Cache:
    blocks = [-(-n // BLOCK) for n in lengths]
    order = torch.randperm(sum(blocks), generator=generator(3)).int()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for i, mine in enumerate(order.split(blocks)):
        tables[i, : len(mine)] = mine
    kv = PagedKV(Spec(kv_heads, head_dim, dtype), sum(blocks))  # type: ignore[arg-type]
    positions, sequences = rows_of(lengths)
    new = normal(4, len(positions), 2 * kv_heads * head_dim, dtype=dtype)
    slots = Cache.slots(tables, sequences, positions)
    keys, values = kv.keys[0], kv.values[0]
    ops.append(new, table(head_dim), positions, slots, keys, values, head_dim)
    return Cache(keys, values, tables, head_dim)


def attend(
    ops: Any,
    cache: Cache,
    lengths: list[int],
    q: Tensor,
    rows: Tensor | None,
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    positions, sequences = rows_of(lengths)
    result: Tensor = ops.attention(
        q, rows, positions, sequences, cache.tables, cache.keys, cache.values,
        cache.head_dim, cache.head_dim**-0.5, sinks, window,
    )  # fmt: skip
    return result
