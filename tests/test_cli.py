"""The command line: what each command prints, and one line for everything that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyruntime
from pyruntime.cli import main
from pyruntime.cli.doctor import openmp
from pyruntime.cli.generate import shade
from tests.profile.models import gated, mixtral, ungated

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("def f(x):\n    return [x * i for i in range(10)]\n" * 12)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gated, not calibrated."""
    return gated(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = gated(tmp_path_factory.mktemp("model"))
    options = ["--length", "64", "--default-budget", "0.6"]
    assert main(["calibrate", str(folder), "--data", str(text), *options]) == 0
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a refusal."""
    assert run(*words) == 1
    _, err = capsys.readouterr()
    assert err.startswith("pyruntime: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_convert_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ungated(tmp_path)
    assert run("convert", tmp_path / "hf", tmp_path / "new", "--dry-run") == 0
    assert "would convert" in capsys.readouterr().out and not (tmp_path / "new").exists()
    assert run("convert", tmp_path / "hf", tmp_path / "new", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "new", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"]["dtype"] == "bfloat16"
    assert run("inspect", tmp_path / "new") == 0
    assert "bfloat16" in capsys.readouterr().out
    assert "exists" in error(capsys, "convert", tmp_path / "hf", tmp_path / "new")
    small = (tmp_path / "hf", tmp_path / "new", "--overwrite", "--quantize", "int8")
    assert run("convert", *small) == 0
    assert ", int8) to" in capsys.readouterr().out


def test_generate_prints_text_and_totals(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", model, "--prompt", "def f(x):\n", "--budget", "0.5", "--max-tokens", "6")
    assert run(*words) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("def f(x):\n") and "\x1b" not in plain
    totals = plain.rstrip().splitlines()[-1]
    assert "new tokens, budget 0.5 (calibrated)" in totals
    assert "MACs saved" in totals and "tokens/s" in totals
    assert run(*words, "--color", "always") == 0
    shaded = capsys.readouterr().out
    assert "\x1b[30;48;2;" in shaded
    assert run(*words, "--color", "never") == 0
    assert capsys.readouterr().out.splitlines()[:-1] == plain.splitlines()[:-1]


def test_generate_counts_what_was_executed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []
    for budget in ("1.0", "0.7", "0.3"):
        words = ("--prompt-ids", "5 6,7", "--max-tokens", "8", "--budget", budget)
        assert run("generate", model, *words) == 0
        out = capsys.readouterr().out
        saved.append(float(out.rpartition("MACs saved ")[2].split("%")[0]))
    assert saved == sorted(saved) and saved[0] <= 0 < saved[-1]


def test_the_stored_budget_is_the_default(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", model, "--prompt", "x", "--max-tokens", "2") == 0
    assert "budget 0.6 (calibrated)" in capsys.readouterr().out


def test_a_model_without_tokenizer_shows_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ungated(tmp_path, tokenizer=False)
    assert run("generate", folder, "--prompt-ids", "3,4", "--max-tokens", "3") == 0
    ids = capsys.readouterr().out.splitlines()[0].split()
    assert ids[:2] == ["3", "4"] and 3 <= len(ids) <= 5
    assert "no tokenizer" in error(capsys, "generate", folder, "--prompt", "text")


def test_calibrate_and_profile(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gated(tmp_path)
    words = ("--data", text, "--length", "64")
    assert run("calibrate", folder, *words, "--max-drop", "1") == 0
    out = capsys.readouterr().out
    assert "default budget 0" in out and len(out.splitlines()) == 23
    files = ("--json", tmp_path / "p.json", "--html", tmp_path / "p.html")
    sweep = ("--sweep", "budget=1.0,0.5", "--repeats", "1", "--call-tokens", "128")
    assert run("profile", folder, *words, *sweep, *files) == 0
    assert "time saved" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "p.json").read_text())["rows"]) == 3
    assert "<svg" in (tmp_path / "p.html").read_text()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = mixtral(tmp_path_factory.mktemp("experts"))
    assert main(["calibrate", str(folder), "--data", str(text), "--length", "64"]) == 0
    return folder


def test_generate_with_fewer_experts(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", experts, "--prompt", "def f(x):\n", "--max-tokens", "6")
    assert run(*words) == 0
    assert "2.00 of 2 experts per token, mean compute 100.0%" in capsys.readouterr().out
    assert run(*words, "--experts", "1") == 0
    out = capsys.readouterr().out
    assert "1.00 of 2 experts per token (slots=1), mean compute" in out
    for limits in (("--experts", "mass=0.7,gap=0.5"), ("--budget", "0.75")):
        assert run(*words, *limits) == 0
        totals = capsys.readouterr().out.rstrip().splitlines()[-1]
        assert 1 < float(totals.partition(" of 2 experts")[0].split()[-1]) < 2


def test_profile_over_experts(
    tmp_path: Path, experts: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("profile", experts, "--data", text, "--length", "64", "--repeats", "1")
    for sweep, values in {"experts=2,1": [2, 1], "mass=0.9,0.6": [0.9, 0.6]}.items():
        axis = sweep.partition("=")[0]
        assert run(*words, "--sweep", sweep, "--json", tmp_path / "p.json") == 0
        assert "mean experts" in capsys.readouterr().out
        rows = json.loads((tmp_path / "p.json").read_text())["rows"]
        assert [row[axis] for row in rows] == [None, *values]
    for sweep in ("depth=1", "experts", "experts=", "experts=1.5", "mass=2", "gap=a", "experts=3"):
        refusal = error(capsys, *words, "--sweep", sweep)
        assert "sweep" in refusal or "experts: " in refusal


@pytest.mark.parametrize("limits", ["two", "mass", "mass=", "mass=a", "depth=1", "0", "mass=1.5"])
def test_expert_limits_that_are_refused(
    limits: str, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", experts, "--prompt", "x", "--experts", limits)
    assert "experts: " in error(capsys, *words)


def test_refusals_are_one_line(
    tmp_path: Path, model: Path, plain: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("--prompt", "x")
    generate = ("generate", model)
    assert "budget must be" in error(capsys, *generate, *prompt, "--budget", "1.5")
    assert "not a runtime model folder" in error(capsys, "generate", tmp_path / "none", *prompt)
    assert "not a runtime model folder" in error(capsys, "inspect", tmp_path)
    assert "run `pyruntime calibrate`" in error(
        capsys, "generate", plain, *prompt, "--budget", "0.5"
    )
    assert "experts is set, but" in error(capsys, *generate, *prompt, "--experts", "1")
    assert "empty" in error(capsys, *generate, "--prompt", "")
    assert "at least one token" in error(capsys, *generate, "--prompt-ids", "")
    assert "expected integers" in error(capsys, *generate, "--prompt-ids", "1,x")
    assert "no room" in error(capsys, *generate, "--prompt", "x" * 300)
    assert "max_tokens" in error(capsys, *generate, *prompt, "--max-tokens", "0")
    assert "temperature" in error(capsys, *generate, *prompt, "--temperature", "-1")
    assert "no such file" in error(capsys, "calibrate", model, "--data", tmp_path / "none")
    assert "--length 999" in error(capsys, "profile", model, "--data", text, "--length", "999")
    assert "--sweep" in error(capsys, "profile", model, "--data", text, "--sweep", "budget=a")
    mode = ("--length", "64", "--mode", "best")
    assert "mode must be one of" in error(capsys, "profile", model, "--data", text, *mode)
    assert "no benchmark" in error(capsys, "bench", "nothing")
    assert "no such file" in error(capsys, "convert", tmp_path / "none", tmp_path / "out")
    assert "not a runtime model folder" in error(capsys, "serve", tmp_path / "none", "--port", "0")


def test_a_result_that_cannot_be_written(
    tmp_path: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--length", "64", "--sweep", "budget=1.0", "--repeats", "1")
    file = tmp_path / "none" / "p.json"
    assert str(file) in error(capsys, "profile", model, "--data", text, *words, "--json", file)


@pytest.mark.parametrize("words", [[], ["nothing"], ["generate"], ["serve", "m", "--port", "x"]])
def test_wrong_options_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_the_command_in_a_process_of_its_own(model: Path) -> None:
    command = [sys.executable, "-m", "pyruntime"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def output(*words: str) -> str:
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stderr == ""
        return done.stdout

    assert output("--version") == f"pyruntime {pyruntime.__version__}\n"
    found = output("doctor")
    for name in ("python", "torch", "CPU ops", "OpenMP", "nvcc", "cupy", "GPU"):
        assert f"\n{name} " in found
    assert "runtimes, which slow" not in found
    assert "bench_" in output("bench")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, pyruntime.cli.options as o; o.parser(); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_interrupts_and_closed_pipes(
    monkeypatch: pytest.MonkeyPatch, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyruntime.format.inspect.text", interrupted)
    assert run("inspect", model) == 130
    assert capsys.readouterr().err == ""


def test_shades() -> None:
    assert shade("a\n\nb", 0.0).count("\n") == 2
    assert shade("\n", 1.0) == "\n"
    assert shade("a", 2.0) == shade("a", 1.0) != shade("a", 0.5) != shade("a", 0.0)


def test_openmp_from_a_memory_map() -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 12 /{}\n"
    torch_own = line.format("torch/lib/libgomp.so.1")
    assert "one runtime" in openmp(torch_own * 3)
    assert "2 runtimes" in openmp(torch_own + line.format("usr/lib/libgomp.so.1.0.0"))
    assert "no runtime" in openmp(line.format("lib/libc.so.6"))
