"""Mixed scales: stops, the cells that they leave, and the plan that these make."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.scales import ScaleGateSpec, ScaleSpec
from pyruntime.gates.scale import ScaleChoice, ScaleRule, choose, settle, stops_of
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.ops import native, reference
from tests.gates.scale_cases import PREPROCESS, layouts, photos, random_stops, rules_of_every_source

both = pytest.mark.parametrize("ops", [native, reference])


class FixedGate:
    """Stands for a scale gate that says what the test wants."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = torch.tensor(logits)

    def logits(
        self, ops: ModuleType, pixels: object, layout: ScaleLayout, cells: Tensor | None = None
    ) -> Tensor:
        return self._logits.clone() if cells is None else self._logits[cells]


def decide(layout: ScaleLayout, rules: list[ScaleRule], logits: list[float]) -> list[bool]:
    pixels = photos(list(layout.sizes))
    gate = FixedGate(logits)
    stops = stops_of(native, pixels, layout, rules, PREPROCESS, gate)  # type: ignore[arg-type]
    return stops.tolist()  # type: ignore[no-any-return]


@both
def test_the_integer_vector(ops: ModuleType) -> None:
    layout = ScaleLayout.of(((8, 8), (8, 8)), 2, (2,))
    coarse_of = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert layout.chain[0, :16].tolist() == coarse_of
    stops = torch.tensor([True, False, False, True, True, True, True, True])
    choice = choose(ops, layout, stops)
    choice.plan.validate()
    fine = [2, 3, 6, 7, 8, 9, 12, 13]
    first = [0, 3, *(4 + i for i in fine)]  # cells: 4 coarse ones, then 16
    assert choice.plan.rows.tolist() == [*first, 20, 21, 22, 23]
    assert choice.plan.offsets.tolist() == [0, 2, 10, 14, 14]
    assert choice.cu_seqlens(1).tolist() == [0, 11, 16]
    slots = choice.slots(1)
    assert slots.dtype == torch.int32
    assert slots[fine].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert slots[[0, 1, 4, 5]].tolist() == [1] * 4 and slots[[10, 11, 14, 15]].tolist() == [2] * 4
    assert slots[16:].tolist() == [12 + i for i in coarse_of]
    assert choice.sizes.tolist() == [4, 4, *[1] * 8, *[4] * 4]
    assert choice.packed_rows(1).tolist() == [*range(1, 11), *range(12, 16)]


@given(layouts(), st.integers(0, 2**31))
def test_active_cells_tile_every_image_once(layout: ScaleLayout, seed: int) -> None:
    stops = random_stops(layout, seed)
    active = settle(layout, stops)
    patch = layout.grids[0].patch
    for i, grid in enumerate(layout.grids):
        own = slice(int(layout.first[i]), int(layout.first[i + 1]))
        painted = torch.zeros(grid.rows, grid.columns, dtype=torch.int64)
        for top, left, ratio in grid.places[active[own]].tolist():
            y, x = top // patch, left // patch
            painted[y : y + ratio, x : x + ratio] += 1
        assert bool((painted == 1).all())
    # A coarser cell is active iff it stops and nothing above it does.
    stopping = torch.ones(layout.cells, dtype=torch.bool)
    stopping[layout.coarse_cells] = stops
    expected = stopping.clone()
    above = layout.parent
    while bool((above >= 0).any()):
        expected &= ~((above >= 0) & stopping[above])
        above = torch.where(above >= 0, layout.parent[above], -1)
    assert torch.equal(active, expected)


@given(layouts(), st.integers(0, 2**31), st.integers(0, 3))
def test_the_plan_lists_images_then_scales_then_the_raster(
    layout: ScaleLayout, seed: int, prefix: int
) -> None:
    stops = random_stops(layout, seed)
    active = settle(layout, stops)
    for ops in (native, reference):
        choice = choose(ops, layout, stops)
        plan = choice.plan
        plan.validate()
        rows = plan.rows.long()
        assert rows.tolist() == torch.nonzero(active)[:, 0].tolist()  # cells lie in this order
        assert plan.num_segments == layout.count * layout.scales
        ends = choice.cu_seqlens(prefix)
        assert ends.dtype == torch.int32 and ends.is_contiguous()
        counts = torch.bincount(layout.places[rows, 0], minlength=layout.count) + prefix
        assert ends.diff().tolist() == counts.tolist() and ends[0] == 0
        where = choice.packed_rows(prefix)
        behind = where - ends[layout.places[rows, 0].long()]
        assert choice.rows is plan.rows and bool((behind >= prefix).all())
        assert bool((where.diff() > 0).all())
        # Every finest cell finds the row of the cell that is active there.
        cell = torch.full((int(ends[-1]),), -1)
        cell[where.long()] = rows
        slots = choice.slots(prefix).long()
        assert bool((cell[slots] == layout.chain).any(0).all())
        sizes = choice.spread(choice.sizes, prefix)
        assert torch.equal(torch.bincount(slots, minlength=len(cell))[where.long()].float(),
                           sizes[where.long()])  # fmt: skip
        assert sizes.sum() == layout.areas[rows].sum() + prefix * layout.count


