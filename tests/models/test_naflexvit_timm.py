"""Converted NaFlexVit models against timm itself: images of many shapes, padded there, packed here.

timm gets a batch as its NaFlex loader makes it: patches padded to one length, their coordinates and
which of them are there. We get the images.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyruntime
from pyruntime.format.spec import VisionSpec
from tests.checkpoints import write_json, write_weights
from tests.models.test_vit_timm import randomize
from tests.timm_peer import need_timm

need_timm()

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, LAYERS, PATCH, CLASSES = 192, 2, 16, 10
GAP = {"global_pool": "avg", "fc_norm": True}
TOKEN = {"global_pool": "token", "class_token": True}
CASES: dict[str, dict[str, Any]] = {
    "registers": {**GAP, "reg_tokens": 4, "init_values": 1e-5},
    "no prefix": GAP,
    "token": TOKEN,
    "token and registers": {**TOKEN, "reg_tokens": 2, "init_values": 1e-5},
    "mean beside a class token": {**GAP, "class_token": True, "reg_tokens": 1},
    "norm before the mean": {**GAP, "fc_norm": False, "reg_tokens": 1},
    "norm after the token": {**TOKEN, "fc_norm": True},
    "channel first": {**GAP, "patchify_channels_last": False},
    "no antialias": {**GAP, "pos_embed_antialias": False},
    "oblong grid": {**GAP, "reg_tokens": 1, "pos_embed_grid_size": (3, 6)},
    "other patches": {**GAP, "patch_size": 8, "qkv_bias": False, "qk_norm": True},
    "key mask": {**GAP, "use_key_only_attn_mask": True, "mlp_ratio": 2.5},
    "norm before the blocks": {**GAP, "pre_norm": True},
}
# Rows and columns of patches: the learned 4 x 4, larger, smaller, thin, and one patch alone.
GRIDS = ((4, 4), (2, 7), (6, 3), (1, 9), (5, 1), (1, 1), (8, 8), (4, 4), (3, 6))


def peer(**values: Any) -> Any:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    whole = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": 3, "patch_size": PATCH,
             "pos_embed_grid_size": (4, 4), **values}  # fmt: skip
    model = NaFlexVit(NaFlexVitCfg(**whole), num_classes=CLASSES)
    randomize(model)
    return model.eval()


def write_folder(folder: Path, model: Any, values: dict[str, Any]) -> None:
    """As timm's hub has it."""
    told = ("patchify_channels_last", "pos_embed_antialias", "use_key_only_attn_mask")
    folder.mkdir()
    config = {
        "architecture": "naflexvit_base_patch16_gap", "num_classes": CLASSES,
        "global_pool": model.global_pool,
        "model_args": {"num_heads": 3} | {key: values[key] for key in told if key in values},
        "pretrained_cfg": {
            "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0,
            "input_size": [3, 384, 384], "first_conv": "embeds.proj", "classifier": "head",
        },
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_weights(folder, dict(model.state_dict()), "safetensors", 1)


def converted(tmp_path: Path, model: Any, values: dict[str, Any]) -> pyruntime.VisionRuntime:
    write_folder(tmp_path / "timm", model, values)
    pyruntime.convert(tmp_path / "timm", tmp_path / "model", dtype="float32")
    return pyruntime.load_vision(tmp_path / "model")


def images_of(patch: int, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, a * patch, b * patch, generator=random) for a, b in GRIDS]


def padded(images: list[Tensor], patch: int, channels_last: bool) -> dict[str, Tensor]:
    """One batch of timm's, two patches longer than it needs to be."""
    from timm.models.naflexvit import batch_patchify

    parts, places = [], []
    for image in images:
        found, (rows, columns) = batch_patchify(
            image[None], (patch, patch), channels_last=channels_last
        )
        parts.append(found[0])
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2))
    longest = max(map(len, parts)) + 2
    batch = {
        "patches": torch.zeros(len(parts), longest, parts[0].shape[1]),
        "patch_coord": torch.zeros(len(parts), longest, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(len(parts), longest, dtype=torch.bool),
    }
    for i, (part, at) in enumerate(zip(parts, places, strict=True)):
        batch["patches"][i, : len(part)] = part
        batch["patch_coord"][i, : len(part)] = at
        batch["patch_valid"][i, : len(part)] = True
    return batch


@pytest.mark.parametrize("name", CASES)
def test_logits_of_mixed_sizes_are_those_of_timm(tmp_path: Path, name: str) -> None:
    values = CASES[name]
    model = peer(**values)
    runtime = converted(tmp_path, model, values)
    patch = values.get("patch_size", PATCH)
    images = images_of(patch)
    with torch.inference_mode():
        expected = model(padded(images, patch, values.get("patchify_channels_last", True)))
        alone = torch.cat([model(image[None]) for image in images])
    assert float(expected.std()) > 0.3
    assert float((expected - alone).abs().max()) <= 1e-4  # padding is nothing to timm
    found = runtime.forward(images).logits
    assert float((found - expected).abs().max()) <= 1e-4
    for image, logits in zip(images, found, strict=True):
        assert torch.equal(runtime.forward([image]).logits[0], logits)


def test_order_of_images_changes_no_bit(tmp_path: Path) -> None:
    runtime = converted(tmp_path, peer(**GAP, reg_tokens=4), GAP)
    images = images_of(PATCH, seed=2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3)).tolist()
    found = runtime.forward(images).logits
    moved = runtime.forward([images[i] for i in order]).logits
    assert torch.equal(moved, found[order])


