"""Vision checkpoints stream as others do: what is folded is never whole in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyruntime.format.convert import convert
from tests.format.test_memory import status
from tests.vision_checkpoints import write_acm, write_timm_folder

LIMIT = 48 << 20
MAPPED = 128 << 20  # with the pages of a .pth that are given back late


def growth(source: Path, tmp_path: Path, **options: Any) -> int:
    """Bytes by which a conversion's peak exceeds what the process held before."""
    convert(source, tmp_path / "warm", dry_run=True, **options)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    convert(source, tmp_path / "dst", **options)
    return status("VmHWM") - before


@pytest.mark.parametrize(("files", "limit"), [("safetensors", LIMIT), ("bin", MAPPED)])
def test_layer_scale_is_folded_row_by_row(tmp_path: Path, files: str, limit: int) -> None:
    """201 MB, in matrices of up to 67."""
    shape = {"hidden": 2048, "mlp": 8192, "heads": 8, "layers": 1}
    write_timm_folder(tmp_path / "src", layer_scale="ls{n}.gamma", files=files, **shape)
    assert growth(tmp_path / "src", tmp_path) < limit < 200_000_000


def test_learners_are_turned_one_at_a_time(tmp_path: Path) -> None:
    """Matrices of 36 MB; the ones that must be read whole to be turned count twice at most."""
    shape = {"hidden": 512, "mlp_bottleneck": 4608, "learners": 4, "attention_bottleneck": 8}
    path = tmp_path / "final.pth"
    write_acm(path, layers=4, preprocess={"num_heads": 8}, **shape)
    matrix = 512 * 4608 * 4 * 4
    assert growth(path, tmp_path) < MAPPED + 2 * matrix < 8 * matrix
