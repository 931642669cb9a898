"""torchvision's vit_b_16, plain or with Adaptive Computation Modules (arXiv 2312.10193)."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import torch
from torch import Tensor

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.derive import Derivation, Rows, transposed
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.vision import Found, Names, read_backbone
from pyruntime.format.spec import VisionSpec, WidthSpec

MARK = "conv_proj.weight"
Rule = Literal["paper", "official", "kminus"]
_LAYER = "encoder.layers.encoder_layer_{i}"
_ATTENTION = f"{_LAYER}.self_attention"
_NAMES = Names(
    tokens=("class_token",), positions="encoder.pos_embedding", patch="conv_proj", pre_norm="-",
    attn_norm=f"{_LAYER}.ln_1", qkv=(f"{_ATTENTION}.in_proj",), q_norm="-", k_norm="-",
    o=f"{_ATTENTION}.out_proj", mlp_norm=f"{_LAYER}.ln_2", up=f"{_LAYER}.mlp.0",
    down=f"{_LAYER}.mlp.3", scales=("-", "-"), norm="encoder.ln", fc_norm="-", head="heads.head",
    head_dist="-", drop=(),
)  # fmt: skip
_GATE = re.compile(r"\.gating_network\.net\.(\d+)\.weight$")


def read(weights: Checkpoint, given: Given, rule: Rule) -> tuple[Checkpoint, Found]:
    """A model under torchvision's names, and its checkpoint with fused projections renamed.

    Raises:
        UnsupportedModel: adaptive modules in some of the projections only.
        ConversionError: see `read_backbone`.
    """
    names = _NAMES
    if f"{_first(_ATTENTION)}.q_proj.weight" in weights.entries:
        parts = tuple(f"{_ATTENTION}.{part}_proj" for part in "qkv")
        names = dataclasses.replace(names, qkv=parts, o=f"{_ATTENTION}.o_proj")
    if f"{_first(_LAYER)}.mlp.linear_1.weight" in weights.entries:  # torchvision before 0.13
        up, down = (f"{_LAYER}.mlp.linear_{n}" for n in (1, 2))
        names = dataclasses.replace(names, up=up, down=down)
    weights = _fused(weights)
    width = _width(weights, rule)
    mlp = width.learners * width.mlp_bottleneck if width is not None else 0
    found = read_backbone(
        weights, names, given, "torchvision_vit" if width is None else "acm_vit", norm_eps=1e-6,
        pool="class", mlp_size=mlp or None,
    )  # fmt: skip
    if width is not None:
        found.fields["width"] = width
        found.notes.append(
            f"adaptive width by the rule {rule!r}; the checkpoint does not say the activations: "
            "GELU in the feed-forward part and none in the projections, as published"
        )
    return weights, found


def add_width(made: Assembly, spec: VisionSpec) -> None:
    """The learners and gates of every layer."""
    width = spec.width
    if width is None:
        return
    upright = _Upright(made.weights)
    for i in range(spec.num_layers):
        layer = _LAYER.replace("{i}", str(i))
        if width.attention_bottleneck:
            for part in "qkvo":
                _add_module(made, spec, width, upright, f"layers.{i}.attn.{part}",
                            f"{layer}.self_attention.{part}_proj", width.attention_bottleneck,
                            width.learners)  # fmt: skip
        if width.mlp_bottleneck:
            _add_module(made, spec, width, upright, f"layers.{i}.mlp", f"{layer}.mlp",
                        width.mlp_bottleneck, width.learners + 1)  # fmt: skip


def _first(name: str) -> str:
    return name.replace("{i}", "0")


def _fused(weights: Checkpoint) -> Checkpoint:
    """in_proj_weight and in_proj_bias as the weight and bias of a module in_proj."""
    made = Derivation(weights)
    for name, entry in weights.entries.items():
        if name.endswith((".in_proj_weight", ".in_proj_bias")):
            start, _, suffix = name.rpartition("_")
            made.alias(f"{start}.{suffix}", name, entry.shape)
    return made.result()


def _width(weights: Checkpoint, rule: Rule) -> WidthSpec | None:
    """What the first layer's modules tell; None where nothing is adaptive."""
    entries = weights.entries
    layer = _first(_LAYER)
    adaptive = {part: f"{layer}.self_attention.{part}_proj" for part in "qkvo"}
    some = [part for part, name in adaptive.items() if f"{name}.w1" in entries]
    if some and len(some) < 4:
        raise UnsupportedModel(
            f"{weights.paths[0]}: adaptive modules in {', '.join(some)} alone of q, k, v, o are "
            "not implemented"
        )
    mlp = f"{layer}.mlp"
    module, least = (mlp, 0) if f"{mlp}.w1" in entries else (adaptive["q"], 1)
    if f"{module}.w1" not in entries:
        return None
    layers = _gate_layers(weights, module)
    needed = [f"{layers[-1]}.weight", f"{module}.w1"]
    if any(name not in entries or len(entries[name].shape) != 2 for name in needed):
        raise ConversionError(f"{weights.paths[0]}: missing or misshapen {' or '.join(needed)}")
    learners = entries[needed[0]].shape[0] - 1 + least

    def bottleneck(name: str) -> int:
        entry = entries.get(f"{name}.w1")
        columns = entry.shape[-1] if entry is not None and entry.shape else 0
        if learners < 1 or columns % learners:
            raise ConversionError(
                f"{weights.paths[0]}: misshapen {name}.w1, "
                f"{columns} columns for {learners} learners"
            )
        return columns // learners

    return WidthSpec(
        learners, bottleneck(mlp), bottleneck(adaptive["q"]), f"{module}.b2" in entries, rule
    )


