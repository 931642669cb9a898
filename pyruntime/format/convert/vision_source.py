"""A vision checkpoint as a source: which family it is, and everything a conversion needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.convert import (
    apt,
    checkpoint,
    exits,
    hf_vit,
    msvit,
    naflexvit,
    preprocess,
    reduction,
    t2t_vit,
    timm_vit,
    torchvision_acm,
    unpickle,
)
from pyruntime.format.convert.assemble import Assembly, add_backbone
from pyruntime.format.convert.checkpoint import Checkpoint, dense, flatten
from pyruntime.format.convert.families import VISION
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.source import Source, description_files
from pyruntime.format.convert.vision import Found
from pyruntime.format.convert.vision_options import VisionOptions, adapt
from pyruntime.format.spec import VisionSpec

# A name that ends so is of a vision transformer, whatever is wrapped around it.
_MARKS = ("patch_embed.proj.weight", "tokens_to_token.project.weight", torchvision_acm.MARK,
          naflexvit.MARK)  # fmt: skip
# What holds a state dict in a training checkpoint; where there are several, the first counts.
_WRAPPERS = ("state_dict_ema", "model_ema", "model_state", "model", "net", "state_dict")
# What wrappers put in front of every name: DataParallel, torch.compile,
# and Lightning modules that call their network so.
_PREFIXES = ("module.", "_orig_mod.", "net.")


def is_folder(folder: Path) -> bool:
    """Whether it holds a vision model: of timm, of transformers, or an MSViT container."""
    data = _config(folder)
    if "architecture" in data or data.get("model_type") in VISION:
        return True
    return msvit.file_in(folder) is not None


def is_file(path: Path) -> bool:
    """Whether a file holds tensors of a vision transformer, under whatever wrapper."""
    if path.suffix == ".safetensors" and msvit.is_container(path):
        return True
    try:
        if path.suffix == ".safetensors":
            names = set(checkpoint.open_file(path).entries)
        else:
            names = {name for name, _ in flatten(path, unpickle.load(path))}
    except ConversionError:
        return False
    return any(name.endswith(_MARKS) for name in names)


def open_folder(folder: Path, options: VisionOptions) -> Source:
    """A folder of timm's hub or of transformers, or with an MSViT container, as a source.

    Raises:
        UnsupportedModel, ConversionError: everything that is wrong with it.
    """
    container = msvit.file_in(folder)
    if container is not None:
        return open_file(container, options)
    given = None
    if options.preprocess is not None:
        given = preprocess.read_sidecar(folder, options.preprocess)
    described = description_files(folder)
    data, where = _config(folder), folder / "config.json"
    if naflexvit.is_config(data):
        config, naflex = naflexvit.read_config(data, where)
        weights = checkpoint.open_folder(folder)
        weights, found = naflexvit.read(weights, _merged(config, given), naflex)
    elif "architecture" in data:
        config, pool = timm_vit.read_config(data, where)
        weights = checkpoint.open_folder(folder)
        found = timm_vit.read(weights, _merged(config, given), pool)
    else:
        hf, facts = hf_vit.read_config(folder, given)
        weights = checkpoint.open_folder(folder)
        found = hf_vit.read(weights, hf, facts)
        described += (folder / hf_vit.PROCESSOR,) if given is None else ()
    if given is not None:
        described += (given.where,)
        if given.image_size is not None:
            found.fields["image_size"] = given.image_size
    return _source(folder, weights, found, options, described, given)


def open_file(path: Path, options: VisionOptions) -> Source:
    """A bare checkpoint, with its preprocess.json, as a source.

    Raises:
        UnsupportedModel, ConversionError: everything that is wrong with it.
    """
    notes: list[str] = []
    positions = None
    if path.suffix == ".safetensors":
        weights = checkpoint.open_file(path)
    else:
        wrapper, outside = _unwrapped(path, unpickle.load(path))
        weights = checkpoint.open_torch(path, _state_dict)
        positions = outside.get("intermediate_head_positions")
        others = [key for key in _WRAPPERS if key in outside and key != wrapper]
        if wrapper and others:
            notes.append(f"of the file's {', '.join([wrapper, *others])} the first is taken")
    weights = weights.renamed(_bare)
    if msvit.is_mixed(weights) or msvit.is_container(path):
        found, given = msvit.read(path, weights, options.preprocess)
    else:
        given = preprocess.read_sidecar(path, options.preprocess)
        weights, found = _read(weights, given, options)
    found.notes += notes
    described = (given.where,) if given.where != path else ()
    return _source(path.parent, weights, found, options, described, given, path, positions)


def _read(weights: Checkpoint, given: Given, options: VisionOptions) -> tuple[Checkpoint, Found]:
    """A bare checkpoint under any family's names, and the view of it that they need."""
    if any(name.startswith(t2t_vit.MARK) for name in weights.entries):
        return weights, t2t_vit.read(weights, given)
    if torchvision_acm.MARK in weights.entries:
        return torchvision_acm.read(weights, given, options.width_rule or "paper")
    if apt.MARK in weights.entries:
        weights = apt.renamed(weights)
        return weights, apt.read(weights, given, options.scales)
    if naflexvit.MARK in weights.entries:
        return naflexvit.read(weights, given)
    return weights, timm_vit.read(weights, given)


