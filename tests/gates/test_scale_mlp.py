"""The scale gate of MSViT, against plain torch and against a trained one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import ScaleGateSpec, ScaleSpec, VisionSpec
from pyruntime.gates.experts.logits import Linear
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.gates.scale_mlp import ScaleGate, region_positions
from pyruntime.ops import Weight, native, reference
from pyruntime.ops.pixels import Pixels
from tests.gates.scale_cases import PREPROCESS, photos

both = pytest.mark.parametrize("ops", [native, reference])
DATA = Path(__file__).resolve().parents[1] / "data"


def spec_of(patch: int, ratio: int, size: tuple[int, int], widths: tuple[int, ...]) -> VisionSpec:
    return VisionSpec(
        source_family="test", image_size=size, stem="patch", patch_size=patch, hidden_size=8,
        num_layers=1, num_heads=1, mlp_size=8, num_classes=2, norm_eps=1e-6, prefix_tokens=1,
        preprocess=PREPROCESS, scales=ScaleSpec((ratio,), gate=ScaleGateSpec(widths)),
    )  # fmt: skip


class Case:
    """A gate with random weights, and the same in plain torch."""

    def __init__(self, norms: bool, positions: bool, patch: int = 4, ratio: int = 2) -> None:
        widths = (24, 17, 9)
        self.side = side = patch * ratio
        self.spec = spec_of(patch, ratio, (2 * side, 3 * side), widths)
        random = torch.Generator().manual_seed(1)
        shapes = [(24, 3 * side * side), (17, 24), (9, 17), (1, 9)]
        self.linears = [
            (torch.randn(n, k, generator=random) / k**0.5, torch.randn(n, generator=random))
            for n, k in shapes
        ]
        self.norms = [
            (torch.randn(n, generator=random), torch.randn(n, generator=random)) for n in widths
        ] if norms else []  # fmt: skip
        self.positions = torch.randn(6, 24, generator=random) if positions else None
        self.gate = ScaleGate(
            tuple(Linear(Weight.pack(w), b) for w, b in self.linears),
            tuple(self.norms),
            None if self.positions is None else region_positions(self.spec, self.positions),
            side,
        )

    def layout(self, pixels: Pixels) -> ScaleLayout:
        scales = self.spec.scales
        assert scales is not None
        return ScaleLayout.of(pixels.sizes, self.spec.patch_size, scales.ratios)

    def plain(self, image: Tensor, positions: Tensor | None) -> Tensor:
        regions = F.unfold(image[None], self.side, stride=self.side)[0].T
        x = F.linear(regions, *self.linears[0])
        if positions is not None:
            x = x + positions
        for i, linear in enumerate(self.linears[1:]):
            if self.norms:
                x = F.layer_norm(x, x.shape[1:], *self.norms[i], 1e-6)
            x = F.linear(F.gelu(x), *linear)
        return x[:, 0]


@both
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("ratio", [2, 3])
def test_it_is_an_mlp(ops: ModuleType, norms: bool, positions: bool, ratio: int) -> None:
    case = Case(norms, positions, ratio=ratio)
    pixels = photos([case.spec.image_size] * 3)  # type: ignore[list-item]
    found = case.gate.logits(ops, pixels, case.layout(pixels))
    expected = torch.cat([case.plain(pixels.image(i), case.positions) for i in range(3)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@both
def test_other_sizes_have_resized_positions(ops: ModuleType) -> None:
    case = Case(norms=True, positions=True)
    side = case.side
    pixels = photos([(2 * side, 3 * side), (4 * side, side), (2 * side - 3, side + 1)])
    found = case.gate.logits(ops, pixels, case.layout(pixels))
    assert case.positions is not None
    table = case.positions.view(1, 2, 3, -1).permute(0, 3, 1, 2)
    expected = [case.plain(pixels.image(0), case.positions)]
    for i, shape in ((1, (4, 1)), (2, (2, 2))):
        image = pixels.image(i)
        whole = torch.zeros(3, shape[0] * side, shape[1] * side)  # outside is 0
        whole[:, : image.shape[1], : image.shape[2]] = image
        resized = F.interpolate(table, shape, mode="bicubic", antialias=True)
        expected.append(case.plain(whole, resized.flatten(2)[0].T))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
def test_a_logit_does_not_depend_on_other_regions(norms: bool) -> None:
    ops = native  # torch's matmul sums in an order that depends on the number of rows
    case = Case(norms, positions=True)
    pixels = photos([(40, 24), (16, 24), (16, 24), (9, 50)])
    layout = case.layout(pixels)
    whole = case.gate.logits(ops, pixels, layout)
    for i, part in enumerate(whole.split(layout.first_coarse.diff().tolist())):
        one = Pixels.of_list([pixels.image(i)])
        assert torch.equal(case.gate.logits(ops, one, case.layout(one)), part)
    cells = torch.tensor([0, 3, 11, layout.coarse - 1])
    assert torch.equal(case.gate.logits(ops, pixels, layout, cells), whole[cells])


def test_no_regions() -> None:
    case = Case(norms=True, positions=True)
    pixels = photos([(16, 24)])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert case.gate.logits(native, pixels, case.layout(pixels), nothing).shape == (0,)


def test_its_cost() -> None:
    assert Case(norms=False, positions=False).gate.macs == 24 * 192 + 17 * 24 + 9 * 17 + 9


def test_positions_need_scales() -> None:
    spec = VisionSpec(**{
        **{name: getattr(Case(False, False).spec, name) for name in VisionSpec.__slots__},
        "scales": None,
    })  # fmt: skip
    with pytest.raises(InvalidInput, match="one scale only"):
        region_positions(spec, torch.zeros(6, 24))


@both
def test_a_trained_gate(ops: ModuleType) -> None:
    model = load_file(DATA / "msvit_digits_r4.safetensors")
    vectors = load_file(DATA / "vectors.safetensors")
    images = vectors["images_u8_nhwc"].permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = Pixels.of(images.contiguous())

    def tensor(name: str) -> Tensor:
        return model[f"msvit.gate.{name}"]

    gate = ScaleGate(
        tuple(
            Linear(Weight.pack(tensor(f"fc{i}.weight")), tensor(f"fc{i}.bias")) for i in range(4)
        ),
        tuple((tensor(f"norm{i}.weight"), tensor(f"norm{i}.bias")) for i in range(3)),
        region_positions(spec_of(4, 4, (64, 64), (64, 64, 32)), tensor("pos_embed")[0]),
        size=16,
    )
    found = gate.logits(ops, pixels, ScaleLayout.of(pixels.sizes, 4, (4,))).view(16, 16)
    torch.testing.assert_close(found, vectors["gate_logits"], atol=1e-4, rtol=0)
    assert torch.equal(found > 0, vectors["gate_logits"] > 0)
