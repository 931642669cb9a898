"""Trained checkpoint -> runtime folder: checked whole, streamed, and whole or not there at all."""

from __future__ import annotations

import contextlib
import datetime
import glob
import importlib.metadata
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from pyruntime.errors import ConversionError
from pyruntime.format.convert import exits, gateskip, source, vision_source
from pyruntime.format.convert.checkpoint import fingerprint
from pyruntime.format.convert.recipe import Recipe
from pyruntime.format.convert.reduction import parse_reduction
from pyruntime.format.convert.report import Report
from pyruntime.format.convert.scales import parse_scales
from pyruntime.format.convert.source import Source
from pyruntime.format.convert.stage import Stage, check_destination, open_stage
from pyruntime.format.convert.torchvision_acm import Rule
from pyruntime.format.convert.vision_options import VisionOptions
from pyruntime.format.convert.writer import plan_shards, write_shard
from pyruntime.format.manifest import VERSION, Manifest, Shard, write_manifest
from pyruntime.format.spec import TensorSpec, VisionSpec, to_dict

__all__ = ["Report", "convert"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]
SHARD_BYTES = 1_000_000_000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_LAYOUT_REVISION = 1  # part of a stage's identity: shards of an older converter are not reused


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    quantize: Literal["int8"] | None = None,
    base: PathLike | None = None,
    sidecar: PathLike | None = None,
    preprocess: PathLike | None = None,
    heads: PathLike | None = None,
    exit: str | None = None,
    width_rule: Rule | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    scales: str | None = None,
    reduce: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint `src` into the model folder `dst`.

    `src` is a Hugging Face folder, or a GateSkip state dict (.pt, .pth, .bin, .safetensors) with
    its sidecar JSON beside it (or at `sidecar`) and its base model's folder named there (or at
    `base`). Or it is a vision transformer: a folder of timm or transformers, an MSViT container, or
    a bare checkpoint with preprocess.json beside it (or at `preprocess`). `heads` is a folder of
    JEI-DNN's warm-up heads, `exit` a criterion with or without a threshold ("max_prob:0.9") instead
    of the checkpoint's own, `width_rule` that of adaptive width (see `WidthSpec`). `image_size` is
    a side, or a height and a width, to which positions are resized, `patch_size` that of the finest
    patches, whose kernel is resized. `scales` gives a model patches of several sizes
    ("ratio=2,source=entropy,thresholds=5.5", see `ScaleSpec`), `reduce` blocks that drop or merge
    rows ("tome:13", "evit:0.7+fuse", "dynamicvit:0.7", see `ReductionSpec`).

    `quantize` stores matrices as int8 with one scale per output channel; embeddings, routers,
    gates, norms and biases are in `dtype` or float32, as they would be without.
    `dry_run` checks everything, weight values too, and writes nothing. `overwrite` may replace a
    model folder. `progress(done, total)` is called with bytes.

    A killed conversion continues where it stopped when it is called again in the same way.

    Raises:
        ConversionError: everything that is wrong, one line each. `dst` is as it was before.
    """
    started = time.monotonic()
    origin, destination = Path(src), Path(os.path.realpath(dst))
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ConversionError(f"dtype must be auto, bfloat16 or float32, is {dtype!r}")
    if quantize not in (None, "int8"):
        raise ConversionError(f"quantize must be int8 or None, is {quantize!r}")
    if shard_bytes < 1:
        raise ConversionError(f"shard_bytes must be positive, is {shard_bytes}")
    check_destination(destination, overwrite)
    if width_rule not in (None, *get_args(Rule)):
        raise ConversionError(
            f"width_rule must be one of {', '.join(get_args(Rule))}, is {width_rule!r}"
        )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConversionError(f"image_size must be a side, or a height and a width, is {size}")
    if patch_size is not None and patch_size < 1:
        raise ConversionError(f"patch_size must be positive, is {patch_size}")
    options = VisionOptions(
        Path(preprocess) if preprocess else None, Path(heads) if heads else None,
        None if exit is None else exits.parse_rule(exit), width_rule, size, patch_size,
        None if scales is None else parse_scales(scales),
        None if reduce is None else parse_reduction(reduce),
    )  # fmt: skip
    model = _open(origin, base, sidecar, options)
    model, notes = model.with_dtype(dtype, quantize)
    model.check()
    if not isinstance(model.spec, VisionSpec):
        notes += _tokenizer_notes(model.folder)
    recipes = {recipe.target.name: recipe for recipe in model.recipes()}
    shards = plan_shards([recipe.target for recipe in recipes.values()], shard_bytes)
    count = _Counter(sum(t.nbytes for shard in shards for t in shard), progress)
    resumed = 0
    if dry_run:
        with _one_torch_thread():
            _scan(model, recipes, shards, count)
    else:
        identity = {
            "revision": [VERSION, _LAYOUT_REVISION, shard_bytes],
            "files": fingerprint([*model.described_by, *model.checkpoint.paths]),
            "model": [to_dict(model.spec), model.gates and to_dict(model.gates)],
        }
        with open_stage(destination, identity) as stage, _one_torch_thread():
            resumed = len(stage.shards)
            _check_space(stage, count.total)
            try:
                _write(model, recipes, shards, stage, count)
                named = {
                    "--dtype": dtype if dtype != "auto" else None, "--quantize": quantize,
                    "--base": base, "--sidecar": sidecar, "--preprocess": preprocess,
                    "--heads": heads, "--exit": exit, "--width-rule": width_rule,
                    "--image-size": None if size is None else f"{size[0]},{size[1]}",
                    "--patch-size": None if patch_size is None else str(patch_size),
                    "--scales": scales, "--reduce": reduce,
                }  # fmt: skip
                command = _command(src, dst, named)
                _finish(model, origin, shards, stage, command)
                check_destination(destination, overwrite)
                stage.publish(destination)
            except ConversionError:
                stage.discard()  # the source is at fault: there is nothing to continue
                raise
            except OSError as error:
                raise ConversionError(
                    f"{error.filename or stage.folder}: {error.strerror}; what is finished stays "
                    f"in {stage.folder.parent}, and the same command continues it"
                ) from error
    notes += [
        f"{path} is left over from another conversion and can be deleted"
        for path in destination.parent.glob(f"{glob.escape(destination.name)}.partial-*")
    ]
    return Report(
        origin, destination, model.spec, model.gates, len(recipes), count.total, len(shards),
        resumed, time.monotonic() - started, dry_run, tuple(notes),
    )  # fmt: skip


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Packing, hashing and writing already run side by side, on pieces too small to split.

    On a busy machine torch's own threads wait for each other by spinning: ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Counter:
    """Bytes done, told to the caller's progress function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self.total)