def _source(
    folder: Path,
    weights: Checkpoint,
    found: Found,
    options: VisionOptions,
    described: tuple[Path, ...],
    given: Given | None,
    file: Path | None = None,
    positions: Any = None,
) -> Source:
    if options.heads is not None:
        weights = weights.joined(exits.read_heads(options.heads))
    if options.width_rule is not None and "width" not in found.fields:
        raise ConversionError(f"{folder}: width_rule given, but nothing in it is adaptive")
    declared = () if given is None else given.exits
    exits.check_declared(weights, declared, options.exit)
    leaving, notes = declared, list[str]()
    if not declared:
        layers = found.fields["num_layers"]
        leaving, notes = exits.read_exits(weights, layers, options.exit, positions)
    notes += adapt(weights, found, options, given)
    try:
        spec = VisionSpec(**found.fields, exits=leaving)
    except FormatError as error:
        raise ConversionError(f"{weights.paths[0]}: {error}") from None
    made = Assembly(weights)
    add_backbone(made, spec, found)
    if spec.stem == "t2t":
        t2t_vit.add_stem(made)
    torchvision_acm.add_width(made, spec)
    if spec.scales is not None and spec.scales.embed == "conv":
        apt.add_scales(made, spec)
    msvit.add_scales(made, spec, found)
    reduction.add_reduction(made, spec)
    (exits.add_declared if declared else exits.add_exits)(made, spec)
    provenance: dict[str, Any] = {}
    tradeoff = exits.tradeoff(file) if file is not None and spec.exits else None
    if tradeoff is not None:
        provenance["lambda"] = tradeoff
        notes.append(f"trained with a trade-off (lambda) of {tradeoff:g}, says the file's name")
    return Source(
        folder, spec, made.result(), tensors=made.tensors, described_by=described,
        copies={copy: of for copy, of in apt.COPIES.items() if copy in weights.entries},
        notes=(*found.notes, *notes), provenance=provenance,
    )  # fmt: skip


def _merged(config: Given, given: Given | None) -> Given:
    """What the configuration says, except for the preprocessing where that is given."""
    if given is None:
        return config
    return dataclasses.replace(
        config, where=given.where, preprocess=given.preprocess,
        labels=given.labels or config.labels,
        position_resize=given.position_resize or config.position_resize,
    )  # fmt: skip


def _state_dict(path: Path) -> dict[str, Tensor]:
    data = unpickle.load(path)
    wrapper, _ = _unwrapped(path, data)
    return dense(path, dict(flatten(path, data[wrapper] if wrapper else data)))


def _unwrapped(path: Path, data: dict[Any, Any]) -> tuple[str, dict[Any, Any]]:
    """The key of the state dict ("" when it lies open), and what is around it."""
    if any(isinstance(value, Tensor) for value in data.values()):
        return "", {}
    for key in _WRAPPERS:
        if isinstance(data.get(key), dict):
            return key, data
    known = ", ".join(_WRAPPERS)
    raise ConversionError(
        f"{path}: no state dict: it holds {', '.join(map(str, data)) or 'nothing'} (known: {known})"
    )


def _bare(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever reads it in earnest says what is wrong
    return data if isinstance(data, dict) else {}
