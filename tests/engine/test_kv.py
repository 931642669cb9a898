from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.engine.kv import BlockManager


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), max_size=60))
def test_blocks_always_have_exactly_one_place(actions: list[tuple[int, int]]) -> None:
    kv = BlockManager(16)
    owned: set[str] = set()
    for owner, tokens in actions:
        name = str(owner)
        if name in owned:
            kv.free(name)
            owned.remove(name)
        elif kv.can_allocate(tokens):
            assert len(kv.allocate(name, tokens)) == -(-tokens // 32)
            owned.add(name)
        kv.check(owned)
    for name in list(owned):
        kv.free(name)
    kv.check(set())
    assert kv.num_free == kv.num_blocks


def test_misuse_is_an_error_not_a_leak() -> None:
    kv = BlockManager(2)
    kv.allocate("a", 33)
    with pytest.raises(RuntimeError, match="already owns"):
        kv.allocate("a", 1)
    with pytest.raises(RuntimeError, match="1 blocks, 0 free"):
        kv.allocate("b", 1)
    with pytest.raises(RuntimeError, match="owned by"):
        kv.check(set())
    kv.free("a")
    kv.check(set())
