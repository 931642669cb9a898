"""What a model folder holds, for people (`text`) and for programs (`describe`)."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from pyruntime.format.manifest import read_manifest
from pyruntime.format.spec import family_of, model_tensors, to_dict

_PARTS = ("embedding", "stem", "attention", "mlp", "experts", "routers", "norms", "gates", "exits",
          "head")  # fmt: skip
_GATE = re.compile(r"gates?\.|reduce\.|layers\.\d+\.(attn|mlp)\.gate\.|layers\.\d+\.\S*\.width\.")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Plain JSON types; reads runtime.json only. A tied head counts once, as the embedding.

    Shared experts count as experts.

    Raises:
        FormatError: not a model folder, or its runtime.json is malformed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    parameters = dict.fromkeys(_PARTS, 0)
    sizes = dict.fromkeys(_PARTS, 0)
    for tensor in model_tensors(manifest.spec, manifest.gates):
        part = _part(tensor.name)
        if not tensor.name.endswith("_scale"):  # how a number is stored is no further number
            parameters[part] += math.prod(tensor.shape)
        sizes[part] += tensor.nbytes
    return {
        "path": str(folder),
        "family": family_of(manifest.spec),
        "architecture": to_dict(manifest.spec),
        "gates": manifest.gates and to_dict(manifest.gates),
        "calibration": manifest.calibration,
        "provenance": manifest.provenance,
        "parameters": {"total": sum(parameters.values()), **parameters},
        "bytes": {"total": sum(sizes.values()), **sizes},
        "shards": {name: shard.bytes for name, shard in manifest.shards.items()},
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "chat_template": (folder / "chat_template.jinja").is_file(),
    }


def text(path: str | os.PathLike[str]) -> str:
    """The same, to be read.

    Raises:
        FormatError: as `describe`.
    """
    facts = describe(path)
    spec, gates, calibration = facts["architecture"], facts["gates"], facts["calibration"]
    rows = [
        ("model", f"{spec['source_family']} {facts['family']}, {spec['dtype']}"
                  f"{_quantization_text(spec)}"),
        ("layers", f"{spec['num_layers']} of width {spec['hidden_size']}, "
                   f"MLP {spec.get('intermediate_size') or spec['mlp_size']}"),
    ]  # fmt: skip
    rows += _ROWS[facts["family"]](spec)
    for part in ("total", *_PARTS):
        if facts["parameters"][part]:
            count, size = facts["parameters"][part], facts["bytes"][part]
            rows.append((part, f"{count:>15,} parameters {size / 1e6:12,.3f} MB"))
    if facts["family"] != "vision":
        rows.append(("gates", _gate_text(gates) if gates else "none"))
    rows.append(("calibration", _calibration_text(calibration) if calibration else "none"))
    if facts["family"] != "vision":
        rows.append(("tokenizer", "present" if facts["tokenizer"] else "none: token ids only"))
    rows.append(("files", f"{len(facts['shards'])} shards"))
    rows += [(key, str(value)) for key, value in facts["provenance"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([facts["path"], *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _quantization_text(spec: dict[str, Any]) -> str:
    return f", matrices {spec['quantization']}" if spec.get("quantization") else ""


def _decoder_rows(spec: dict[str, Any]) -> list[tuple[str, str]]:
    tied = "tied" if spec["tie_embeddings"] else "own head"
    scaling = (spec["rope_scaling"] or {}).get("rope_type", "no scaling")
    rows = [
        ("heads", f"{spec['num_heads']} query, {spec['num_kv_heads']} key/value, "
                  f"{spec['head_dim']} wide"),
        ("vocabulary", f"{spec['vocab_size']} tokens ({tied}), "
                       f"end tokens {spec['eos_token_ids']}"),
        ("positions", f"{spec['max_positions']}, rope theta {spec['rope_theta']:g}, {scaling}"),
    ]  # fmt: skip
    return rows + (_expert_rows(spec["experts"], spec["num_layers"]) if spec["experts"] else [])


def _encoder_rows(spec: dict[str, Any]) -> list[tuple[str, str]]:
    sparse = len(spec["expert_layers"])
    return [
        ("heads", f"{spec['num_heads']}, {spec['head_dim']} wide"),
        ("vocabulary", f"{spec['vocab_size']} tokens, end tokens {spec['eos_token_ids']}"),
        ("positions", f"relative, {spec['buckets']} buckets up to {spec['max_distance']}"),
        ("experts", f"1 of {spec['num_experts']} a token, in {sparse} of {spec['num_layers']} "
                    f"layers; trained with a capacity of {spec['capacity']} per sequence"),
    ]  # fmt: skip


def _vision_rows(spec: dict[str, Any]) -> list[tuple[str, str]]:
    (height, width), patch = spec["image_size"], spec["patch_size"]
    stem = "tokens-to-token stem" if spec["stem"] == "t2t" else "patches"
    seen, prefix = spec["preprocess"], spec["prefix_tokens"]
    how = "squashed" if seen["squash"] else f"centre crop {seen['crop']:g}"
    mean, std = (" ".join(f"{value:g}" for value in seen[key]) for key in ("mean", "std"))
    labels = ", named" if spec["labels"] else ""
    rows = [
        ("heads", f"{spec['num_heads']}, {spec['hidden_size'] // spec['num_heads']} wide"),
        ("images", f"{height} x {width}, {stem} of {patch}: {prefix} + "
                   f"{(height // patch) * (width // patch)} tokens"),
        ("preprocess", f"{seen['interpolation']}, {how}, mean {mean}, std {std}"),
        ("classes", f"{spec['num_classes']}{labels}, read from the {_POOLS[spec['pool']]}"),
        ("positions", f"at other sizes resized {_RESIZES[spec['position_resize']]}"),
    ]  # fmt: skip
    if spec["scales"]:
        rows += _scale_rows(spec["scales"], patch)
    if spec["reduction"]:
        rows.append(("reduction", _reduction_text(spec["reduction"])))
    if spec["exits"]:
        rows += [(f"exit {number}", _exit_text(one)) for number, one in enumerate(spec["exits"])]
    else:
        rows.append(("exits", "none"))
    if spec["width"]:
        rows.append(("width", _width_text(spec["width"])))
    return rows


def _scale_rows(scales: dict[str, Any], patch: int) -> list[tuple[str, str]]:
    sides = ", ".join(str(ratio * patch) for ratio in scales["ratios"])
    embedded = {
        "shared": f"resized ({scales['resize']}) into the same projection",
        "separate": "with a projection of their own on "
        + ("all pixels" if scales["kernel"] == "region" else "resized ones"),
        "conv": f"resized ({scales['resize']}), with a convolution over the finest",
    }[scales["embed"]]
    thresholds = " ".join(f"{value:g}" for value in scales["thresholds"])
    source = scales["source"] + (f" (below {thresholds})" if thresholds else "")
    weight = ", a mean weighs them by area" if scales["pool_weight"] == "area" else ""
    rows = [
        ("scales", f"patches of {sides} and {patch}, chosen by {source}"),
        ("coarser", f"{embedded}, positions {scales['positions']}{weight}"),
    ]
    gate = scales["gate"]
    if gate:
        widths = ", ".join(map(str, gate["widths"]))
        parts = [f"of widths {widths}", "layer norms" if gate["norms"] else "",
                 "positions" if gate["positions"] else "",
                 f"coarse above {gate['threshold']:g}"]  # fmt: skip
        rows.append(("scale gate", ", ".join(part for part in parts if part)))
    return rows


def _reduction_text(reduction: dict[str, Any]) -> str:
    blocks, method = reduction["blocks"], reduction["method"]
    if method == "tome":
        merged = " ".join(map(str, dict.fromkeys(reduction["merge"])))
        counted = "" if reduction["proportional"] else ", keys count once"
        return f"tome: {merged} pairs merged in each of {len(blocks)} blocks{counted}"
    kept = " ".join(f"{share:g}" for share in reduction["keep"])
    where = "after the attention of" if method == "evit" else "before"
    fused = ", the others fused into one" if reduction["fuse"] else ""
    return f"{method}: keeps {kept} {where} blocks {' '.join(map(str, blocks))}{fused}"


def _exit_text(one: dict[str, Any]) -> str:
    sign = ">" if one["strict"] else ">="
    rule = "never" if one["threshold"] is None else f"{sign} {one['threshold']:g}"
    parts = [
        f"after block {one['after_block']}: {one['criterion']} {rule}",
        f"{one['composition']}, tau {one['tau']:g}" if one["criterion"] == "jei_dnn" else "",
        f"{one['norm']} norm" if one["norm"] != "shared" else "",
        "mean of the patches" if one["pool"] == "mean" else "",
        f"outputs {one['outputs']}" if one["outputs"] != "own" else "",
        "cascade" if one["cascade"] else "",
        f"always class {one['constant_class']}" if one["constant_class"] is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _width_text(width: dict[str, Any]) -> str:
    parts = {"MLP": width["mlp_bottleneck"], "projections": width["attention_bottleneck"]}
    where = ", ".join(f"{name} {wide} wide" for name, wide in parts.items() if wide)
    return f"up to {width['learners']} learners ({where}), rule {width['rule']}"


def _expert_rows(experts: dict[str, Any], layers: int) -> list[tuple[str, str]]:
    router, count = experts["router"], len(experts["layers"])
    gated = ", gated" if experts["shared_gate"] else ""
    shared = f"; shared {experts['shared_size']}{gated}" if experts["shared_size"] else ""
    rules = [
        "sparse mixer" if router["kind"] == "sparse_mixer" else f"top-k of {router['score']}",
        "softmax over the chosen" if router["over_chosen"] else "",
        "normalised" if router["normalize"] else "",
        f"{router['top_groups']} of {router['groups']} groups" if router["groups"] > 1 else "",
        "selection bias" if router["selection_bias"] else "",
        f"times {router['scale']:g}" if router["scale"] != 1 else "",
    ]
    return [
        ("experts", f"{experts['experts_per_token']} of {experts['num_experts']} a token, "
                    f"{experts['intermediate_size']} wide, in {count} of {layers} layers{shared}"),
        ("router", ", ".join(rule for rule in rules if rule)),
    ]  # fmt: skip


_ROWS = {"decoder": _decoder_rows, "encoder": _encoder_rows, "vision": _vision_rows}
_POOLS = {"class": "class row", "mean": "mean of the patches", "distilled": "class and "
          "distillation rows", "class_mean": "class row and the mean of the patches"}  # fmt: skip
_RESIZES = {"bicubic_aa": "bicubic with antialias", "bicubic": "bicubic without antialias"}


def _gate_text(gates: dict[str, Any]) -> str:
    kind = gates["gate_type"] + (" (scalar)" if gates["mlp_scalar"] else "")
    flags = {"attention": gates["gate_attention"], "MLP": gates["gate_mlp"]}
    where = " and ".join(name for name, on in flags.items() if on)
    shared = ", shared by all layers" if gates["shared"] else ""
    scaled = "" if gates["actually_gate"] else ", ranks only"
    return (
        f"{gates['kind']} {kind} on {where}{shared}, {gates['gating_mode']}{scaled}; "
        f"default rule {gates['rule']} at skip ratio {gates['skip_ratio']:g}, "
        f"{gates['kv_mode']} keys and values"
    )


def _calibration_text(calibration: dict[str, Any]) -> str:
    budgets, default = calibration["budgets"], calibration["default_budget"]
    counted = "samples" if "samples" in calibration else "tokens"
    usual = "the checkpoint's own rule" if default is None else f"{default:g}"
    return (
        f"{len(budgets)} budgets from {max(budgets):g} to {min(budgets):g} "
        f"on {calibration[counted]} {counted}, default {usual}"
    )


def _part(name: str) -> str:
    if _GATE.match(name):
        return "gates"
    if name.startswith("exits."):
        return "exits"
    if name.startswith(("embed.", "positions", "prefix")):
        return "embedding"
    if name.startswith(("stem.", "coarse.", "conv.", "zero.")):
        return "stem"
    if name.startswith(("lm_head.", "head.", "head_dist.")):
        return "head"
    if "norm." in name:
        return "norms"
    if ".router." in name:
        return "routers"
    if ".experts." in name or ".shared." in name:
        return "experts"
    return "attention" if ".attn." in name or name.startswith("position_bias.") else "mlp"
