"""Mixed scales in a whole network: the invariants of the method, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.spec import ScaleGateSpec, ScaleSpec, VisionSpec
from pyruntime.gates.scale import ScaleRule
from pyruntime.layers.packed import Packed
from pyruntime.models import vit
from pyruntime.models.vit import VisionTransformer
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.weight import Weight
from tests.models.vision_models import model_of, pictures, spec_of, tensors_of

GATE = ScaleGateSpec((12, 10), norms=True, positions=True)
MIXED = ScaleSpec(ratios=(2,), gate=GATE)
FINE, COARSE = ScaleRule("all_fine"), ScaleRule("all_coarse")
MODELS: dict[str, dict[str, Any]] = {
    "class": {},
    "bfloat16": {"dtype": "bfloat16"},
    "distilled": {"prefix_tokens": 2, "pool": "distilled"},
    "registers": {"prefix_tokens": 5},
    "mean": {"prefix_tokens": 0, "pool": "mean"},
    "mean by area": {
        "prefix_tokens": 0, "pool": "mean",
        "scales": ScaleSpec((2,), gate=GATE, pool_weight="area"),
    },
    "three scales": {
        "image_size": (32, 16),
        "scales": ScaleSpec((2, 4), source="variance", thresholds=(1.0, 1.0)),
    },
}  # fmt: skip


def mixed_spec(name: str = "class", **changes: Any) -> VisionSpec:
    base = {"image_size": (16, 24), "exits": (), "scales": MIXED}
    return spec_of(**{**base, **MODELS[name], **changes})


def stops_for(model: VisionTransformer, images: Tensor | Pixels, seed: int) -> Tensor:
    """Random decisions for every coarser patch."""
    pixels = images if isinstance(images, Pixels) else Pixels.of(images)
    count = len(model.choose(pixels).layout.coarse_cells)
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=random) < 0.5


def run(model: VisionTransformer, images: Tensor | Pixels, stops: Tensor) -> Tensor:
    packed = model.embed(images, model.choose(images, stops=stops))
    for stage in range(len(model.stages)):
        packed = model.run_stage(packed, stage).packed
    return model.classify(packed)


def plain_of(spec: VisionSpec, tensors: dict[str, Tensor | Weight]) -> VisionTransformer:
    """The same weights without scales."""
    fields = {f: getattr(spec, f) for f in VisionSpec.__dataclass_fields__ if f != "scales"}
    return VisionTransformer(VisionSpec(**fields), tensors, "native")


@pytest.mark.parametrize("name", MODELS)
def test_all_fine_is_the_plain_model(name: str) -> None:
    spec = mixed_spec(name)
    tensors = tensors_of(spec)
    mixed, plain = VisionTransformer(spec, tensors, "native"), plain_of(spec, tensors)
    images = pictures(spec, 5)
    wanted = plain.forward(images)
    assert torch.equal(mixed.forward(images), wanted)
    assert torch.equal(mixed.forward(images, FINE), wanted)
    nothing = torch.zeros(len(mixed.choose(images).layout.coarse_cells), dtype=torch.bool)
    assert torch.equal(run(mixed, images, nothing), wanted)


@pytest.mark.parametrize("name", ["class", "bfloat16", "distilled", "registers", "mean"])
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_all_coarse_is_the_plain_model_of_a_smaller_image(name: str, ratio: int) -> None:
    side = 4 * ratio
    spec = mixed_spec(
        name, image_size=(2 * side, 3 * side), scales=ScaleSpec((ratio,), source="all_fine")
    )
    tensors = tensors_of(spec)
    images = pictures(spec, 4)
    positions = tensors["positions"]
    assert isinstance(positions, Tensor)
    small = spec_of(**{**MODELS[name], "image_size": (8, 12), "exits": ()})
    blocks = positions.view(2, ratio, 3, ratio, -1).mean((1, 3)).view(6, -1)
    plain = VisionTransformer(small, {**tensors, "positions": blocks}, "native")
    found = VisionTransformer(spec, tensors, "native").forward(images, COARSE)
    if ratio == 3:  # a mean of nine is rounded in the order in which it is summed
        tolerance = 0.2 if spec.dtype == "bfloat16" else 1e-5
        wanted = plain.forward(F.avg_pool2d(images, ratio))
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    else:
        sums = sum(images[:, :, y::ratio, x::ratio] for y in range(ratio) for x in range(ratio))
        assert isinstance(sums, Tensor)
        assert torch.equal(found, plain.forward((sums / ratio**2).contiguous()))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 99))
def test_packed_is_masked(name: str, seed: int) -> None:
    """All tokens of all scales, with the attention to those that are not there masked."""
    if "bfloat16" in name:
        return
    spec = mixed_spec(name)
    model = model_of(spec, seed, "native")
    images = pictures(spec, 3, seed)
    stops = stops_for(model, images, seed)
    found = run(model, images, stops)
    torch.testing.assert_close(found, masked(model, images, stops, seed), atol=2e-5, rtol=2e-5)


def masked(model: VisionTransformer, images: Tensor, stops: Tensor, seed: int) -> Tensor:
    spec, p = model.spec, model.spec.prefix_tokens
    assert spec.scales is not None
    tensors = {
        name: value.dense()[0] if isinstance(value, Weight) else value
        for name, value in tensors_of(spec, seed).items()
    }
    choice = model.choose(images, stops=stops)
    count, cells = len(images), choice.layout.grids[0].cells
    rows, columns = spec.grid
    d, h, s = spec.hidden_size, spec.num_heads, spec.patch_size
    table = tensors["positions"].view(1, rows, columns, d).permute(0, 3, 1, 2)
    tokens, areas = [], []
    for ratio in (*reversed(spec.scales.ratios), 1):
        small = F.avg_pool2d(images, ratio)
        kernel = tensors["stem.weight"].view(d, -1, s, s)
        made = F.conv2d(small, kernel, tensors["stem.bias"], stride=s)
        tokens.append((made + F.avg_pool2d(table, ratio)).flatten(2).transpose(1, 2))
        areas.append(torch.full((tokens[-1].shape[1],), float(ratio * ratio)))
    x = torch.cat(tokens, 1)
    active = torch.zeros(count * cells, dtype=torch.bool)
    active[choice.rows.long()] = True
    keep = torch.cat([torch.ones(count, p, dtype=torch.bool), active.view(count, cells)], 1)
    if p:
        x = torch.cat([tensors["prefix"].expand(count, p, d), x], 1)
    eps = spec.norm_eps

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    for i in range(spec.num_layers):
        name = f"layers.{i}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.attn.norm", x))
        q, k, v = qkv.view(count, -1, 3, h, d // h).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = x + linear(f"{name}.attn.o", y.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.mlp.up", norm(f"{name}.mlp.norm", x)))
        x = x + linear(f"{name}.mlp.down", inner)
    x = norm("norm", x)
    if spec.pool == "distilled":
        return (linear("head", x[:, 0]) + linear("head_dist", x[:, 1])) / 2
    if spec.pool == "class":
        return linear("head", x[:, 0])
    weights = active.view(count, cells).float()
    if spec.scales.pool_weight == "area":
        weights = weights * torch.cat(areas)
    return linear("head", (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


@pytest.mark.parametrize("name", MODELS)
def test_nobody_notices_the_others(name: str) -> None:
    """Alone, in a batch, in another order, beside noise: the same bits."""
    spec = mixed_spec(name)
    model = model_of(spec, backend="native")
    images = pictures(spec, 7)
    stops = stops_for(model, images, 1).view(7, -1)
    together = run(model, images, stops.flatten())
    for i in range(7):
        assert torch.equal(run(model, images[i : i + 1], stops[i])[0], together[i])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(model, images[order], stops[order].flatten()), together[order])
    noisy = images.clone()
    noisy[1:] = pictures(spec, 6, seed=9) * 1e3
    assert torch.equal(run(model, noisy, stops.flatten())[0], together[0])


@pytest.mark.parametrize("name", ["class", "distilled", "three scales"])
def test_order_of_patches_does_not_matter(name: str) -> None:
    spec = mixed_spec(name)
    model = model_of(spec, backend="native")
    images = pictures(spec, 3)
    stops = stops_for(model, images, 4)
    wanted = run(model, images, stops)
    packed = model.embed(images, model.choose(images, stops=stops))
    random, p = torch.Generator().manual_seed(5), spec.prefix_tokens
    parts = []
    for rows in packed.x.split(packed.lengths):
        order = torch.randperm(len(rows) - p, generator=random) + p
        parts.append(torch.cat([rows[:p], rows[order]]))
    mixed = Packed(torch.cat(parts), packed.cu_seqlens)
    for stage in range(len(model.stages)):
        mixed = model.run_stage(mixed, stage).packed
    torch.testing.assert_close(model.classify(mixed), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory held before."""
    spec = mixed_spec(name)
    model = model_of(spec)
    images = pictures(spec, 4)
    choice = model.choose(images, stops=stops_for(model, images, 3))
    wanted = model.embed(images, choice)

    def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(torch, "empty", nan)
    found = model.embed(images, choice)
    monkeypatch.undo()
    assert torch.equal(found.x, wanted.x) and bool(found.x.isfinite().all())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 5), st.integers(0, 999))
