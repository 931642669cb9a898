"""What the tests of the compute ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, or as many as a test asks for: on a busy machine they mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)
