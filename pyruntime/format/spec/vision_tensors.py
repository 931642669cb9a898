"""The exact list of tensors of a vision transformer's folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pyruntime.format.spec.tensors import Dtype, TensorSpec
from pyruntime.format.spec.vision import ExitSpec, VisionSpec

T2T_WIDTH = 64  # channels of the tokens-to-token layers
T2T_FEATURES = 32  # random features of their performer attention
# Of the two performer layers: unfolded channels, kernel, stride, padding. The third unfold of the
# stem has the geometry of the second.
T2T_LAYERS = ((147, 7, 4, 2), (9 * T2T_WIDTH, 3, 2, 1))
T2T_PATCH = 16
_Add = Callable[..., None]  # appends the tensors of a module: name, shape, options


def vision_tensors(spec: VisionSpec) -> list[TensorSpec]:
    """Every tensor a folder of this model holds, no more and no less, in file order.

    Matrices that turn an image into classes or decide anything (stem of a T2T-ViT, heads, gates)
    are float32; the others have the model's dtype.
    """
    found: list[TensorSpec] = []
    d, classes = spec.hidden_size, spec.num_classes
    channels = len(spec.preprocess.mean)

    def matrix(name: str, *shape: int, bias: bool = True, dtype: Dtype = spec.dtype) -> None:
        found.append(TensorSpec(f"{name}.weight", shape, "panel", dtype))
        if bias:
            vector(f"{name}.bias", *shape[:-1])

    def vector(name: str, *shape: int) -> None:
        found.append(TensorSpec(name, shape, "plain", "float32"))

    def norm(name: str, width: int = d) -> None:
        vector(f"{name}.weight", width)
        vector(f"{name}.bias", width)

    def adaptive(name: str, bottleneck: int, choices: int) -> None:
        learners = spec.width.learners if spec.width is not None else 0
        vector(f"{name}.width.weight", choices, d)
        vector(f"{name}.width.bias", choices)
        matrix(f"{name}.up", learners, bottleneck, d)
        matrix(f"{name}.down", learners, d, bottleneck, bias=False)
        if spec.width is not None and spec.width.final_bias:
            vector(f"{name}.down.bias", learners + 1, d)

    if spec.stem == "patch":
        matrix("stem", d, channels * spec.patch_size**2, bias=spec.patch_bias)
    else:
        for i, (width, *_) in enumerate(T2T_LAYERS):
            layer = f"stem.layers.{i}"
            norm(f"{layer}.norm1", width)
            matrix(f"{layer}.kqv", 3 * T2T_WIDTH, width, dtype="float32")
            vector(f"{layer}.features", T2T_FEATURES, T2T_WIDTH)
            matrix(f"{layer}.proj", T2T_WIDTH, T2T_WIDTH, dtype="float32")
            norm(f"{layer}.norm2", T2T_WIDTH)
            matrix(f"{layer}.up", T2T_WIDTH, T2T_WIDTH, dtype="float32")
            matrix(f"{layer}.down", T2T_WIDTH, T2T_WIDTH, dtype="float32")
        matrix("stem.project", d, 9 * T2T_WIDTH, dtype="float32")
    _scale_tensors(spec, matrix, vector, norm)
    if spec.prefix_tokens:
        vector("prefix", spec.prefix_tokens, d)
    rows, columns = spec.grid
    vector("positions", rows * columns, d)
    if spec.pre_norm:
        norm("pre_norm")
    acm = spec.width
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        norm(f"{attn}.norm")
        if acm is not None and acm.attention_bottleneck:
            for part in ("q", "k", "v", "o"):
                adaptive(f"{attn}.{part}", acm.attention_bottleneck, acm.learners)
        else:
            matrix(f"{attn}.qkv", 3 * d, d, bias=spec.qkv_bias)
            matrix(f"{attn}.o", d, d)
        if spec.qk_norm:
            norm(f"{attn}.q_norm", spec.head_dim)
            norm(f"{attn}.k_norm", spec.head_dim)
        norm(f"{mlp}.norm")
        if acm is not None and acm.mlp_bottleneck:
            adaptive(mlp, acm.mlp_bottleneck, acm.learners + 1)
        else:
            matrix(f"{mlp}.up", spec.mlp_size, d)
            matrix(f"{mlp}.down", d, spec.mlp_size)
    _reduction_tensors(spec, matrix, norm)
    norm("norm")
    matrix("head", classes, 2 * d if spec.pool == "class_mean" else d, dtype="float32")
    if spec.pool == "distilled":
        matrix("head_dist", classes, d, dtype="float32")
    for j, exit_ in enumerate(spec.exits):
        name = f"exits.{j}"
        if exit_.norm == "own":
            norm(f"{name}.norm")
        matrix(f"{name}.head", exit_rows(spec, exit_), exit_width(spec, exit_), dtype="float32")
        if exit_.criterion == "jei_dnn":
            vector(f"{name}.gate.weight", 4)
            vector(f"{name}.gate.bias", 1)
        if exit_.cascade:
            norm(f"{name}.cascade", classes)
        if exit_.outputs in ("geometric", "arithmetic"):
            vector(f"{name}.ensemble.weight", j + 1)
            vector(f"{name}.ensemble.bias", classes)
    return found


def _scale_tensors(spec: VisionSpec, matrix: _Add, vector: _Add, norm: _Add) -> None:
    """Of the gate (float32) and of the projections of coarser patches."""
    scales, d = spec.scales, spec.hidden_size
    if scales is None:
        return
    channels, gate = len(spec.preprocess.mean), scales.gate
    sides = [ratio * spec.patch_size for ratio in scales.ratios]
    if gate is not None:
        widths = (channels * sides[-1] ** 2, *gate.widths, 1)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            matrix(f"gate.fc{i}", after, before, dtype="float32")
        if gate.norms:
            for i, width in enumerate(gate.widths):
                norm(f"gate.norm{i}", width)
        if gate.positions:
            rows, columns = spec.grid
            regions = rows * columns // scales.ratios[-1] ** 2
            vector("gate.positions", regions, gate.widths[0])
    if scales.embed == "separate":
        for j, side in enumerate(sides):
            read = side if scales.kernel == "region" else spec.patch_size
            matrix(f"coarse.{j}", d, channels * read**2, bias=spec.patch_bias)
    elif scales.embed == "conv":
        matrix("conv", d, 4 * d)
        matrix("zero", d, d)


def _reduction_tensors(spec: VisionSpec, matrix: _Add, norm: _Add) -> None:
    """Of DynamicViT's predictors (float32): what they decide changes the number of rows."""
    reduction, d = spec.reduction, spec.hidden_size
    if reduction is None or reduction.method != "dynamicvit":
        return
    for i in range(len(reduction.blocks)):
        name = f"reduce.{i}"
        norm(f"{name}.in.norm", d)
        matrix(f"{name}.in", d, d, dtype="float32")
        for j, (rows, columns) in enumerate(((d // 2, d), (d // 4, d // 2), (2, d // 4))):
            matrix(f"{name}.out.{j}", rows, columns, dtype="float32")


def exit_rows(spec: VisionSpec, exit_: ExitSpec) -> int:
    """Rows of an exit's head: the classes, then the gate's own row where the gate is learned."""
    classes = 0 if exit_.constant_class is not None else spec.num_classes
    return classes + (exit_.criterion == "learned")


def exit_width(spec: VisionSpec, exit_: ExitSpec) -> int:
    """Channels an exit's head reads."""
    return spec.hidden_size + (spec.num_classes if exit_.cascade else 0)
