"""Which cache blocks belong to which request."""

from __future__ import annotations

from pyruntime.layers.kv import BLOCK


class BlockManager:
    """Hands out cache blocks of `block_size` tokens.

    A request gets every block it can ever need at admission, so a running request is never
    preempted and never recomputed; the price is that the room it asked for stays its own.
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when everything is free."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= len(self._free)

    def allocate(self, owner: str, num_tokens: int) -> list[int]:
        """Takes the blocks for num_tokens tokens; the caller has asked can_allocate."""
        need = self.blocks_for(num_tokens)
        if owner in self._tables:
            raise RuntimeError(f"BlockManager.allocate: {owner} already owns blocks")
        if need > len(self._free):
            raise RuntimeError(f"BlockManager.allocate: {need} blocks, {len(self._free)} free")
        self._tables[owner] = [self._free.pop() for _ in range(need)]
        return self._tables[owner]

    def table(self, owner: str) -> list[int]:
        return self._tables[owner]

    def free(self, owner: str) -> None:
        self._free.extend(reversed(self._tables.pop(owner)))

    def check(self, owners: set[str]) -> None:
        """Raises RuntimeError unless each block has exactly one place and `owners` own them all."""
        if set(self._tables) != owners:
            raise RuntimeError(f"BlockManager: blocks owned by {set(self._tables) ^ owners}")
        blocks = sorted(self._free + [b for table in self._tables.values() for b in table])
        if blocks != list(range(self.num_blocks)):
            raise RuntimeError(f"BlockManager: {len(blocks)} of {self.num_blocks} blocks in place")
