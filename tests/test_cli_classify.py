"""`pyruntime classify`: what it prints, and one line for everything that is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pyruntime import Classifier, ComputePolicy, ExitPolicy, ScalePolicy
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
    assert ": animal " in out and "level" not in out


# ---- mixed scales: the trained model of the golden files ----

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pyruntime.format.convert import convert

    path = tmp_path_factory.mktemp("mixed") / "model"
    convert(DATA / "msvit_digits_r4.safetensors", path)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("scenes")
    arrays = load_file(DATA / "vectors.safetensors")["images_u8_nhwc"].numpy()
    paths = [place / f"{number}.png" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def test_tokens_of_mixed_scales(
    mixed: Path, scenes: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mixed, *scenes, "--top", "1") == 0
    *lines, _, total = capsys.readouterr().out.splitlines()
    tokens = [re.search(r", (\d+) of 257 tokens, .* of 129 MMACs", line) for line in lines]
    assert [int(found[1]) for found in tokens if found] == [32, 47] + [32] * 14
    assert "mean 32.9 of 257.0 tokens" in total
    found = []
    for chosen in ("all_coarse", "threshold=-1", "0", "source=variance,tokens=61", "all_fine"):
        assert run(mixed, scenes[0], "--json", "--scales", chosen) == 0
        found.append(json.loads(capsys.readouterr().out)["images"][0])
    assert [one["tokens"] for one in found] == [17, 32, 32, 62, 257]
    assert [sum(map(sum, one["fine_regions"])) for one in found] == [0, 1, 1, 3, 16]
    assert found[-1]["compute"] == 1.0 > found[-2]["compute"]


def test_regions_are_drawn(
    tmp_path: Path, mixed: Path, scenes: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.png"
    assert run(mixed, scenes[1], "--regions", one) == 0
    assert f"wrote {one}" in capsys.readouterr().out
    with Image.open(one) as picture:
        assert picture.width == 512 and picture.height > 512
        facts = picture.text  # type: ignore[attr-defined]
    with Classifier(mixed) as classifier:
        (answer,) = classifier.classify(scenes[1])
    assert facts["class"] == str(answer.label) and facts["image"] == str(scenes[1])
    assert (facts["tokens"], facts["tokens_dense"]) == ("47", "257")
    assert facts["macs"] == str(answer.macs) and facts["macs_dense"] == str(answer.macs_dense)
    other = tmp_path / "other" / "1.png"
    other.parent.mkdir()
    other.write_bytes(scenes[1].read_bytes())
    folder = tmp_path / "drawn"
    assert run(mixed, scenes[1], scenes[2], other, "--json", "--regions", folder) == 0
    drawn = [image["drawn"] for image in json.loads(capsys.readouterr().out)["images"]]
    names = ["1_regions.png", "2_regions.png", "1_regions_2.png"]
    assert drawn == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_native_images(tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (130, 30)).save(path)
    assert run(mixed, path, "--native", "--json", "--scales", "all_fine") == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["tokens"] == 1 + 32 * 8
    words = ["--native", "--max-patches", "64", "--regions", tmp_path / "drawn.png"]
    assert run(mixed, path, "--json", *words) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["tokens_dense"] == 1 + 16 * 4
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.width == 512


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all_fine", ScalePolicy("all_fine")),
        ("random:31:7", ScalePolicy("random", tokens=31, seed=7)),
        ("0", ScalePolicy(threshold=0.0)),
        ("-1.5", ScalePolicy(threshold=-1.5)),
        ("tokens=60", ScalePolicy(tokens=60)),
        ("source=variance, tokens=60", ScalePolicy("variance", tokens=60)),
        ("source=entropy,threshold=4/5.75", ScalePolicy("entropy", threshold=(4.0, 5.75))),
        ("source=random,tokens=9,seed=3", ScalePolicy("random", tokens=9, seed=3)),
    ],
)
def test_scales_as_they_are_typed(text: str, expected: ScalePolicy) -> None:
    assert policies.scales(text) == expected
    assert ComputePolicy(scales=policies.scales(text)).scale_policy == expected


@pytest.mark.parametrize(
    "text", ["", "fine", "nan", "inf", "1e", "tokens=", "tokens=a", "tokens=1.5", "tokens=0",
             "depth=1", "source=fine", "threshold=1/", "source=random", "random:1:x"],
)  # fmt: skip
def test_scales_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="scales: "):
        policies.scales(text)


def test_refusals_of_mixed_scales_are_one_line(
    tmp_path: Path,
    model: Path,
    images: list[Path],
    mixed: Path,
    scenes: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = scenes[:2]
    for words, message in (
        ([mixed, one, "--scales", "none"], "scales: expected one of"),
        ([mixed, one, "--scales", "tokens=15"], "tokens=15, but all coarse the image has 16"),
        ([mixed, one, "--scales", "all_fine", "--budget", "0.5"], "give one of them"),
        ([mixed, one, "--budget", "0.5"], "run `pyruntime calibrate` first"),
        ([mixed, one, "--exit", "0.5"], "this model has none"),
        ([mixed, one, two, "--regions", tmp_path / "a.png"], "one file cannot show 2 images"),
        ([mixed, one, "--regions", one], "is one of the images"),
        ([mixed, one, "--max-patches", "64"], "images are not native"),
        ([mixed, one, "--native", "--max-patches", "9"], "max_patches must be at least 16"),
        ([model, images[0], "--scales", "all_fine"], "this model has one scale only"),
        ([model, images[0], "--regions", tmp_path], "this model has one scale only"),
    ):
        assert message in error(capsys, *words)
    whole = (tmp_path / "cut.jpg", tmp_path / "empty.png")
    Image.new("RGB", (64, 64), (200, 10, 10)).save(whole[0])
    whole[0].write_bytes(whole[0].read_bytes()[:400])
    whole[1].write_bytes(b"")
    assert "cut.jpg: " in error(capsys, mixed, whole[0], "--regions", tmp_path)
    assert "empty.png: not an image" in error(capsys, mixed, whole[1])
