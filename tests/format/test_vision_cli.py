"""`pyruntime convert` and `inspect` of vision checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime.cli import main
from pyruntime.format.load import read
from pyruntime.format.spec import ExitSpec, VisionSpec
from tests.checkpoints import write_json
from tests.vision_checkpoints import PREPROCESS, write_acm, write_pth, write_warmup_heads
from tests.vision_states import t2t_state


def test_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = t2t_state(gates=False)
    bare = tuple(name for name in state if name.startswith("intermediate_heads."))
    write_pth(tmp_path / "t2t.pth", state, wrapper="net", drop=bare, sidecar=False)
    write_warmup_heads(tmp_path / "heads", state)
    write_json(tmp_path / "how.json", PREPROCESS)
    words = ["convert", "t2t.pth", "model", "--preprocess", "how.json", "--heads", "heads",
             "--exit", "entropy:0.5"]  # fmt: skip
    paths = {"t2t.pth", "model", "how.json", "heads"}
    assert main([str(tmp_path / word) if word in paths else word for word in words]) == 0
    assert "with 2 exits by entropy" in capsys.readouterr().out
    spec = read(tmp_path / "model").spec
    assert isinstance(spec, VisionSpec)
    assert spec.exits == tuple(ExitSpec(n, "entropy", -0.5, strict=True) for n in (0, 1))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "after block 1: entropy > -0.5" in capsys.readouterr().out


def test_width_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_acm(tmp_path / "final.pth")
    command = ["convert", str(tmp_path / "final.pth"), str(tmp_path / "model")]
    assert main([*command, "--width-rule", "official"]) == 0
    assert main(["inspect", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "up to 3 learners (MLP 9 wide, projections 5 wide), rule official" in out
    with pytest.raises(SystemExit):
        main([*command, "--width-rule", "fast"])