def test_lengths_and_costs(name: str, count: int, seed: int) -> None:
    spec = mixed_spec(name)
    model = model_of(spec)
    images = pictures(spec, count)
    choice = model.choose(images, stops=stops_for(model, images, seed))
    packed = model.embed(images, choice)
    ends = packed.cu_seqlens
    assert int(ends[0]) == 0 and int(ends[-1]) == len(packed.x) and bool((ends.diff() > 0).all())
    assert sum(choice.sizes.split([n - spec.prefix_tokens for n in packed.lengths])[i].sum()
               for i in range(count)) == count * spec.grid[0] * spec.grid[1]  # fmt: skip
    patch = len(spec.preprocess.mean) * spec.patch_size**2 * spec.hidden_size
    rows = torch.tensor(packed.lengths, dtype=torch.int64) - spec.prefix_tokens
    assert model.embed_macs(choice).tolist() == (rows * patch).tolist()
    for stage in range(len(model.stages)):
        found = model.run_stage(packed, stage)
        assert found.macs.tolist() == [model.cost.stage(stage, n) for n in packed.lengths]
    assert model.classify(packed).shape == (count, spec.num_classes)


def test_the_gate_is_paid_for() -> None:
    spec = mixed_spec()
    model = model_of(spec)
    images = pictures(spec, 3)
    choice = model.choose(images, COARSE)
    regions = 2 * 3
    gate = 3 * 8 * 8 * 12 + 12 * 10 + 10
    paid = model.embed_macs(choice, [True, False, True])
    patches = regions * 3 * 4 * 4 * 40
    assert paid.tolist() == [patches + regions * gate, patches, patches + regions * gate]


