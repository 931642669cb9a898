"""MSViT (arXiv 2307.02321) containers: a timm ViT, a gate of scales, and metadata about both.

No checkpoint of the authors' is known; this is the format of ours. Everything of the gate but the
meaning of its output is read from its tensors' shapes and names.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.convert import preprocess, timm_vit
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint, metadata, open_file
from pyruntime.format.convert.msvit_metadata import mixed_values, read_metadata, says_format
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.vision import Found
from pyruntime.format.spec import ScaleGateSpec, ScaleSpec, VisionSpec

_MARK = "msvit."
_GATE = f"{_MARK}gate"
_COARSE = f"{_MARK}coarse_embed.proj"
_LAYER = re.compile(rf"{re.escape(_GATE)}\.fc(\d+)\.weight")


def file_in(folder: Path) -> Path | None:
    """The container in a folder; None: there is none.

    Raises:
        ConversionError: several.
    """
    found = [path for path in sorted(folder.glob("*.safetensors")) if is_container(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConversionError(f"{folder}: {len(found)} MSViT containers: {names}; name one of them")
    return found[0] if found else None


def is_container(path: Path) -> bool:
    """Whether a .safetensors file says so, or holds a gate of scales."""
    try:
        return says_format(metadata(path)) or is_mixed(open_file(path))
    except ConversionError:
        return False  # whoever reads it in earnest says what is wrong


def is_mixed(weights: Checkpoint) -> bool:
    """Whether there are tensors of MSViT."""
    return any(name.startswith(_MARK) for name in weights.entries)


def read(path: Path, weights: Checkpoint, options: Path | None) -> tuple[Found, Given]:
    """The model of a container. `options` is a preprocess.json; by default one beside `path`.

    Raises:
        UnsupportedModel, ConversionError: everything that is wrong with it.
    """
    where = options or path.with_name(preprocess.FILE_NAME)
    sidecar = preprocess.read_json(where) if options or where.is_file() else {}
    says = metadata(path)
    values, notes = read_metadata(path, says, sidecar, where if sidecar else None)
    checks = {key: values.pop(key, None) for key in ("embed_dim", "depth", "mlp_ratio", "patch")}
    checks["image_size"] = values["image_size"] if "img_size" in says else None
    given = preprocess.given(values, where if sidecar else path)
    found = timm_vit.read(weights, given)
    problems = _contradictions(found, checks)
    if not problems:
        found.fields["scales"] = _Gate(weights, found, problems).read(mixed_values(values))
    if problems:
        raise ConversionError("\n".join(f"{path}: {text}" for text in problems))
    found.fields["source_family"] = "msvit"
    found.notes[:] = notes  # the number of heads was said
    if "image_size" in sidecar:
        found.fields["image_size"] = tuple(sidecar["image_size"])
    return found, given


def add_scales(made: Assembly, spec: VisionSpec, found: Found) -> None:
    """The gate's tensors, and the projection of coarse patches where they have their own."""
    scales = spec.scales
    if scales is None or scales.gate is None:
        return
    ratio, gate, channels = scales.ratios[-1], scales.gate, len(spec.preprocess.mean)
    for i in range(len(gate.widths) + 1):
        made.module(f"gate.fc{i}", f"{_GATE}.fc{i}")
    for i in range(len(gate.widths) if gate.norms else 0):
        made.module(f"gate.norm{i}", f"{_GATE}.norm{i}")
    if gate.positions:
        learned, here = ((rows // ratio, columns // ratio)
                         for rows, columns in (found.grid, spec.grid))  # fmt: skip
        made.positions(
            "gate.positions", f"{_GATE}.pos_embed", (learned, here), gate.widths[0], spec
        )
    if scales.embed == "separate":
        side = spec.patch_size * (ratio if scales.kernel == "region" else 1)
        shape = spec.hidden_size, channels
        made.patches("coarse.0", _COARSE, shape, side, side, spec.patch_bias)


def _contradictions(found: Found, checks: dict[str, Any]) -> list[str]:
    """Where the tensors are of another shape than the metadata says."""
    fields, size = found.fields, checks["image_size"]
    is_ = {
        "patch": (checks["patch"], found.patch),
        "embed_dim": (checks["embed_dim"], fields["hidden_size"]),
        "depth": (checks["depth"], fields["num_layers"]),
        "mlp_ratio": (checks["mlp_ratio"], fields["mlp_size"] / fields["hidden_size"]),
    }
    problems = [
        f"metadata {key} is {says:g}, the tensors have {has:g}"
        for key, (says, has) in is_.items()
        if says is not None and not math.isclose(says, has, rel_tol=1e-2)
    ]
    (rows, columns), patch = found.grid, found.patch
    if size is not None and (size[0] // patch, size[1] // patch) != found.grid:
        problems.append(
            f"metadata img_size is {size[0]} x {size[1]}, {size[0] // patch} x {size[1] // patch} "
            f"patches of {patch}; {found.names.positions} has {rows * columns + found.covered} rows"
        )
    return problems


class _Gate:
    """Reads the scales from the tensors; what contradicts them is added to `problems`."""

    def __init__(self, weights: Checkpoint, found: Found, problems: list[str]) -> None:
        self._entries = weights.entries
        self._found = found
        self._problems = problems

    def read(self, mixed: dict[str, Any]) -> ScaleSpec | None:
        """None: there are problems."""
        layers = [int(match[1]) for name in self._entries if (match := _LAYER.fullmatch(name))]
        count = max(layers, default=-1) + 1
        shapes = [self._shape(f"{_GATE}.fc{i}.weight", 2) for i in range(count)]
        if count < 2:
            self._problems.append(
                f"a gate of {count} layers ({_GATE}.fc0.weight, …) is not implemented: 2 at least"
            )
        if self._problems:
            return None
        ratio = self._ratio(shapes[0][1], mixed.get("ratio"))
        name = f"{_GATE}.pos_embed"
        if ratio and name in self._entries:
            self._check_regions(self._shape(name, 3), ratio)
        kernel = self._kernel(ratio, mixed["coarse_embed"])
        if self._problems:
            return None
        try:
            return ScaleSpec(
                (ratio,),
                embed="separate" if mixed["coarse_embed"] == "separate" else "shared",
                kernel=kernel,
                resize="bilinear" if mixed["coarse_embed"].startswith("bilinear") else "area",
                positions=mixed["coarse_pos"],
                gate=ScaleGateSpec(
                    widths=tuple(rows for rows, _ in shapes[:-1]),
                    norms=any(name.startswith(f"{_GATE}.norm") for name in self._entries),
                    positions=name in self._entries,
                    threshold=float(mixed["gate_threshold"]),
                ),
                pool_weight="area" if mixed.get("pool_weight") in ("area", "r2") else "token",
            )
        except FormatError as error:
            self._problems.append(str(error))
            return None

    def _ratio(self, columns: int, ratio: int | None) -> int:
        """Coarse patches in finest ones, as the gate's first layer has them."""
        channels, patch = len(self._found.fields["preprocess"].mean), self._found.patch
        side = math.isqrt(columns // channels)
        has = side // patch if side * side * channels == columns and side % patch == 0 else 0
        if ratio is not None and ratio != has:
            side = ratio * patch
            self._problems.append(
                f"{_GATE}.fc0.weight reads {columns} numbers, expected {channels * side * side}: "
                f"{channels} channels of {side} x {side} pixels, ratio {ratio} times patch {patch}"
            )
        elif has < 2:
            self._problems.append(
                f"{_GATE}.fc0.weight reads {columns} numbers, which are not {channels} channels of "
                f"a square of patches of {patch} pixels"
            )
        return has

    def _check_regions(self, shape: tuple[int, ...], ratio: int) -> None:
        (rows, columns), has = self._found.grid, shape[1]
        regions = (rows // ratio) * (columns // ratio)
        if rows % ratio or columns % ratio or has != regions:
            self._problems.append(
                f"{_GATE}.pos_embed has {has} rows, expected one for each of {rows} x {columns} "
                f"patches by {ratio} x {ratio}: {rows / ratio:g} x {columns / ratio:g}"
            )

    def _kernel(self, ratio: int, embed: str) -> Literal["patch", "region"]:
        name, patch = f"{_COARSE}.weight", self._found.patch
        if embed != "separate":
            if name in self._entries:
                self._problems.append(f"coarse_embed is {embed!r}, but there is {name}: 'separate'")
            return "patch"
        shape, sides = self._shape(name, 4), (patch, ratio * patch)
        if not self._problems and (shape[2] not in sides or shape[2] != shape[3]):
            self._problems.append(
                f"{name} is {list(shape)}, expected a kernel of {' or '.join(map(str, sides))} "
                "pixels: of resized patches, or of whole ones"
            )
        return "region" if shape[2] == sides[1] else "patch"

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        entry = self._entries.get(name)
        if entry is None:
            self._problems.append(f"missing {name}")
        elif len(entry.shape) != rank:
            self._problems.append(f"misshapen {name} {list(entry.shape)}, expected {rank} axes")
        else:
            return entry.shape
        return (1,) * rank
