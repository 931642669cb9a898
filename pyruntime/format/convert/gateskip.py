"""GateSkip state dicts: a wrapped Llama-like decoder, or its gates alone, in one torch file.

The file says nothing of its variant. Shapes reveal most of it; the rest is in a JSON file beside
it, the sidecar. What is in neither is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.convert import checkpoint, source
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.source import Source
from pyruntime.format.manifest import calibration_problems
from pyruntime.format.spec import DecoderSpec, GateSpec, from_dict

# Theirs -> ours.
_BRANCHES = {"self_attn": "attn", "mlp": "mlp"}
_GATE = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.gate\.gate\.(?:(0|2)\.)?(weight|bias)$")
# What training wrappers (DDP, torch.compile, PEFT) put in front of every name.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
_ADAPTER = re.compile(r"^(attn|mlp)_(\d+)\.")
_GATE_KEYS = tuple(field.name for field in dataclasses.fields(GateSpec) if field.name != "kind")
_SIDECAR_KEYS = ("base_model", *_GATE_KEYS, "thresholds")
_NOT_INFERRED = {
    "gating_mode": '"after_module" or "before_module"',
    "actually_gate": "true or false",
}


def open_state_dict(path: Path, base: Path | None, sidecar: Path | None) -> Source:
    """A GateSkip file as a source.

    `base` is the Hugging Face folder of the base model, for config.json, the tokenizer and, when
    the file holds gates alone, the weights; it overrides the sidecar's `base_model`.

    Raises:
        ConversionError: the file, the sidecar or the base cannot be used.
    """
    notes_path = sidecar or path.with_suffix(".json")
    if sidecar is not None and not sidecar.is_file():
        raise ConversionError(f"{sidecar}: no such file")
    notes = _read_sidecar(notes_path) if notes_path.is_file() else {}
    weights = checkpoint.open_file(path).renamed(_canonical)
    if not any(_GATE.match(name) for name in weights.entries):
        raise ConversionError(
            f"{path}: holds no GateSkip gates (no name with .gate.gate.) and is "
            "no vision transformer"
        )
    folder = _base_folder(path, base, notes, notes_path)
    reading = source.open_model(folder)
    spec = reading.spec
    if not isinstance(spec, DecoderSpec):
        raise ConversionError(f"{path}: residual gates on an encoder are not implemented")
    if spec.experts is not None:
        raise ConversionError(f"{path}: residual gates on an expert model are not implemented")
    whole = any(not _GATE.match(name) for name in weights.entries)
    found = _detect(weights, spec)
    gates = _gate_spec(found, notes, notes_path)
    if not whole:
        weights = checkpoint.open_folder(folder).joined(weights)
    copies = source.tied_copies(spec)
    if gates.shared:
        copies |= _repeated(weights)
    described_by = (*source.description_files(folder), *([notes_path] if notes else []))
    return Source(
        folder, spec, weights, _gated_modules(reading.modules, gates, wrapped=whole), gates,
        _calibration(notes, notes_path, spec, gates), copies, described_by, reading.notes,
    )  # fmt: skip


def _canonical(name: str) -> str:
    """The name inside a bare Hugging Face model, whatever was wrapped around it."""
    while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    if name.startswith(("model.model.", "model.lm_head.")):
        name = name.removeprefix("model.")
    theirs = {ours: theirs for theirs, ours in _BRANCHES.items()}
    return _ADAPTER.sub(lambda m: f"model.layers.{m[2]}.{theirs[m[1]]}.gate.", name)


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected an object, is {type(data).__name__}")
    problems = []
    for key in sorted(data.keys() - set(_SIDECAR_KEYS)):
        near = difflib.get_close_matches(key, _SIDECAR_KEYS, 1)
        hint = f", nearest: {near[0]!r}" if near else ""
        problems.append(f"{path}: unknown key {key!r}{hint}")
    if problems:
        raise ConversionError("\n".join(problems))
    return data


def _base_folder(path: Path, base: Path | None, notes: Mapping[str, Any], notes_path: Path) -> Path:
    named = notes.get("base_model")
    if base is None and named is None:
        raise ConversionError(
            f"{path}: base model unknown: give its folder as base, or as base_model in {notes_path}"
        )
    folder = base or path.parent / str(named)
    if not (folder / "config.json").is_file():
        origin = "" if base else f" (base_model {named!r} of {notes_path})"
        raise ConversionError(f"{folder}: not a Hugging Face folder, no config.json{origin}")
    return folder


def _detect(weights: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    """The GateSpec fields that names and shapes tell."""
    gates = {name: match for name in weights.entries if (match := _GATE.match(name))}
    branches = {match[2] for match in gates.values()}
    found: dict[str, Any] = {
        "gate_attention": "self_attn" in branches,
        "gate_mlp": "mlp" in branches,
        "gate_type": "vector",
        "mlp_scalar": False,
        "shared": _is_shared(weights, spec),
    }
    for name, match in gates.items():
        if match[4] != "weight" or match[3] == "0":
            continue
        shape = weights.entries[name].shape
        single = bool(shape) and shape[0] == 1 and spec.hidden_size != 1
        if match[3] == "2":
            found |= {"gate_type": "mlp", "mlp_scalar": single}
        elif single:
            found["gate_type"] = "scalar"
        break
    return found


def _repeated(weights: Checkpoint) -> dict[str, str]:
    """Every later layer's gate tensor -> the first layer's."""
    pairs = {}
    for name in weights.entries:
        match = _GATE.match(name)
        if match and match[1] != "0":
            pairs[name] = name.replace(f"layers.{match[1]}.", "layers.0.", 1)
    return pairs


def _is_shared(weights: Checkpoint, spec: DecoderSpec) -> bool:
    pairs = _repeated(weights)
    # One layer alone shares with nobody. The first pair that differs ends the reading.
    return spec.num_layers > 1 and bool(pairs) and all(
        original in weights.entries and source.same_values(weights, copy, original)
        for copy, original in pairs.items()
    )  # fmt: skip


def _gate_spec(found: Mapping[str, Any], notes: Mapping[str, Any], notes_path: Path) -> GateSpec:
    values = {"kind": "gateskip", "rule": "calibrated", "skip_ratio": 0.0, "kv_mode": "dense"}
    values |= found
    values |= {key: notes[key] for key in _GATE_KEYS if key in notes}
    problems = [
        f"{notes_path}: {key} is needed ({choices}): the checkpoint does not tell it"
        for key, choices in _NOT_INFERRED.items()
        if key not in values
    ]
    problems += [
        f"{notes_path}: {key} is {notes[key]!r}, but the tensors say {found[key]!r}"
        for key in ("gate_type", "mlp_scalar", "gate_attention", "gate_mlp")
        if key in notes and notes[key] != found[key]
    ]
    if problems:
        raise ConversionError("\n".join(problems))
    try:
        return from_dict(GateSpec, values, str(notes_path))
    except FormatError as error:
        raise ConversionError(str(error)) from None


def _gated_modules(
    modules: Mapping[str, tuple[str, ...]], gates: GateSpec, wrapped: bool
) -> dict[str, tuple[str, ...]]:
    """The base's module names with the gates added, and the wrapper's `.module.` in between."""
    result = dict(modules)
    for theirs, ours in _BRANCHES.items():
        if ours not in gates.branches:
            continue
        if wrapped:
            inside = f"model.layers.{{i}}.{theirs}."
            for name, names in result.items():
                result[name] = tuple(n.replace(inside, f"{inside}module.") for n in names)
        target = f"gates.{ours}" if gates.shared else f"layers.{{i}}.{ours}.gate"
        layer = "0" if gates.shared else "{i}"
        gate = f"model.layers.{layer}.{theirs}.gate.gate"
        if gates.gate_type == "mlp":
            result |= {f"{target}.up": (f"{gate}.0",), f"{target}.down": (f"{gate}.2",)}
        else:
            result[target] = (gate,)
    return result


def _calibration(
    notes: Mapping[str, Any], notes_path: Path, spec: DecoderSpec, gates: GateSpec
) -> dict[str, Any] | None:
    """The sidecar's thresholds, which hold at its skip_ratio, as a calibration record."""
    thresholds = notes.get("thresholds")
    if thresholds is None:
        return None
    if not gates.skip_ratio > 0:
        raise ConversionError(f"{notes_path}: thresholds need the skip_ratio they were made for")
    never = [[None, None] for _ in range(spec.num_layers)]
    calibration = {
        "kind": "gateskip",
        "budgets": [1.0, 1.0 - gates.skip_ratio],
        "thresholds": [never, thresholds],
        "kept": [1.0, None],  # the sidecar does not say what was measured
        "tokens": 0,
        "data_sha256": None,
        "default_budget": 1.0 - gates.skip_ratio,
    }
    problems = calibration_problems(calibration, spec, gates)
    if problems:
        raise ConversionError("\n".join(f"{notes_path}: {text}" for text in problems))
    return calibration