def test_a_bfloat16_model_decides_in_float32() -> None:
    images = pictures(mixed_spec(), 40)
    both = [model_of(mixed_spec(dtype=dtype)) for dtype in ("float32", "bfloat16")]
    wanted, found = (model.scale_logits(images) for model in both)
    assert torch.equal(wanted, found)


def test_a_higher_threshold_keeps_more() -> None:
    model = model_of(mixed_spec())
    images = pictures(model.spec, 20)
    logits = model.scale_logits(images).sort().values
    before: Tensor | None = None
    for threshold in (-torch.inf, *logits[::17].tolist(), torch.inf):
        rule = ScaleRule("learned", (threshold,))
        stops = model.choose(images, rule).stops
        assert torch.equal(stops, model.scale_logits(images) > threshold)  # a tie is fine
        assert before is None or bool((before | ~stops).all())
        before = stops
    assert before is not None and not bool(before.any())


@pytest.mark.parametrize("name", ["class", "registers", "three scales"])
def test_dense_outputs_repeat_coarse_patches(name: str) -> None:
    spec = mixed_spec(name)
    model = model_of(spec)
    images = pictures(spec, 3)
    stops = stops_for(model, images, 8)
    choice = model.choose(images, stops=stops)
    packed = model.embed(images, choice)
    rows, columns = spec.grid
    maps = choice.slots(spec.prefix_tokens).view(3, rows, columns)
    for slot in maps.unique().tolist():
        image, y, x = torch.nonzero(maps == slot).T
        top, left, side = int(y.min()), int(x.min()), len(y) ** 0.5
        assert len(set(image.tolist())) == 1 and side == int(side)
        assert top % side == 0 and left % side == 0
        assert int(y.max()) - top + 1 == side == int(x.max()) - left + 1
    lengths = packed.cu_seqlens
    patches = {n for i in range(3) for n in range(int(lengths[i]) + spec.prefix_tokens,
                                                  int(lengths[i + 1]))}  # fmt: skip
    assert set(maps.flatten().tolist()) == patches  # every patch row is read, no prefix row is
    for found in (model.features(images, FINE), model.features(images, COARSE)):
        assert [list(one.shape) for one in found] == [[rows, columns, 40]] * 3
    coarse = model.features(images, COARSE)[1]
    side = spec.scales.ratios[-1] if spec.scales else 1
    assert torch.equal(coarse[::side, ::side].repeat_interleave(side, 0)
                       .repeat_interleave(side, 1), coarse)  # fmt: skip


