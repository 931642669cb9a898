"""Vision transformers: backbone, early exits and adaptive width as data of one architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError
from pyruntime.format.spec.reduction import ReductionSpec
from pyruntime.format.spec.scales import ScaleSpec

Criterion = Literal[
    "jei_dnn", "max_prob", "max_logit", "entropy", "margin", "patience", "learned"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What the backbone was trained to see.

    Attributes:
        mean, std: of pixels in [0, 1], one number per channel.
        interpolation: of the resize.
        crop: share of the resized image that the centre crop keeps: the shorter side is resized to
            floor(side / crop) first, as in timm.
        squash: ignore the aspect ratio.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop: float = 1.0
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise FormatError(f"mean {self.mean} and std {self.std} need a number per channel each")
        if not all(value > 0 for value in self.std):
            raise FormatError(f"std must be positive, is {self.std}")
        if not 0 < self.crop <= 1:
            raise FormatError(f"crop must be in (0, 1], is {self.crop}")


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """One early exit: a head on the rows of a block, and the rule by which an image leaves there.

    The rule compares a confidence (larger: sooner) with a threshold. See `pyruntime.ops.ExitRule`
    for each criterion's confidence; that of ``entropy`` is minus the entropy, so the official
    "entropy < t" is ``confidence > -t``.

    Attributes:
        after_block: the block whose output the head reads, counted from 0.
        criterion: what the confidence is.
        strict: leaves iff confidence > threshold; otherwise iff confidence >= threshold.
        threshold: the checkpoint's own; None: never.
        norm: the layer norm of the head: the backbone's final one, its own, or none.
        pool: the head reads the class row, or the mean of the patch rows.
        composition: of ``jei_dnn`` gates: a gate's output is a share of the total mass, or an
            independent probability.
        tau: of ``jei_dnn``: leaves where mass + gate / tau reaches the threshold; 0.5 in the paper,
            other values are an extension.
        outputs: the head's logits alone, added to those of the exit before (BoostedNet), or a
            weighted ensemble of all exits so far (ZTW).
        cascade: the head also reads the layer-normalised logits of the exit before (ZTW).
        constant_class: whoever leaves here is of this class (Gated Compression); the head has the
            gate's row alone.
    """

    after_block: int
    criterion: Criterion
    threshold: float | None
    strict: bool = False
    norm: Literal["shared", "own", "none"] = "shared"
    pool: Literal["class", "mean"] = "class"
    composition: Literal["mass_sum", "independent"] = "mass_sum"
    tau: float = 0.5
    outputs: Literal["own", "sum", "geometric", "arithmetic"] = "own"
    cascade: bool = False
    constant_class: int | None = None

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise FormatError(f"exit: tau must be positive, is {self.tau}")
        if self.constant_class is not None and self.criterion != "learned":
            raise FormatError("exit: only a learned gate can stand for a constant class")


@dataclass(frozen=True, slots=True)
class WidthSpec:
    """Adaptive Computation Modules (arXiv 2312.10193): tokens run a prefix of `learners` learners.

    Attributes:
        learners: N of every module.
        mlp_bottleneck: hidden units of one learner of a feed-forward module; 0: it is dense.
        attention_bottleneck: of one learner of each of q, k, v and the output projection; 0: dense.
        final_bias: learners have output biases too.
        rule: how many learners a choice of k runs: ``paper`` k; ``kminus`` min(k, N - 1), which
            approximates the released code for any batch; ``official``: the released loop, in which
            tokens at the batch's largest k run k - 1 (depends on the batch).
    """

    learners: int
    mlp_bottleneck: int = 0
    attention_bottleneck: int = 0
    final_bias: bool = False
    rule: Literal["paper", "official", "kminus"] = "paper"

    def __post_init__(self) -> None:
        if self.learners < 1:
            raise FormatError(f"width: learners must be at least 1, is {self.learners}")
        if self.mlp_bottleneck < 0 or self.attention_bottleneck < 0:
            raise FormatError("width: a bottleneck must be 0 or more")


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """A vision transformer (ViT, DeiT, DINOv2 backbones, T2T-ViT) with its exits.

    Layer scale is folded into the matrices at conversion, and so are the positions of prefix rows
    into `prefix`.

    Attributes:
        image_size: height, width.
        stem: ``patch``: a convolution with stride `patch_size`; ``t2t``: the tokens-to-token
            stem with performer layers (arXiv 2101.11986), whose patches are 16 pixels wide.
        prefix_tokens: rows before the patches: class token, distillation token, registers.
        pool: logits come from the class row, from the mean of the patch rows, from the two side by
            side (DINOv2), or are the mean of the class row's and the distillation row's own heads.
        norm_after_pool: the final norm follows the pooling (timm's fc_norm).
        pre_norm: a layer norm before the first block.
        activation: GELU in its error-function form.
        labels: names of the classes, or empty.
        position_resize: how `positions` come to another image size: bicubic with antialias (timm),
            or without (transformers, EViT).
        scales: patches of several sizes, or None.
        reduction: rows that leave inside the network, or None.
    """

    source_family: str
    image_size: tuple[int, ...]
    stem: Literal["patch", "t2t"]
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_classes: int
    norm_eps: float
    prefix_tokens: int
    preprocess: Preprocess
    pool: Literal["class", "mean", "class_mean", "distilled"] = "class"
    norm_after_pool: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    activation: Literal["gelu"] = "gelu"
    exits: tuple[ExitSpec, ...] = ()
    width: WidthSpec | None = None
    labels: tuple[str, ...] = ()
    dtype: Literal["bfloat16", "float32"] = "float32"
    position_resize: Literal["bicubic_aa", "bicubic"] = "bicubic_aa"
    scales: ScaleSpec | None = None
    reduction: ReductionSpec | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, is {getattr(self, name)}"
            for name in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_size",
                         "num_classes")
            if getattr(self, name) < 1
        ]  # fmt: skip
        if not problems and self.hidden_size % self.num_heads:
            problems.append(f"{self.num_heads} heads do not divide {self.hidden_size} channels")
        if len(self.image_size) != 2 or not all(side > 0 for side in self.image_size):
            problems.append(f"image_size must be a height and a width, is {self.image_size}")
        elif not problems and any(side % self.patch_size for side in self.image_size):
            problems.append(f"patches of {self.patch_size} do not tile {self.image_size}")
        least = {"class": 1, "mean": 0, "class_mean": 1, "distilled": 2}[self.pool]
        if self.prefix_tokens < least:
            problems.append(f"pool {self.pool!r} needs {least} prefix tokens")
        places = [spec.after_block for spec in self.exits]
        if sorted(set(places)) != places:
            problems.append(f"exits must rise from block to block, are after {places}")
        if places and not 0 <= places[0] <= places[-1] < self.num_layers - 1:
            problems.append(
                f"exits after {places} lie outside of blocks 0 to {self.num_layers - 2}"
            )
        for number, spec in enumerate(self.exits):
            if spec.pool == "class" and self.prefix_tokens < 1:
                problems.append(f"exit {number} reads a class row, and there is none")
            if spec.norm == "shared" and self.norm_after_pool and spec.pool == "class":
                problems.append(f"exit {number} shares a norm that follows the pooling")
            if spec.cascade and number == 0:
                problems.append("exit 0 has no exit before it to read")
            other = spec.constant_class
            if other is not None and not 0 <= other < self.num_classes:
                problems.append(f"exit {number}: class {other} of {self.num_classes}")
        if self.labels and len(self.labels) != self.num_classes:
            problems.append(f"{len(self.labels)} labels for {self.num_classes} classes")
        if not problems:
            problems += self._scale_problems()
        if problems:
            raise FormatError("architecture: " + "; ".join(problems))

    def _scale_problems(self) -> list[str]:
        problems = []
        scales, reduction = self.scales, self.reduction
        if self.stem != "patch" and (scales is not None or reduction is not None):
            problems.append("mixed scales and token reduction need a stem of patches")
        if scales is not None:
            side = self.patch_size * scales.ratios[-1]
            if any(size % side for size in self.image_size):
                problems.append(f"coarse patches of {side} do not tile {self.image_size}")
            if self.width is not None and self.width.rule == "official":
                problems.append("mixed scales and a width rule that looks at the whole batch")
            if reduction is not None:
                problems.append("mixed scales together with token reduction are not implemented")
        if reduction is not None:
            if reduction.blocks[-1] >= self.num_layers:
                problems.append(f"reduction in block {reduction.blocks[-1]} of {self.num_layers}")
            if self.width is not None:
                problems.append("token reduction together with adaptive width is not implemented")
            if self.prefix_tokens < 1 and reduction.method != "tome":
                problems.append(f"{reduction.method} needs a class row")
        return problems

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of an image."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """Rows of one image: prefix and patches."""
        rows, columns = self.grid
        return self.prefix_tokens + rows * columns
