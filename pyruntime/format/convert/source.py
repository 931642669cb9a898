"""A source, understood: the model it holds, and where each of our tensors comes from."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import checkpoint, llama, qwen2, qwen3
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.spec import DecoderSpec, GateSpec, TensorSpec, decoder_tensors

_FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
_FLOATS = ("float32", "float16", "bfloat16")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_COMPARE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor to write, and the tensors whose rows it joins, each giving an equal share."""

    target: TensorSpec
    sources: tuple[str, ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """What each source must look like."""
        return (self.target.shape[0] // len(self.sources), *self.target.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Everything a conversion needs to know.

    `modules` maps our module names to theirs. `copies` maps a tensor that may be there to the one
    it must equal. `folder` holds config.json and the tokenizer.
    """

    folder: Path
    spec: DecoderSpec
    checkpoint: Checkpoint
    modules: Mapping[str, tuple[str, ...]]
    gates: GateSpec | None = None
    calibration: dict[str, Any] | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    described_by: tuple[Path, ...] = ()

    def recipes(self) -> list[Recipe]:
        """One recipe per tensor of the destination, in its order."""
        return [
            Recipe(target, self._sources_of(target.name))
            for target in decoder_tensors(self.spec, self.gates)
        ]

    def with_dtype(self, dtype: Literal["auto", "bfloat16", "float32"]) -> tuple[Source, list[str]]:
        """This source with the model dtype decided ("auto", "bfloat16" or "float32"), and notes."""
        backbone, everything = self._matrix_dtypes(None), self._matrix_dtypes(self.gates)
        if dtype == "auto":
            dtype = "float32" if "float32" in backbone else "bfloat16"
        notes = []
        if dtype == "bfloat16" and "float16" in everything:
            notes.append("float16 weights become bfloat16: 3 bits of mantissa less, more range")
        if dtype == "bfloat16" and "float32" in everything:
            which = "weights" if "float32" in backbone else "gate weights"
            notes.append(f"float32 {which} are rounded to bfloat16")
        spec = dataclasses.replace(self.spec, dtype=dtype)
        return dataclasses.replace(self, spec=spec), notes

    def check(self) -> None:
        """Compare every tensor of the checkpoint with what the model needs, before any is used.

        Raises:
            ConversionError: all missing, misshapen, mistyped, unused and contradicting tensors.
        """
        entries = self.checkpoint.entries
        wanted = {name: recipe.source_shape for recipe in self.recipes() for name in recipe.sources}
        unused = [
            name for name in entries
            if name not in wanted and name not in self.copies and not _is_buffer(name)
        ]  # fmt: skip
        missing = [name for name in wanted if name not in entries]
        spare, known = _by_template(unused), _by_template(wanted)
        problems = [
            f"missing {name} {list(wanted[name])}{_nearest(name, spare)}" for name in missing
        ]
        problems += [
            f"unused {name} {list(entries[name].shape)}{_nearest(name, known)}" for name in unused
        ]
        # A copy must equal its original, so it has the same shape.
        shapes = {**wanted, **{c: wanted[o] for c, o in self.copies.items() if o in wanted}}
        for name, shape in shapes.items():
            if name not in entries:
                continue
            entry = entries[name]
            if entry.shape != shape:
                problems.append(f"misshapen {name} {list(entry.shape)}, expected {list(shape)}")
            if entry.dtype not in _FLOATS:
                problems.append(f"mistyped {name} {entry.dtype}, expected {' or '.join(_FLOATS)}")
        if not problems:
            problems += [
                f"contradicting {copy}: differs from {original}, of which it must be a copy"
                for copy, original in self.copies.items()
                if copy in entries and not same_values(self.checkpoint, copy, original)
            ]
        if problems:
            where = ", ".join(str(path) for path in dict.fromkeys(self.checkpoint.paths))
            raise ConversionError("\n".join([f"{where}: {len(problems)} problems", *problems]))

    def _matrix_dtypes(self, gates: GateSpec | None) -> set[str]:
        """Source dtypes of the tensors that take the model's dtype; the others stay float32."""
        entries = self.checkpoint.entries
        return {
            entries[name].dtype
            for target in decoder_tensors(dataclasses.replace(self.spec, dtype="bfloat16"), gates)
            if target.dtype == "bfloat16"
            for name in self._sources_of(target.name)
            if name in entries
        }

    def _sources_of(self, target: str) -> tuple[str, ...]:
        layer = _LAYER.match(target)
        number = layer.group(1) if layer else ""
        module, suffix = _LAYER.sub("layers.{i}.", target).rsplit(".", 1)
        return tuple(f"{theirs.replace('{i}', number)}.{suffix}" for theirs in self.modules[module])


def open_model(folder: Path) -> tuple[DecoderSpec, Mapping[str, tuple[str, ...]]]:
    """The decoder that `folder`/config.json describes, and its family's module names.

    Raises:
        UnsupportedModel: another architecture, or an option that is not implemented.
        ConversionError: no readable config.json.
    """
    config = Config(folder)
    kind = config.data.get("model_type")
    family = _FAMILIES.get(str(kind))
    if family is None:
        raise UnsupportedModel(
            f"{config.path}: model_type {kind!r} is not supported "
            f"(supported: {', '.join(_FAMILIES)})"
        )
    names = config.data.get("architectures") or [family.ARCHITECTURE]
    if names != [family.ARCHITECTURE]:
        raise UnsupportedModel(
            f"{config.path}: architectures {names} is not supported "
            f"(supported for {kind}: {family.ARCHITECTURE})"
        )
    return family.read(config), family.MODULES


def open_folder(folder: Path) -> Source:
    """A Hugging Face folder as a source.

    Raises:
        UnsupportedModel, ConversionError: see `open_model` and `checkpoint.open_folder`.
    """
    spec, modules = open_model(folder)
    return Source(
        folder, spec, checkpoint.open_folder(folder), modules,
        copies=tied_copies(spec), described_by=description_files(folder),
    )  # fmt: skip


def description_files(folder: Path) -> tuple[Path, ...]:
    """The files of a Hugging Face folder, besides the weights, that decide what it means."""
    files = (folder / name for name in ("config.json", "generation_config.json"))
    return tuple(path for path in files if path.is_file())


def tied_copies(spec: DecoderSpec) -> dict[str, str]:
    """A tied head is often written out; it is fine while it equals the embedding."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if spec.tie_embeddings else {}


def same_values(weights: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; reads them in pieces."""
    shape = weights.entries[one].shape
    if shape != weights.entries[other].shape:
        return False
    for start in range(0, shape[0], _COMPARE_ROWS):
        stop = min(start + _COMPARE_ROWS, shape[0])
        pair = (weights.rows(name, start, stop).float() for name in (one, other))
        if not torch.equal(*pair):
            return False
    return True


def _is_buffer(name: str) -> bool:
    # Old checkpoints store the rotary frequencies; they follow from the configuration.
    return name.endswith("rotary_emb.inv_freq")


def _by_template(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names that differ in the layer number alone, together: {template: {layer: name}}."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        layer = _LAYER.search(name)
        template = _LAYER.sub("layers.", name)
        groups.setdefault(template, {})[layer[1] if layer else ""] = name
    return groups


def _nearest(name: str, others: dict[str, dict[str, str]]) -> str:
    """The most similar name, of the same layer where there is one."""
    layer = _LAYER.search(name)
    found = difflib.get_close_matches(_LAYER.sub("layers.", name), others, 1)
    if not found:
        return ""
    group = others[found[0]]
    best = group.get(layer[1] if layer else "", next(iter(group.values())))
    return f", nearest name: {best}"