@both
def test_all_fine_all_coarse_and_one_scale(ops: ModuleType) -> None:
    layout = ScaleLayout.of(((8, 8), (8, 16)), 2, (2, 4))
    none, every = (torch.full((layout.coarse,), value) for value in (False, True))
    fine = choose(ops, layout, none)
    assert torch.equal(fine.plan.rows.long(), layout.chain[-1])
    coarse = choose(ops, layout, every)
    assert coarse.sizes.tolist() == [16.0] * 3 and coarse.cu_seqlens(0).tolist() == [0, 1, 3]
    plain = choose(ops, ScaleLayout.of(((8, 8), (8, 16)), 2, ()), none[:0])
    plain.plan.validate()
    assert plain.plan.rows.tolist() == list(range(48))
    assert plain.cu_seqlens(1).tolist() == [0, 17, 50]
    assert plain.slots(1).tolist() == fine.slots(1).tolist() == [*range(1, 17), *range(18, 50)]


@both
def test_no_images(ops: ModuleType) -> None:
    for ratios in ((), (2,), (2, 4)):
        layout = ScaleLayout.of((), 4, ratios)
        choice = choose(ops, layout, torch.zeros(0, dtype=torch.bool))
        assert choice.rows.shape == (0,) and choice.cu_seqlens(2).tolist() == [0]
        assert choice.slots(1).shape == choice.packed_rows(1).shape == (0,)


def test_stops_of_another_kind_are_refused() -> None:
    layout = ScaleLayout.of(((8, 8),), 2, (2,))
    for stops in (torch.zeros(4), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(InvalidInput, match=r"stops: expected bool \[4\]"):
            settle(layout, stops)


def test_a_region_stays_coarse_above_the_threshold() -> None:
    layout = ScaleLayout.of(((4, 16),), 2, (2,))
    logits = [1.0, 0.5, 0.25, math.nan]
    assert decide(layout, [ScaleRule("learned", (0.5,))], logits) == [True, False, False, False]
    assert decide(layout, [ScaleRule("learned", (math.inf,))], logits) == [False] * 4
    below = [*logits[:3], -math.inf]
    assert decide(layout, [ScaleRule("learned", (-math.inf,))], below) == [True] * 3 + [False]


@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.floats(-3, 3),
       st.floats(-3, 3))  # fmt: skip
def test_a_larger_threshold_never_shrinks_the_fine_set(
    logits: list[float], a: float, b: float
) -> None:
    layout = ScaleLayout.of(((4, 16),), 2, (2,))
    low, high = (
        decide(layout, [ScaleRule("learned", (value,))], logits) for value in sorted((a, b))
    )
    assert all(before or not after for before, after in zip(low, high, strict=True))


def test_rules_of_one_batch_differ() -> None:
    layout = ScaleLayout.of(((4, 4), (4, 8), (4, 4), (4, 4)), 2, (2,))
    rules = [
        ScaleRule("learned", (0.0,)), ScaleRule("all_coarse"), ScaleRule("learned", (3.0,)),
        ScaleRule("all_fine"),
    ]  # fmt: skip
    logits = [1.0, -1.0, -1.0, 2.0, 1.0]
    assert decide(layout, rules, logits) == [True, True, True, False, False]