def _gate_layers(weights: Checkpoint, module: str) -> list[str]:
    """The linear layers of a gate, first to last."""
    gate = f"{module}.gating_network"
    if f"{gate}.fc.weight" in weights.entries:
        return [f"{gate}.fc"]
    start = f"{gate}.net."
    numbers = (_GATE.search(name) for name in weights.entries if name.startswith(start))
    return [f"{start}{n}" for n in sorted(int(match[1]) for match in numbers if match)] or [
        f"{start}0"
    ]


def _add_module(
    made: Assembly, spec: VisionSpec, width: WidthSpec, upright: _Upright, ours: str, theirs: str,
    bottleneck: int, choices: int,
) -> None:  # fmt: skip
    weights, d, n = made.weights, spec.hidden_size, width.learners
    rows = n * bottleneck
    _add_gate(made, ours, theirs, d, choices)
    w1, b1, w2, b2 = (f"{theirs}.{name}" for name in ("w1", "b1", "w2", "b2"))
    made.computed(
        f"{ours}.up.weight", (rows, d), {w1: Need((d, rows))},
        lambda a, b: upright.read(w1, d)[a:b],
    )  # fmt: skip
    made.computed(
        f"{ours}.up.bias", (n, bottleneck), {b1: Need((rows,))}, _matrix(weights, b1, bottleneck)
    )
    made.computed(
        f"{ours}.down.weight", (n * d, bottleneck), {w2: Need((rows, d))},
        transposed(weights, w2, bottleneck, bottleneck, d),
    )  # fmt: skip
    if width.final_bias:
        made.computed(
            f"{ours}.down.bias", (n + 1, d), {b2: Need(((n + 1) * d,))}, _matrix(weights, b2, d)
        )
    made.drop(f"{theirs}.gating_network.gs_tau")  # only training draws with it


def _matrix(weights: Checkpoint, name: str, columns: int) -> Rows:
    """A vector read as rows of `columns` numbers."""
    return lambda a, b: weights.rows(name, a * columns, b * columns).reshape(b - a, columns)


def _add_gate(made: Assembly, ours: str, theirs: str, d: int, choices: int) -> None:
    """The gate's linear layers, which have nothing between them, as one."""
    weights = made.weights
    layers = _gate_layers(weights, theirs)
    sizes = [d]
    for layer in layers[:-1]:
        entry = weights.entries.get(f"{layer}.weight")
        sizes.append(entry.shape[0] if entry is not None and entry.shape else 1)
    sizes.append(choices)
    needs: dict[str, Need] = {}
    for layer, columns, rows in zip(layers, sizes, sizes[1:], strict=False):
        needs |= {f"{layer}.weight": Need((rows, columns)), f"{layer}.bias": Need((rows,))}

    def collapsed() -> tuple[Tensor, Tensor]:
        matrix = torch.eye(d, dtype=torch.float64)
        bias = torch.zeros(d, dtype=torch.float64)
        for layer in layers:
            rows = weights.entries[f"{layer}.weight"].shape[0]
            weight = weights.rows(f"{layer}.weight", 0, rows).double()
            matrix = weight @ matrix
            bias = weight @ bias + weights.rows(f"{layer}.bias", 0, rows).double()
        return matrix.float(), bias.float()

    made.computed(f"{ours}.width.weight", (choices, d), needs, lambda a, b: collapsed()[0][a:b])
    made.computed(f"{ours}.width.bias", (choices,), needs, lambda a, b: collapsed()[1][a:b])


class _Upright:
    """The last matrix that was read, transposed: its rows cannot be read alone."""

    def __init__(self, weights: Checkpoint) -> None:
        self._weights = weights
        self._name = ""
        self._matrix: Tensor | None = None

    def read(self, name: str, rows: int) -> Tensor:
        """The tensor `name` of `rows` rows, transposed."""
        if self._matrix is None or self._name != name:
            self._matrix = None  # before the next one is read: one at a time
            self._matrix = self._weights.rows(name, 0, rows).t().contiguous()
            self._name = name
        return self._matrix
