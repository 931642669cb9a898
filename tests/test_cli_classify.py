"""`pyruntime classify`: what it prints, and one line for everything that is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pyruntime import Classifier, ComputePolicy, ExitPolicy
from pyruntime.cli import main, policies
from pyruntime.errors import InvalidInput
from tests.profile.exit_models import CLASSES, folder, pixels
from tests.profile.models import ungated

pytestmark = pytest.mark.usefixtures("one_thread")

EXITS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("vision"), exits=EXITS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("images")
    paths = [place / f"{number}.png" for number in range(6)]
    for path, array in zip(paths, pixels(6), strict=True):
        Image.fromarray(array).save(path)
    return paths


def run(*words: object) -> int:
    return main(["classify", *(str(word) for word in words)])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a refusal."""
    assert run(*words) == 1
    _, err = capsys.readouterr()
    assert err.startswith("pyruntime: error: ") and err.count("\n") == 1, err
    return err


def test_one_image(model: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, images[0], "--exit", "level=1", "--top", "3") == 0
    first, *others = capsys.readouterr().out.splitlines()
    numbers = r"level 1 of 3, [\d.]+ of [\d.]+ kMACs \(\d+\.\d%\), [\d.]+ ms"
    assert re.fullmatch(rf"{re.escape(str(images[0]))}: class \d \d+\.\d%, {numbers}", first)
    assert len(others) == 2
    assert all(re.fullmatch(r" +\d+\.\d%  class \d", other) for other in others)


def test_many_images_and_their_total(
    model: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *images, "--top", "1") == 0
    *lines, empty, total = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(path) for path in images]
    assert empty == "" and re.match(r"6 images, mean level \d\.\d\d of 3, .* mean compute", total)
    with Classifier(model) as classifier:
        answers = classifier.classify(images)
    for line, answer in zip(lines, answers, strict=True):
        assert f": class {answer.label} " in line and f"level {answer.level} of 3" in line
    mean = sum(a.macs for a in answers) / sum(a.macs_dense for a in answers)
    assert total.endswith(f"mean compute {mean:.1%}")


def test_json(model: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *images, "--json", "--exit", "never") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in facts["images"]] == [str(path) for path in images]
    for image in facts["images"]:
        assert image["level"] == image["exits"] == EXITS
        assert len(image["top"]) == 5 and sum(t["probability"] for t in image["top"]) <= 1.0001
        assert image["compute"] == image["macs"] / image["macs_dense"]
    total = facts["total"]
    assert total["images"] == 6
    assert total["macs"] == sum(image["macs"] for image in facts["images"])
    assert total["compute"] == total["macs"] / total["macs_dense"]


def test_less_compute_where_images_leave_sooner(
    model: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for chosen in ("never", "tau=0.9", "tau=0.3", "level=0"):
        assert run(model, *images, "--json", "--exit", chosen) == 0
        found.append(json.loads(capsys.readouterr().out)["total"]["compute"])
    assert found == sorted(found, reverse=True) and found[0] > 1 > found[-1]
    assert run(model, *images, "--json", "--budget", "1.0") == 0
    assert json.loads(capsys.readouterr().out)["total"]["compute"] == found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("never", ExitPolicy(never=True)),
        ("0.8", ExitPolicy(threshold=0.8)),
        ("-1", ExitPolicy(threshold=-1.0)),
        ("level=2", ExitPolicy(level=2)),
        ("tau=0.7, level=4", ExitPolicy(tau=0.7, level=4)),
        ("threshold=2", ExitPolicy(threshold=2)),
    ],
)
def test_exits_as_they_are_typed(text: str, expected: ExitPolicy) -> None:
    assert policies.exits(text) == expected
    assert ComputePolicy(exit=policies.exits(text)).exit_policy == expected


@pytest.mark.parametrize(
    "text", ["", "now", "level", "level=", "level=a", "level=1.5", "level=-1", "depth=1", "tau=0",
             "nan", "inf"],
)  # fmt: skip
def test_exits_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="exit: "):
        policies.exits(text)


def test_refusals_are_one_line(
    tmp_path: Path, model: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 and so on")
    one = images[0]
    assert run(model, one, tmp_path / "none.png", one, "--top", "1") == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{one}: ") and out.count("\n") == 1
    assert err == f"pyruntime: error: {tmp_path / 'none.png'}: No such file or directory\n"
    assert "none.png: No such file" in error(capsys, model, tmp_path / "none.png")
    assert "broken.jpg: " in error(capsys, model, broken)
    assert "budget must be" in error(capsys, model, one, "--budget", "1.5")
    assert "run `pyruntime calibrate` first" in error(capsys, model, one, "--budget", "0.5")
    assert "exits 0 to 2" in error(capsys, model, one, "--exit", "level=3")
    assert "--exit: expected never" in error(capsys, model, one, "--exit", "often")
    assert "top must be 1 or more" in error(capsys, model, one, "--top", "0")
    assert "not a runtime model folder" in error(capsys, tmp_path, one)
    assert "no vision transformer" in error(capsys, ungated(tmp_path), one)
    assert main(["generate", str(model), "--prompt", "x"]) == 1
    assert "holds a vision transformer; open it with pyruntime.Classifier" in (
        capsys.readouterr().err
    )


def test_budget_and_exit_exclude_each_other(model: Path, images: list[Path]) -> None:
    for words in ([model], [model, images[0], "--budget", "0.5", "--exit", "never"]):
        with pytest.raises(SystemExit) as caught:
            run(*words)
        assert caught.value.code == 2


def test_classes_have_names_where_the_checkpoint_names_them(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from pyruntime.format.convert import convert
    from tests.vision_checkpoints import timm_state, write_pth

    labels = [f"animal {number}" for number in range(CLASSES)]
    state = timm_state(layers=2, image=(12, 8), classes=CLASSES)
    source = tmp_path / "m.pth"
    write_pth(source, state, image=(12, 8), preprocess={"num_heads": 5, "labels": labels})
    convert(source, tmp_path / "model")
    assert run(tmp_path / "model", images[0], "--top", "2") == 0
    out = capsys.readouterr().out
    assert ": animal " in out and "level 0 of 0" in out