def test_of_learned_the_lowest_logits_are_divided_first() -> None:
    layout = ScaleLayout.of(((4, 16), (4, 4), (4, 12)), 2, (2,))
    logits = [2.0, -1.0, math.nan, -1.0, 5.0, 1.0, 1.0, 0.0]
    rules = [ScaleRule("learned", tokens=tokens) for tokens in (12, 3, 6)]
    # 4 + 2 * 3 of 12, 1 of 3, 3 + 1 * 3 of 6; NaN is finest, ties go to the lower region
    assert decide(layout, rules, logits) == [True, False, False, True, True, True, True, False]
    rules = [ScaleRule("learned", tokens=tokens) for tokens in (16, 4, 9)]
    assert decide(layout, rules, logits) == [False] * 5 + [False, True, False]
    both_limits = [ScaleRule("learned", (1.5,), tokens=100), *rules[1:]]
    assert decide(layout, both_limits, logits)[:4] == [True, False, False, False]


def test_what_an_image_gets_does_not_depend_on_its_companions() -> None:
    shapes = [(24, 24), (24, 24), (20, 32), (24, 24), (30, 24)]
    pixels = photos(shapes)
    layout = ScaleLayout.of(pixels.sizes, 4, (2,))
    for rule in rules_of_every_source(tokens=24):
        together = _by_image(layout, rule, pixels)
        for i, (height, width) in enumerate(shapes):
            alone = ScaleLayout.of(((height, width),), 4, (2,))
            one = type(pixels).of_list([pixels.image(i)])
            assert torch.equal(_by_image(alone, rule, one)[0], together[i]), rule


def _by_image(layout: ScaleLayout, rule: ScaleRule, pixels: object) -> list[Tensor]:
    rules = [rule] * layout.count
    stops = stops_of(native, pixels, layout, rules, PREPROCESS)  # type: ignore[arg-type]
    return list(stops.split(layout.first_coarse.diff().tolist()))


def test_random_is_a_seed_and_nothing_else() -> None:
    layout = ScaleLayout.of(((32, 32),) * 2, 4, (2,))
    pixels = photos([(32, 32)] * 2)
    first = _by_image(layout, ScaleRule("random", tokens=31, seed=1), pixels)
    assert torch.equal(first[0], first[1])
    assert int((~first[0]).sum()) == 5  # 16 + 5 * 3
    other = _by_image(layout, ScaleRule("random", tokens=31, seed=2), pixels)
    assert not torch.equal(first[0], other[0])


def test_own_rule() -> None:
    gate = ScaleGateSpec((8,), threshold=0.75)
    assert ScaleRule.own(ScaleSpec((2,), gate=gate)) == ScaleRule("learned", (0.75,))
    entropy = ScaleSpec((2, 4), source="entropy", thresholds=(5.75, 4.0))
    assert ScaleRule.own(entropy) == ScaleRule("entropy", (4.0, 5.75))  # the largest patch first
    assert ScaleRule.own(ScaleSpec((2,), source="all_fine")) == ScaleRule("all_fine")
    with pytest.raises(InvalidInput, match=r"quadtree.*needs tokens"):
        ScaleRule.own(ScaleSpec((2,), source="quadtree"))


def test_rules_that_make_no_sense_are_refused() -> None:
    for fields, message in (
        ({"source": "learned"}, "thresholds or tokens"),
        ({"source": "random"}, "needs tokens"),
        ({"source": "random", "thresholds": (1.0,), "tokens": 9}, "no thresholds"),
        ({"source": "all_fine", "tokens": 9}, "neither"),
        ({"source": "variance", "thresholds": (math.nan,)}, "must be numbers"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ScaleRule(**fields)  # type: ignore[arg-type]
    layout = ScaleLayout.of(((8, 8),), 2, (2,))
    pixels = photos([(8, 8)])
    for rule, message in (
        (ScaleRule("variance", (1.0, 2.0)), r"each of the ratios \[2\]"),
        (ScaleRule("random", tokens=3), "tokens=3, but all coarse the image has 4"),
        (ScaleRule("learned", (0.0,)), "needs a gate"),
    ):
        with pytest.raises(InvalidInput, match=message):
            _by_image(layout, rule, pixels)
    with pytest.raises(InvalidInput, match="2 rules for 1 images"):
        stops_of(native, pixels, layout, [ScaleRule("all_fine")] * 2, PREPROCESS)


def test_choice_is_of_the_stops() -> None:
    layout = ScaleLayout.of(((8, 8),), 2, (2,))
    stops = torch.tensor([True, False, True, False])
    choice = choose(native, layout, stops)
    assert isinstance(choice, ScaleChoice) and choice.stops is stops and choice.layout is layout
