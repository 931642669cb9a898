"""A source, understood: the model it holds, and where each of our tensors comes from."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import checkpoint
from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.families import FAMILIES, VISION
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.convert.recipe import Recipe
from pyruntime.format.spec import (
    DecoderSpec,
    EncoderSpec,
    GateSpec,
    ModelSpec,
    family_of,
    model_tensors,
)

# Suffixes of ours whose numbers come from a tensor with another.
_SUFFIXES = {"weight_scale": "weight", "selection_bias": "e_score_correction_bias"}
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_NUMBERS = re.compile(r"\b(layers?|blocks|experts|intermediate_heads|gates)\.(\d+)\.")
_COMPARE_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Everything a conversion needs to know.

    `modules` maps our module names to theirs; where families differ by more than names, `tensors`
    maps each of our tensors to those whose rows it joins instead. `copies` maps a tensor that may
    be there to the one it must equal. `folder` holds config.json and the tokenizer. `provenance` is
    added to what runtime.json tells about the origin.
    """

    folder: Path
    spec: ModelSpec
    checkpoint: Checkpoint
    modules: Modules = field(default_factory=dict)
    gates: GateSpec | None = None
    calibration: dict[str, Any] | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    described_by: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def recipes(self) -> list[Recipe]:
        """One recipe per tensor of the destination, in its order."""
        targets = {target.name: target for target in model_tensors(self.spec, self.gates)}
        return [
            # A scale is made of the rows of its matrix.
            Recipe(target, self._sources_of(name), targets[name.removesuffix("_scale")])
            for name, target in targets.items()
        ]

    def with_dtype(
        self,
        dtype: Literal["auto", "bfloat16", "float32"],
        quantize: Literal["int8"] | None = None,
    ) -> tuple[Source, list[str]]:
        """This source with the dtypes of the model decided, and notes."""
        backbone, everything = self._matrix_dtypes(None), self._matrix_dtypes(self.gates)
        if dtype == "auto":
            dtype = "float32" if "float32" in backbone else "bfloat16"
        notes = list(self.notes)
        if dtype == "bfloat16" and "float16" in everything:
            notes.append("float16 weights become bfloat16: 3 bits of mantissa less, more range")
        if dtype == "bfloat16" and "float32" in everything:
            which = "weights" if "float32" in backbone else "gate weights"
            notes.append(f"float32 {which} are rounded to bfloat16")
        spec: ModelSpec
        if isinstance(self.spec, DecoderSpec):
            spec = dataclasses.replace(self.spec, dtype=dtype, quantization=quantize)
        elif quantize is None:
            spec = dataclasses.replace(self.spec, dtype=dtype)
        else:
            kind = family_of(self.spec)
            raise ConversionError(
                f"{self.folder}: {quantize} matrices of a {kind} model are not implemented"
            )
        return dataclasses.replace(self, spec=spec), notes

    def check(self) -> None:
        """Compare every tensor of the checkpoint with what the model needs, before any is used.

        Raises:
            ConversionError: all missing, misshapen, mistyped, unused and contradicting tensors.
        """
        entries = self.checkpoint.entries
        wanted = self._wanted()
        unused = [
            name for name, entry in entries.items()
            if name not in wanted and name not in self.copies
            and not entry.derived and not _is_buffer(name)
        ]  # fmt: skip
        missing = [name for name in wanted if name not in entries]
        spare, known = (
            _by_template(unused),
            _by_template(
                name for name in wanted if name not in entries or not entries[name].derived
            ),
        )
        problems = list(self.checkpoint.problems)
        problems += [
            f"missing {name} {list(wanted[name].shape)}{_nearest(name, spare)}" for name in missing
        ]
        problems += [
            f"unused {name} {list(entries[name].shape)}{_nearest(name, known)}" for name in unused
        ]
        # A copy must equal its original, so it has the same shape.
        copies = {copy: wanted[of] for copy, of in self.copies.items() if of in wanted}
        for name, need in {**wanted, **copies}.items():
            entry = entries.get(name)
            if entry is None:
                continue
            if entry.shape != need.shape:
                shapes = f"{list(entry.shape)}, expected {list(need.shape)}"
                problems.append(f"misshapen {name} {shapes}")
            # What is derived has the dtype of what it is derived from: one complaint is enough.
            if entry.dtype not in need.dtypes and not entry.derived:
                dtypes = " or ".join(need.dtypes)
                problems.append(f"mistyped {name} {entry.dtype}, expected {dtypes}")
        if not problems:
            problems += [
                f"contradicting {copy}: differs from {original}, of which it must be a copy"
                for copy, original in self.copies.items()
                if copy in entries and not same_values(self.checkpoint, copy, original)
            ]
        if problems:
            where = ", ".join(str(path) for path in dict.fromkeys(self.checkpoint.paths))
            raise ConversionError("\n".join([f"{where}: {len(problems)} problems", *problems]))

    def _wanted(self) -> dict[str, Need]:
        """Every tensor that is used, whether directly or by one that is computed from it."""
        wanted: dict[str, Need] = {}
        todo = [(n, Need(recipe.source_shape)) for recipe in self.recipes() for n in recipe.sources]
        for name, need in todo:  # grows as tensors turn out to need others
            if name not in wanted and name in self.checkpoint.entries:
                todo += self.checkpoint.entries[name].needs.items()
            wanted.setdefault(name, need)
        return wanted

    def _matrix_dtypes(self, gates: GateSpec | None) -> set[str]:
        """Source dtypes of the tensors that take the model's dtype; the others stay float32."""
        entries = self.checkpoint.entries
        return {
            entries[name].dtype
            for target in model_tensors(dataclasses.replace(self.spec, dtype="bfloat16"), gates)
            if target.dtype == "bfloat16"
            for name in self._sources_of(target.name)
            if name in entries
        }

    def _sources_of(self, target: str) -> tuple[str, ...]:
        if self.tensors:
            return self.tensors[target]
        layer = _LAYER.match(target)
        number = layer.group(1) if layer else ""
        module, suffix = _LAYER.sub("layers.{i}.", target).rsplit(".", 1)
        suffix = _SUFFIXES.get(suffix, suffix)
        names = [theirs.replace("{i}", number) for theirs in self.modules[module]]
        if any("{e}" in name for name in names):
            every = range(_num_experts(self.spec))
            names = [name.replace("{e}", str(e)) for e in every for name in names]
        return tuple(f"{name}.{suffix}" for name in names)


