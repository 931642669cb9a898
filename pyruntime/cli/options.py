"""What can be typed. Imports nothing heavy: `pyruntime --help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyruntime import __version__
from pyruntime.cli import commands

_MODES = ("calibrated", "batch_quantile", "seq_quantile", "exact_k")


def parser() -> argparse.ArgumentParser:
    """The parser; a parsed command line has `run`, which takes it and returns an exit code."""
    top = argparse.ArgumentParser(
        prog="pyruntime",
        description="Run networks that decide, per token, how much of themselves to run.",
    )
    top.add_argument("--version", action="version", version=f"pyruntime {__version__}")
    add = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    _convert(add("convert", help="trained checkpoint to runtime folder"))
    _inspect(add("inspect", help="what a runtime folder holds"))
    _generate(add("generate", help="continue a prompt, shaded by the compute each token used"))
    _classify(add("classify", help="what images show, and the compute each of them used"))
    _calibrate(add("calibrate", help="thresholds per budget, and the default budget"))
    _profile(add("profile", help="accuracy, exact work and measured time over policies"))
    _serve(add("serve", help="OpenAI-compatible HTTP server"))
    _bench(add("bench", help="the benchmarks of a source checkout"))
    doctor = add("doctor", help="what was found on this machine, and how to get what is missing")
    doctor.set_defaults(run=commands.doctor)
    return top


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "src", type=Path, help="Hugging Face or timm folder, MSViT container, or a state dict"
    )
    p.add_argument("dst", type=Path, help="folder to write")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    p.add_argument("--quantize", choices=("int8",), help="matrices as int8, a scale per channel")
    p.add_argument("--base", type=Path, help="folder of the base model (config and tokenizer)")
    p.add_argument("--sidecar", type=Path, help="JSON that describes the gates")
    p.add_argument("--preprocess", type=Path, help="JSON: how images are brought to a vision model")
    p.add_argument("--heads", type=Path, help="folder of JEI-DNN's warm-up heads ({block}.pth)")
    p.add_argument(
        "--exit", metavar="CRITERION[:THRESHOLD]", help="instead of the checkpoint's own"
    )
    p.add_argument("--width-rule", choices=("paper", "official", "kminus"), help="adaptive width")
    p.add_argument(
        "--image-size",
        type=_size,
        metavar="H[,W]",
        help="pixels that images are brought to; positions are resized",
    )
    p.add_argument(
        "--patch-size", type=int, metavar="P", help="of the finest patches; their kernel is resized"
    )
    p.add_argument(
        "--scales",
        metavar="ratio=R[/R…][,…]",
        help="give a ViT coarser patches: source=, thresholds=, positions=, resize=, pool_weight= "
        "(as in ratio=2,source=entropy,thresholds=5.5)",
    )
    p.add_argument(
        "--reduce",
        metavar="METHOD:NUMBER",
        help="rows that leave inside a ViT: tome:13 pairs merged in every block, evit:0.7[+fuse] "
        "or dynamicvit:0.7 of the rows kept by three of them",
    )
    p.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    p.add_argument("--overwrite", action="store_true", help="replace an existing runtime folder")
    p.set_defaults(run=commands.convert)


def _size(text: str) -> tuple[int, int]:
    """ "224" or "224,160"."""
    height, comma, width = text.partition(",")
    return int(height), int(width if comma else height)


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=commands.inspect)


def _generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text")
    prompt.add_argument("--prompt-ids", help="token ids, separated by commas or spaces")
    p.add_argument("--budget", type=float, help="share of the model to run, in [0, 1]")
    p.add_argument("--experts", help="experts per token: 1, mass=0.8, gap=0.3 or several limits")
    p.add_argument("--mode", choices=_MODES, default="calibrated", help="calibrated is causal")
    p.add_argument("--max-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", default=[], help="may be repeated")
    p.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    p.set_defaults(run=commands.generate)


def _classify(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    chosen = p.add_mutually_exclusive_group()
    chosen.add_argument("--budget", type=float, help="share of the model to run, in [0, 1]")
    chosen.add_argument(
        "--exit",
        help="when images leave early: never, a threshold of the confidence, level=J (at exit J at "
        "the latest, counted from 0), tau=X (JEI-DNN gates)",
    )
    p.add_argument(
        "--scales",
        help="which regions stay coarse: all_fine, all_coarse, random:TOKENS:SEED, a threshold of "
        "the model's own gate, or source=…, threshold=…, tokens=… fields",
    )
    p.add_argument(
        "--regions", type=Path, metavar="DIR|FILE.png", help="draw what was fine and what coarse"
    )
    p.add_argument(
        "--native", action="store_true", help="keep the aspect ratio of images, crop nothing"
    )
    p.add_argument("--max-patches", type=int, help="of native images; those of the model's size")
    p.add_argument("--top", type=int, default=5, help="classes shown for each image")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=commands.classify)


def _calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    _data(p)
    default = p.add_mutually_exclusive_group()
    default.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="make the cheapest budget within this drop of accuracy the default (0.01: one point)",
    )
    default.add_argument("--default-budget", type=float, help="budget of requests that name none")
    p.set_defaults(run=commands.calibrate)


def _profile(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    _data(p)
    p.add_argument(
        "--sweep",
        default="budget=1.0,0.9,0.8,0.7,0.6,0.5",
        metavar="budget=B,…",
        help="what to vary: budget=…, in expert layers experts=…, gap=… or mass=…, of early exits "
        "exit=…, tau=… or level=…, of mixed scales scales=… (thresholds) or tokens=…",
    )
    p.add_argument("--mode", metavar="MODE,…", help=", ".join(_MODES))
    p.add_argument("--call-tokens", type=int, help="tokens prefilled in one call (2048)")
    p.add_argument("--repeats", type=int, default=7, help="timed runs of each row")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--html", type=Path, metavar="FILE")
    p.set_defaults(run=commands.profile)


def _serve(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    p.add_argument("--model-name", help="name clients use; the folder's by default")
    p.add_argument("--max-num-seqs", type=int, default=64, help="requests that run at once")
    p.add_argument("--max-step-tokens", type=int, default=512, help="tokens of one engine step")
    p.add_argument("--max-model-len", type=int, help="context; the model's own by default")
    p.add_argument("--kv-mib", type=int, default=1024, help="memory of the key/value cache")
    p.add_argument("--max-waiting", type=int, default=256, help="queued requests before 429")
    p.add_argument("--drain-seconds", type=float, default=30.0, help="grace after SIGTERM")
    p.set_defaults(run=commands.serve)


def _bench(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", help="a script of bench/; without it they are listed")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    p.set_defaults(run=commands.bench)


def _data(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help='.txt, .py, .md, .jsonl (lines with "text" or "token_ids") or folders of them; for a '
        "vision model a folder with one for each class, or a .npz file of images and labels",
    )
    p.add_argument("--tokens", type=int, help="about how many tokens to use (16384)")
    p.add_argument("--length", type=int, help="longest sequence, in tokens; by default at most 512")
    p.add_argument("--samples", type=int, help="how many images to use; all by default")
    p.add_argument("--batch", type=int, help="images of one call (8)")
