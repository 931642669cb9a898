"""The whole way of a model: convert, calibrate, profile, generate, serve; then images. `make demo`.

Every step prints the command it runs, so that each can be repeated by hand. Results lie in demo/.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("examples/gateskip_lm")
VISION = Path("examples/jei_dnn")
MIXED = Path("examples/msvit")
DEMO = Path("demo")
MODEL = DEMO / "gateskip-lm"
VISION_MODEL = DEMO / "digit-scenes"
MIXED_MODEL = DEMO / "mixed-scales"
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
TRAINING_FILES = 48

sys.path.insert(0, str(ROOT / SOURCE))
from data import corpus_files  # noqa: E402


def main() -> int:
    os.chdir(ROOT)
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)

    step("Text: modules of the standard library the model was trained on, and some it never saw")
    train, held_out = corpus_files()
    copy(train[:: len(train) // TRAINING_FILES], DEMO / "training_text")
    copy(held_out, DEMO / "held_out_text")

    step("Convert the trained checkpoint to the runtime format")
    run("convert", SOURCE / "gateskip_scalar.pt", MODEL)
    run("inspect", MODEL)

    step("Calibrate: thresholds for every compute budget, and a default that costs little")
    data = ("--data", DEMO / "training_text")
    run("calibrate", MODEL, *data, "--tokens", 8192, "--max-drop", 0.03)

    step("Profile on text it never saw: accuracy, exact work, measured time")
    data = ("--data", DEMO / "held_out_text")
    files = ("--json", DEMO / "profile.json", "--html", DEMO / "profile.html")
    run("profile", MODEL, *data, "--sweep", "budget=1.0,0.9,0.75,0.5", *files)

    step("Generate, each token shaded by the compute it used (on a terminal)")
    sampling = ("--max-tokens", 64, "--temperature", 0.8, "--top-p", 0.9, "--seed", 7)
    for budget in (1.0, 0.75):
        run("generate", MODEL, "--prompt", PROMPT, "--budget", budget, *sampling)

    step("Serve it, and ask for the same completion at two budgets")
    serve()

    step("Images: a network with early exits, each image as deep as it needs")
    run("convert", VISION / "checkpoint/ckpt_0.02_87.65.pth", VISION_MODEL)
    scenes = sorted((VISION / "scenes").glob("*.png"))
    run("classify", VISION_MODEL, *scenes, "--top", 2)
    run("classify", VISION_MODEL, *scenes, "--top", 2, "--exit", "never")

    step("Images: patches of two sizes, small ones where a gate wants to look closer")
    run("convert", MIXED / "checkpoint/msvit.safetensors", MIXED_MODEL)
    scenes = sorted((MIXED / "scenes").glob("*.png"))
    run("classify", MIXED_MODEL, *scenes, "--top", 1, "--regions", DEMO / "regions")
    run("classify", MIXED_MODEL, *scenes, "--top", 1, "--scales", "all_fine")

    print(f"\nDone in {time.monotonic() - started:.0f} s. The model is in {MODEL}, the profile in "
          f"{DEMO / 'profile.html'} and {DEMO / 'profile.json'}.")  # fmt: skip
    return 0


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def command(*words: object) -> list[str]:
    """A `pyruntime` command, shown as one would type it."""
    shown = ["pyruntime", *map(str, words)]
    print(f"$ {shlex.join(shown)}", flush=True)
    return [sys.executable, "-m", *shown]


def run(*words: object) -> None:
    done = subprocess.run(command(*words), check=False)
    if done.returncode:
        sys.exit(done.returncode)


def copy(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, folder / "-".join(file.parts[-2:]))
    print(f"{len(files)} files in {folder}")


def serve() -> None:
    words = command("serve", MODEL, "--port", 0)
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        if "listening on " not in line:
            sys.exit(f"the server did not start: {line!r}")
        print(line, end="")
        url = line.split("listening on ")[1].strip()
        wait_until_ready(url)
        for budget in (1.0, 0.75):
            ask(url, budget)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    print(f"server stopped, exit code {code}")
    if code:
        sys.exit(code)


def wait_until_ready(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except urllib.error.HTTPError:
            time.sleep(0.1)  # 503: the model is being loaded
    sys.exit("the server did not become ready within a minute")


def ask(url: str, budget: float) -> None:
    body = {
        "model": MODEL.name,
        "prompt": PROMPT,
        "max_tokens": 32,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 7,
        "compute": {"budget": budget},
    }
    text = json.dumps(body)
    address = f"{url}/v1/completions"
    print(f"$ curl {address} -H 'content-type: application/json' -d {shlex.quote(text)}")
    request = urllib.request.Request(address, text.encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
    print(answer["choices"][0]["text"])
    print(f"-- {answer['usage']['completion_tokens']} tokens, compute: {answer['compute']}\n")


if __name__ == "__main__":
    sys.exit(main())