def open_model(folder: Path) -> Reading:
    """What `folder`/config.json describes.

    Raises:
        UnsupportedModel: another architecture, or an option that is not implemented.
        ConversionError: no readable config.json.
    """
    config = Config(folder)
    kind = config.data.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UnsupportedModel(
            f"{config.path}: model_type {kind!r} is not supported "
            f"(supported: {', '.join((*FAMILIES, *VISION))})"
        )
    names = config.data.get("architectures") or [family.ARCHITECTURE]
    # Capitals aside: Phi-3.5-MoE's own file and transformers do not agree on them.
    if [str(name).lower() for name in names] != [family.ARCHITECTURE.lower()]:
        raise UnsupportedModel(
            f"{config.path}: architectures {names} is not supported "
            f"(supported for {kind}: {family.ARCHITECTURE})"
        )
    return family.read(config)


def open_folder(folder: Path) -> Source:
    """A Hugging Face folder as a source.

    Raises:
        UnsupportedModel, ConversionError: see `open_model` and `checkpoint.open_folder`.
    """
    reading = open_model(folder)
    return Source(
        folder, reading.spec, reading.view(checkpoint.open_folder(folder)), reading.modules,
        copies={**tied_copies(reading.spec), **reading.copies},
        described_by=description_files(folder), notes=reading.notes,
    )  # fmt: skip


def description_files(folder: Path) -> tuple[Path, ...]:
    """The files of a Hugging Face folder, besides the weights, that decide what it means."""
    files = (folder / name for name in ("config.json", "generation_config.json"))
    return tuple(path for path in files if path.is_file())


def tied_copies(spec: ModelSpec) -> dict[str, str]:
    """A tied head is often written out; it is fine while it equals the embedding."""
    tied = isinstance(spec, DecoderSpec) and spec.tie_embeddings
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def _num_experts(spec: ModelSpec) -> int:
    if isinstance(spec, EncoderSpec):
        return spec.num_experts
    experts = spec.experts if isinstance(spec, DecoderSpec) else None
    return 0 if experts is None else experts.num_experts


def same_values(weights: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; reads them in pieces."""
    shape = weights.entries[one].shape
    if shape != weights.entries[other].shape:
        return False
    rows = math.prod(shape[:-1] or shape)
    for start in range(0, rows, _COMPARE_ROWS):
        stop = min(start + _COMPARE_ROWS, rows)
        pair = (weights.rows(name, start, stop).float() for name in (one, other))
        if not torch.equal(*pair):
            return False
    return True


def _is_buffer(name: str) -> bool:
    # Old checkpoints store the rotary frequencies; they follow from the configuration.
    return name.endswith("rotary_emb.inv_freq")


def _by_template(names: Iterable[str]) -> dict[str, dict[tuple[str, ...], str]]:
    """Names by what is left of them without their layer and expert: {template: {numbers: name}}."""
    groups: dict[str, dict[tuple[str, ...], str]] = {}
    for name in names:
        groups.setdefault(_template(name), {})[_numbers(name)] = name
    return groups


def _nearest(name: str, others: Mapping[str, Mapping[tuple[str, ...], str]]) -> str:
    """The most similar name, of the same layer and expert where there is one."""
    found = difflib.get_close_matches(_template(name), others, 1)
    if not found:
        return ""
    group = others[found[0]]
    best = group.get(_numbers(name), next(iter(group.values())))
    return f", nearest name: {best}"


def _template(name: str) -> str:
    return _NUMBERS.sub(r"\1.", name)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(number for _, number in _NUMBERS.findall(name))