def _open(
    origin: Path, base: PathLike | None, sidecar: PathLike | None, options: VisionOptions
) -> Source:
    extra = [name for name, given in (("base", base), ("sidecar", sidecar)) if given]
    folder = origin.is_dir()
    if folder and extra:
        raise ConversionError(f"{origin}: {' and '.join(extra)} given, but it is not a file")
    if not folder and not origin.is_file():
        raise ConversionError(f"{origin}: no such file or folder")
    if vision_source.is_folder(origin) if folder else vision_source.is_file(origin):
        if extra:
            raise ConversionError(
                f"{origin}: {' and '.join(extra)} given, but it is a vision transformer"
            )
        opener = vision_source.open_folder if folder else vision_source.open_file
        return opener(origin, options)
    if options.named:
        raise ConversionError(
            f"{origin}: {' and '.join(options.named)} given, but it is no vision transformer"
        )
    if folder:
        return source.open_folder(origin)
    return gateskip.open_state_dict(
        origin, Path(base) if base else None, Path(sidecar) if sidecar else None
    )


def _shard_name(index: int) -> str:
    return f"weights-{index + 1:05d}.safetensors"


def _write(
    model: Source,
    recipes: dict[str, Recipe],
    shards: list[list[TensorSpec]],
    stage: Stage,
    count: _Counter,
) -> None:
    for index, tensors in enumerate(shards):
        name = _shard_name(index)
        if name in stage.shards:
            count.add(sum(tensor.nbytes for tensor in tensors))
            continue
        bad: list[str] = []
        parts = (
            piece
            for tensor in tensors
            for piece in recipes[tensor.name].pieces(model.checkpoint, bad)
        )
        shard = write_shard(stage.folder / name, tensors, parts, count.add)
        if bad:
            # Nothing more is written, but the rest is read: the user gets the whole list.
            _scan(model, recipes, shards[index + 1 :], count, bad)
        stage.record(name, shard)


def _scan(
    model: Source,
    recipes: dict[str, Recipe],
    shards: list[list[TensorSpec]],
    count: _Counter,
    bad: list[str] | None = None,
) -> None:
    """Read and pack without writing, then refuse the tensors that are not finite."""
    bad = [] if bad is None else bad
    for tensor in (tensor for shard in shards for tensor in shard):
        for piece in recipes[tensor.name].pieces(model.checkpoint, bad):
            count.add(piece.nbytes)
    if bad:
        raise ConversionError(
            "\n".join(f"{name}: NaN, infinity, or out of range of {model.spec.dtype}"
                      for name in sorted(bad))
        )  # fmt: skip


def _finish(
    model: Source, origin: Path, shards: list[list[TensorSpec]], stage: Stage, command: str
) -> None:
    for name in () if isinstance(model.spec, VisionSpec) else _TOKENIZER_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, stage.folder / name)
    names = [_shard_name(index) for index in range(len(shards))]
    made: dict[str, Shard] = {name: stage.shards[name] for name in names}
    placement = {
        tensor.name: (name, tensor)
        for name, tensors in zip(names, shards, strict=True)
        for tensor in tensors
    }
    provenance = {
        "source": str(origin),
        "pyruntime_version": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        **model.provenance,
    }
    manifest = Manifest(model.spec, model.gates, model.calibration, provenance, placement, made)
    write_manifest(stage.folder, manifest)


def _tokenizer_notes(folder: Path) -> list[str]:
    if (folder / "tokenizer.json").is_file():
        return []
    return [f"{folder} has no tokenizer.json: the model takes token ids only"]


def _check_space(stage: Stage, total: int) -> None:
    needed = total - sum(shard.bytes for shard in stage.shards.values())
    free = shutil.disk_usage(stage.folder).free
    if free < needed:
        if not stage.shards:
            stage.discard()
        raise ConversionError(f"{stage.folder}: {free} bytes free, {needed} more are needed")


def _command(src: PathLike, dst: PathLike, options: Mapping[str, PathLike | None]) -> str:
    words = ["pyruntime", "convert", str(src), str(dst)]
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)


def _version() -> str:
    try:
        return importlib.metadata.version("pyruntime")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
