"""timm's VisionTransformer: ViT, DeiT, DeiT III, and DINOv2 with a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyruntime.errors import UnsupportedModel
from pyruntime.format.convert import preprocess
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.vision import Found, Names, read_backbone

_POOLS = {"token": "class", "avg": "mean"}


@dataclass(frozen=True, slots=True)
class Family:
    """What the configurations of a family of models may say.

    Attributes:
        starts: of the names of its models.
        unlike: parts of the names of models that share tensors with what we run, but not the
            mathematics, and what those have.
        told: arguments of the model that its tensors, or other keys, tell as well.
        only: further arguments, with the values that are implemented.
    """

    starts: tuple[str, ...]
    unlike: Mapping[str, str]
    told: tuple[str, ...]
    only: Mapping[str, tuple[Any, ...]]

    def problems(self, architecture: str) -> list[str]:
        """Why models of this name are not those that their tensors look like."""
        return [
            f"architecture {architecture!r} is not supported: {what} is not implemented"
            for part, what in self.unlike.items()
            if part in architecture
        ]


_UNLIKE = ("siglip", "quickgelu", "rope", "relpos", "parallel", "hybrid", "gelu_tanh")
PLAIN = Family(
    starts=("vit_", "deit_", "deit3_"),
    unlike={part: part for part in _UNLIKE},
    told=("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
          "qk_norm", "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm",
          "fc_norm", "num_classes", "in_chans", "global_pool", "dynamic_img_size",
          "dynamic_img_pad"),
    only={"act_layer": ("gelu",)},
)  # fmt: skip


def read_config(
    data: dict[str, Any], path: Path, family: Family = PLAIN
) -> tuple[Given, str | None]:
    """A config.json of timm's hub: what it says, and the pool ("class" or "mean") where it does.

    Raises:
        UnsupportedModel: another architecture, or everything in it that is not implemented.
        ConversionError: values that make no sense.
    """
    problems = _problems(data, family)
    # Old files have the keys of `pretrained_cfg` on the first level.
    described = data.get("pretrained_cfg", data)
    arguments = data.get("model_args") or {}
    if not isinstance(described, dict) or not isinstance(arguments, dict):
        raise UnsupportedModel(f"{path}: pretrained_cfg and model_args must be objects")
    for key in sorted(arguments.keys() - set(family.told)):
        if arguments[key] not in family.only.get(key, ()):
            problems.append(f"model_args {key} {arguments[key]!r} is not implemented")
    pool = data.get("global_pool")
    if pool is None:
        pool = arguments.get("global_pool")
    if pool is not None and str(pool) not in _POOLS:
        problems.append(f"global_pool {pool!r} is not implemented (must be 'token' or 'avg')")
    mode = described.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        problems.append(f"crop_mode {mode!r} is not implemented (must be 'center' or 'squash')")
    size = described.get("input_size")
    if not (isinstance(size, list) and len(size) == 3):
        problems.append(f"input_size must be [channels, height, width], is {size!r}")
    if problems:
        raise UnsupportedModel("\n".join(f"{path}: {text}" for text in problems))
    values = {key: described[key] for key in ("mean", "std", "interpolation") if key in described}
    values |= {
        "image_size": size[1:],  # type: ignore[index]  # a list, or there would be a problem
        "crop_pct": described.get("crop_pct") or 1.0,
        "squash": mode == "squash",
        "architecture": data["architecture"],
    }
    for key in ("num_heads", "num_classes"):
        value = data.get(key) or arguments.get(key)
        if value is not None:
            values[key] = value
    labels = data.get("label_names") or described.get("label_names")
    if labels is not None:
        values["labels"] = labels
    return preprocess.given(values, path), _POOLS.get(str(pool))


def _problems(data: dict[str, Any], family: Family) -> list[str]:
    problems = []
    name = str(data["architecture"])
    if not name.startswith(family.starts):
        known = ", ".join(f"{start}*" for start in family.starts)
        problems.append(f"architecture {name!r} is not supported (supported: {known})")
    problems += family.problems(name)
    if data.get("num_classes") == 0:
        problems.append("num_classes is 0: a backbone without a classifier")
    return problems


def read(weights: Checkpoint, given: Given, pool: str | None = None) -> Found:
    """A model under timm's names; `pool` None follows from its tensors.

    Raises:
        UnsupportedModel: a part that the runtime does not implement.
        ConversionError: see `read_backbone`.
    """
    entries = weights.entries
    refuse_parts(weights, {"patch_embed.backbone.": "a convolutional stem"}.items())
    # Before layer scale was a module of its own.
    old = "blocks.0.gamma_1" in entries
    scales = tuple(f"blocks.{{i}}.{f'gamma_{n}' if old else f'ls{n}.gamma'}" for n in (1, 2))
    names = Names(scales=(scales[0], scales[1]))
    # timm gives its CLIP models, which alone have this norm, torch's own epsilon.
    eps = 1e-5 if "norm_pre.weight" in entries else 1e-6
    if pool == "class" and "head_dist.weight" in entries:
        pool = "distilled"
    return read_backbone(weights, names, given, "timm_vit", norm_eps=eps, pool=pool)


def refuse_parts(weights: Checkpoint, more: Iterable[tuple[str, str]]) -> None:
    """Look for parts that no model of ours has, and for `more`: starts of names, and what it is.

    Raises:
        UnsupportedModel: all that there are.
    """
    unlike = [("attn_pool.", "attention pooling"),
              ("blocks.0.mlp.w12.", "a SwiGLU feed-forward part"),
              ("blocks.0.mlp.fc1_g.", "a SwiGLU feed-forward part"), ("rope.", "rotary positions"),
              ("blocks.0.attns.", "parallel blocks"), *more]  # fmt: skip
    names = weights.entries
    found = [text for start, text in unlike if any(name.startswith(start) for name in names)]
    if found:
        raise UnsupportedModel(f"{weights.paths[0]}: {', '.join(found)} is not implemented")