@pytest.mark.parametrize("name", ["class", "distilled", "mean"])
def test_the_last_block_serves_the_head_alone(name: str) -> None:
    model = model_of(mixed_spec(name), backend="native")
    images = pictures(model.spec, 4)
    choice = model.choose(images, stops=stops_for(model, images, 6))
    short, full = model.embed(images, choice), model.embed(images, choice)
    model.run_stage(short, 0)
    model.run_stage(full, 0, features=True)
    assert torch.equal(model.classify(short), model.classify(full))


def test_parts_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mixed_spec(), backend="native")
    images = pictures(model.spec, 9)
    stops = stops_for(model, images, 7)
    whole = run(model, images, stops)
    for rows in (1, 20, 60):
        monkeypatch.setattr(vit, "PART_ROWS", rows)
        assert torch.equal(run(model, images, stops), whole)


@pytest.mark.parametrize("name", ["class", "mean by area", "three scales", "bfloat16"])
def test_images_of_different_sizes_share_a_batch(name: str) -> None:
    """Each gets what it gets alone; a side that patches do not tile is filled with zeros."""
    spec = mixed_spec(name)
    model = model_of(spec, backend="native")
    random = torch.Generator().manual_seed(1)
    sizes = [(16, 24), (32, 8), (17, 30), (5, 7), (16, 24)]
    images = [torch.randn(3, *size, generator=random) for size in sizes]
    batch = Pixels.of_list(images)
    stops = stops_for(model, batch, 3)
    together = run(model, batch, stops)
    first = model.choose(batch).layout.first_coarse.tolist()
    side = spec.patch_size * spec.scales.ratios[-1] if spec.scales else 0
    for i, image in enumerate(images):
        own = stops[first[i] : first[i + 1]]
        assert torch.equal(run(model, image[None], own)[0], together[i])
        height, width = image.shape[1:]
        padded = F.pad(image, (0, -width % side, 0, -height % side))
        assert torch.equal(run(model, padded[None], own)[0], together[i])
    found = model.features(batch, FINE)
    assert [list(one.shape[:2]) for one in found] == [[-(-h // 4), -(-w // 4)] for h, w in sizes]


def test_refusals() -> None:
    spec = mixed_spec()
    model, plain = model_of(spec), plain_of(spec, tensors_of(spec))
    images = pictures(spec, 2)
    with pytest.raises(InvalidInput, match="one only"):
        plain.forward(images, COARSE)
    with pytest.raises(InvalidInput, match="3 scale rules for 2 images"):
        model.choose(images, [FINE] * 3)
    with pytest.raises(InvalidInput, match=r"bool \[12\].*float32 \[12\]"):
        model.choose(images, stops=torch.zeros(12))
    with pytest.raises(InvalidInput, match="other sizes"):
        model.embed(images, model.choose(pictures(spec, 3)))
    with pytest.raises(InvalidInput, match="no learned scale gate"):
        plain.scale_logits(images)
    for wrong, text in (
        ({"ratios": (3, 4), "source": "all_fine"}, "divide one another"),
        ({"ratios": (2,)}, "needs a gate"),
        ({"ratios": (2,), "source": "entropy"}, "a threshold for each"),
        ({"ratios": (2, 4), "gate": GATE}, "two scales only"),
        ({"ratios": (3,), "embed": "conv", "source": "all_fine"}, "powers of two"),
    ):
        with pytest.raises(FormatError, match=text):
            ScaleSpec(**wrong)
    with pytest.raises(FormatError, match="do not tile"):
        mixed_spec(image_size=(12, 8))
