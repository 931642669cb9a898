"""What the tests of the compute ops share: threads, and a device or its emulation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

import cuda_emulator

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)
CPP = shutil.which("g++") is not None
EMULATED = pytest.param(
    "cpu", marks=pytest.mark.skipif(not CPP, reason="g++ is missing: no emulated device")
)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, or as many as a test asks for: on a busy machine they mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> cuda_emulator.EmulatedKernels:
    library = cuda_emulator.build(tmp_path_factory.mktemp("emulator"))
    return cuda_emulator.EmulatedKernels(library)


@pytest.fixture(params=[EMULATED, GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cuda", or "cpu" with every launch sent to the emulator."""
    if request.param == "cpu":
        cuda_emulator.install(monkeypatch, request.getfixturevalue("emulator"))
    yield request.param
