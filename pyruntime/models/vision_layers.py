"""The tensors of a vision transformer as layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.spec import ExitSpec, VisionSpec, WidthSpec
from pyruntime.format.spec.vision_tensors import T2T_LAYERS, T2T_WIDTH
from pyruntime.gates.experts.logits import Linear as Logits
from pyruntime.gates.scale_mlp import ScaleGate, region_positions
from pyruntime.gates.width import WidthGate
from pyruntime.layers.adaptive import Adaptive
from pyruntime.layers.exit_head import Ensemble, VisionExit, constant_head
from pyruntime.layers.mlp import FeedForward
from pyruntime.layers.norm import LayerNorm
from pyruntime.layers.output_rows import output_rows
from pyruntime.layers.reduce import Reduction, reductions_of
from pyruntime.layers.residual import Linear
from pyruntime.layers.scale_embed import ScaleEmbed
from pyruntime.layers.t2t import TokenPerformer, TokensToTokens
from pyruntime.layers.vision_block import (
    AdaptiveProjections,
    Branch,
    Dense,
    DenseMLP,
    DenseProjections,
    Projections,
    VisionBlock,
)
from pyruntime.ops.exit import ExitHead, ExitRule
from pyruntime.ops.weight import Weight

# Of norms whose code takes torch's default, whatever the backbone's: of logits in the ZTW code, of
# the predictors of DynamicViT.
_CASCADE_EPS = _PREDICTOR_EPS = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class VisionLayers:
    """What a vision transformer runs.

    Attributes:
        prefix: float32 [P, D], or None.
        positions: float32 [N, D], of the patches.
        scale_gate: which regions stay coarse, or None.
        reductions: of the blocks that rows leave in.
        norm: before the heads.
        heads: of the class row or the mean, then of the distillation row if there is one.
    """

    stem: ScaleEmbed | TokensToTokens
    scale_gate: ScaleGate | None
    prefix: Tensor | None
    positions: Tensor
    pre_norm: LayerNorm | None
    blocks: tuple[VisionBlock, ...]
    reductions: Mapping[int, Reduction]
    norm: LayerNorm
    heads: tuple[Linear, ...]
    exits: tuple[VisionExit, ...]

    @staticmethod
    def of(spec: VisionSpec, tensors: Mapping[str, Tensor | Weight]) -> VisionLayers:
        """From the tensors of a folder.

        Raises:
            FormatError: a tensor is missing or of the other kind.
        """
        read = _Reader(spec, tensors)
        heads = ("head", "head_dist") if spec.pool == "distilled" else ("head",)
        return VisionLayers(
            stem=read.stem(),
            scale_gate=read.scale_gate(),
            prefix=read.vector("prefix") if spec.prefix_tokens else None,
            positions=read.vector("positions"),
            pre_norm=read.norm("pre_norm") if spec.pre_norm else None,
            blocks=tuple(read.block(i) for i in range(spec.num_layers)),
            reductions=reductions_of(spec, partial(read.norm, eps=_PREDICTOR_EPS), read.linear),
            norm=read.norm("norm"),
            heads=tuple(read.linear(name) for name in heads),
            exits=tuple(read.exit(j, exit_) for j, exit_ in enumerate(spec.exits)),
        )


class _Reader:
    def __init__(self, spec: VisionSpec, tensors: Mapping[str, Tensor | Weight]) -> None:
        self._spec = spec
        self._tensors = tensors

    def vector(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if isinstance(tensor, Weight):
            raise FormatError(f"{name}: expected a plain tensor, found panels")
        return tensor

    def linear(self, name: str) -> Linear:
        """With its bias, where there is one."""
        weight = self._tensor(f"{name}.weight")
        if not isinstance(weight, Weight):
            raise FormatError(f"{name}.weight: expected panels, found a plain tensor")
        bias = f"{name}.bias"
        return Linear(weight, self.vector(bias) if bias in self._tensors else None)

    def norm(self, name: str, eps: float | None = None) -> LayerNorm:
        return LayerNorm(
            self.vector(f"{name}.weight"),
            self.vector(f"{name}.bias"),
            self._spec.norm_eps if eps is None else eps,
        )

    def _tensor(self, name: str) -> Tensor | Weight:
        if name not in self._tensors:
            raise FormatError(f"{name}: missing")
        return self._tensors[name]

    def stem(self) -> ScaleEmbed | TokensToTokens:
        if self._spec.stem == "patch":
            return ScaleEmbed.of(self._spec, self.linear, self.vector("positions"))
        unfolds = tuple(geometry for _, *geometry in T2T_LAYERS)
        return TokensToTokens(
            layers=tuple(self._performer(f"stem.layers.{i}") for i in range(len(T2T_LAYERS))),
            unfolds=tuple((size, step, pad) for size, step, pad in (*unfolds, unfolds[-1])),
            project=self.linear("stem.project"),
        )

    def scale_gate(self) -> ScaleGate | None:
        scales = self._spec.scales
        if scales is None or scales.gate is None:
            return None
        gate = scales.gate
        layers = (self.linear(f"gate.fc{i}") for i in range(len(gate.widths) + 1))
        names = (f"gate.norm{i}" for i in range(len(gate.widths) if gate.norms else 0))
        positions = None
        if gate.positions:
            positions = region_positions(self._spec, self.vector("gate.positions"))
        return ScaleGate(
            layers=tuple(Logits(*layer) for layer in layers),
            norms=tuple((self.vector(f"{n}.weight"), self.vector(f"{n}.bias")) for n in names),
            positions=positions,
            size=self._spec.patch_size * scales.ratios[-1],
        )

    def _performer(self, name: str) -> TokenPerformer:
        kqv = self.linear(f"{name}.kqv")
        return TokenPerformer(
            norm1=self.norm(f"{name}.norm1"),
            kq=output_rows(kqv, 0, 2 * T2T_WIDTH),
            v=output_rows(kqv, 2 * T2T_WIDTH, 3 * T2T_WIDTH),
            features=Weight.pack(self.vector(f"{name}.features")),
            proj=self.linear(f"{name}.proj"),
            norm2=self.norm(f"{name}.norm2"),
            up=self.linear(f"{name}.up"),
            down=self.linear(f"{name}.down"),
        )

    def block(self, index: int) -> VisionBlock:
        spec = self._spec
        attn, mlp = f"layers.{index}.attn", f"layers.{index}.mlp"
        width = spec.width
        projections: Projections
        output: Branch
        network: Branch
        if width is not None and width.attention_bottleneck:
            q, k, v, output = (
                self._adaptive(f"{attn}.{part}", width, 1, "none") for part in ("q", "k", "v", "o")
            )
            projections = AdaptiveProjections(q, k, v)
        else:
            projections = DenseProjections.of(self.linear(f"{attn}.qkv"))
            output = Dense(self.linear(f"{attn}.o"))
        if width is not None and width.mlp_bottleneck:
            network = self._adaptive(mlp, width, 0, "gelu")
        else:
            network = DenseMLP(self.linear(f"{mlp}.up"), self.linear(f"{mlp}.down"))
        return VisionBlock(
            norm1=self.norm(f"{attn}.norm"),
            projections=projections,
            query_norm=self.norm(f"{attn}.q_norm") if spec.qk_norm else None,
            key_norm=self.norm(f"{attn}.k_norm") if spec.qk_norm else None,
            heads=spec.num_heads,
            scale=spec.head_dim**-0.5,
            output=output,
            norm2=self.norm(f"{mlp}.norm"),
            mlp=network,
            proportional=spec.reduction is not None and spec.reduction.proportional,
        )

    def _adaptive(
        self, name: str, width: WidthSpec, least: int, epilogue: Literal["none", "gelu"]
    ) -> Adaptive:
        logits = Logits(
            Weight.pack(self.vector(f"{name}.width.weight")), self.vector(f"{name}.width.bias")
        )
        up, down = self.linear(f"{name}.up"), self.linear(f"{name}.down")
        nothing = None
        if down.bias is not None:
            # Every token adds slice 0, and slice i + 1 with learner i (acm.py, forward_gated).
            nothing, learners = down.bias[0], down.bias[1:].clone()
            learners[0] += nothing
            down = Linear(down.weight, learners)
        gate = WidthGate(logits, width.learners, least, width.rule)
        return Adaptive(gate, FeedForward(up, down, epilogue), nothing)

    def exit(self, number: int, exit_: ExitSpec) -> VisionExit:
        spec, name = self._spec, f"exits.{number}"
        ensemble = None
        if exit_.outputs in ("geometric", "arithmetic"):
            if exit_.criterion == "learned":
                raise FormatError(f"exit {number}: an ensemble has no learned score")
            kind: Literal["geometric", "arithmetic"] = (
                "geometric" if exit_.outputs == "geometric" else "arithmetic"
            )
            ensemble = Ensemble(
                kind,
                self.vector(f"{name}.ensemble.weight"),
                self.vector(f"{name}.ensemble.bias"),
            )
        norm = None
        if exit_.norm != "none":
            norm = self.norm("norm" if exit_.norm == "shared" else f"{name}.norm")
        linear = self.linear(f"{name}.head")
        weight, bias = linear
        constant = None
        if exit_.constant_class is not None:
            weight, bias = constant_head(linear)
            constant = exit_.constant_class, spec.num_classes
        inside = None if exit_.cascade else norm  # a cascade's norm leaves the logits alone
        return VisionExit(
            head=ExitHead(
                weight,
                bias,
                None if inside is None else inside.weight,
                None if inside is None else inside.bias,
                spec.norm_eps,
            ),
            rule=ExitRule(
                exit_.criterion, exit_.strict, self._gate(name, exit_), exit_.composition
            ),
            mean_from=spec.prefix_tokens if exit_.pool == "mean" else None,
            by_area=spec.scales is not None and spec.scales.pool_weight == "area",
            cascade=self.norm(f"{name}.cascade", _CASCADE_EPS) if exit_.cascade else None,
            norm=norm if exit_.cascade else None,
            sums=exit_.outputs == "sum",
            ensemble=ensemble,
            constant=constant,
        )

    def _gate(self, name: str, exit_: ExitSpec) -> tuple[float, float, float, float, float] | None:
        if exit_.criterion != "jei_dnn":
            return None
        first, second, third, fourth = self.vector(f"{name}.gate.weight").tolist()
        bias = float(self.vector(f"{name}.gate.bias"))
        return first, second, third, fourth, bias