@pytest.mark.parametrize(("values", "prefix"), [({**GAP, "reg_tokens": 4}, 4), (TOKEN, 1)])
def test_only_the_patches_of_an_image_are_computed(
    tmp_path: Path, values: dict[str, Any], prefix: int
) -> None:
    """Multiply-accumulates are the sum over images of what each is by its own patches."""
    runtime = converted(tmp_path, peer(**values), values)
    images = images_of(PATCH)
    trace = runtime.forward(images).trace
    each = [int(runtime.forward([image]).trace.macs_per_image[0]) for image in images]
    assert trace.macs_per_image.tolist() == each
    d = WIDTH
    for macs, (rows, columns) in zip(each, GRIDS, strict=True):
        patches = rows * columns
        n = prefix + patches
        read = n if values["global_pool"] == "avg" else 1  # rows the last block updates

        def block(updated: int, n: int = n) -> int:
            return d * d * (2 * n + 2 * updated) + 2 * n * updated * d + updated * 8 * d * d

        blocks = (LAYERS - 1) * block(n) + block(read)
        assert macs == patches * 3 * PATCH**2 * d + blocks + d * CLASSES
    longest = max(each)
    assert int(trace.macs_per_image.sum()) < 0.5 * longest * len(images)  # what padding would run


def test_a_bare_state_dict(tmp_path: Path) -> None:
    """Of timm's defaults; `image_size` brings the positions to another grid, once."""
    model = peer(**GAP, reg_tokens=4)
    torch.save({"model": dict(model.state_dict())}, tmp_path / "naflex.pth")
    said = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    write_json(tmp_path / "preprocess.json", said)
    images = images_of(PATCH)
    with torch.inference_mode():
        expected = torch.cat([model(image[None]) for image in images])
    report = pyruntime.convert(tmp_path / "naflex.pth", tmp_path / "model", dtype="float32")
    assert "flattened channel last" in "\n".join(report.notes)
    runtime = pyruntime.load_vision(tmp_path / "model")
    assert isinstance(runtime.spec, VisionSpec) and runtime.spec.image_size == (64, 64)
    assert float((runtime.forward(images).logits - expected).abs().max()) <= 1e-4
    write_json(tmp_path / "preprocess.json", {**said, "image_size": [48, 96]})
    pyruntime.convert(tmp_path / "naflex.pth", tmp_path / "wide", dtype="float32")
    wide = pyruntime.load_vision(tmp_path / "wide")
    found = wide.forward(images[-1][None]).logits
    assert float((found - expected[-1:]).abs().max()) <= 1e-4


def test_a_convolution_instead_of_the_matrix(tmp_path: Path) -> None:
    model = peer(**GAP, embed_proj_type="conv")
    runtime = converted(tmp_path, model, GAP)
    images = images_of(PATCH)
    with torch.inference_mode():
        expected = torch.cat([model(image[None]) for image in images])
    assert float((runtime.forward(images).logits - expected).abs().max()) <= 1e-4


def test_the_model_that_timm_registers(tmp_path: Path) -> None:
    """Its own configuration: a grid of 16 x 16, four registers, layer scale; of two layers."""
    from timm.models.naflexvit import naflexvit_base_patch16_gap

    model = naflexvit_base_patch16_gap(depth=2, num_classes=CLASSES).eval()
    randomize(model)
    write_folder(tmp_path / "timm", model, {})
    config = tmp_path / "timm/config.json"
    config.write_text(config.read_text().replace('"num_heads": 3', '"num_heads": 12'))
    report = pyruntime.convert(tmp_path / "timm", tmp_path / "model", dtype="float32")
    assert "the configuration's 384 x 384 are 576 patches" in "\n".join(report.notes)
    runtime = pyruntime.load_vision(tmp_path / "model")
    assert runtime.spec.image_size == (256, 256) and math.prod(runtime.spec.grid) == 256
    random = torch.Generator().manual_seed(5)
    images = [torch.randn(3, h, w, generator=random) for h, w in ((384, 160), (96, 320))]
    with torch.inference_mode():
        expected = model(padded(images, PATCH, True))
    assert float((runtime.forward(images).logits - expected).abs().max()) <= 1e-4
