"""gpt-oss: experts with biases, gate and up interleaved; attention sinks; every other layer local.

Experts are stored in MXFP4, or (fine-tuned models) in bfloat16 and then transposed.
"""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from pyruntime.format.convert import moe, mxfp4
from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.derive import Derivation, Rows
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.spec import DecoderSpec, ExpertSpec, RouterSpec

ARCHITECTURE = "GptOssForCausalLM"
MODULES: Modules = MappingProxyType({
    **moe.MODULES,
    "layers.{i}.attn": ("model.layers.{i}.self_attn",),
    "layers.{i}.mlp.router": ("model.layers.{i}.mlp.router",),
})  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    given = config.data.get("quantization_config")
    if given is not None and not (isinstance(given, dict) and given.get("quant_method") == "mxfp4"):
        config.problems.append(f"quantization_config {given!r} is not implemented (mxfp4 is)")
    elif given is not None:
        config.notes.append("4-bit experts are dequantised; --quantize int8 stores 8 bits")
    if config.data.get("rope_parameters") is None and config.data.get("rope_scaling") is None:
        config.data["rope_parameters"] = dict(_YARN)
    experts = moe.read_experts(
        config, RouterSpec(over_chosen=True, bias=True, round_weights=True),
        top_k=4, experts=128, bias=True, activation="swiglu_oai",
        alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0),
    )  # fmt: skip
    bias = config.flag("attention_bias", True)
    layers = _local_layers(config)
    spec = config.decoder(
        "gpt_oss", qkv_bias=bias, o_bias=bias, theta=150000.0, eps=1e-5,
        full_attention=False, quantized=True, sinks=True, experts=experts,
        head_dim=config.integer("head_dim", 64),
        window=config.integer("sliding_window", 128) if layers else None, window_layers=layers,
    )  # fmt: skip
    return Reading(spec, MODULES, lambda weights: _view(weights, spec), tuple(config.notes))


def _local_layers(config: Config) -> tuple[int, ...]:
    count = config.integer("num_hidden_layers")
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    kinds = config.data.get("layer_types") or usual
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(k not in known for k in kinds):
        config.problems.append(
            f"layer_types must be {count} times {' or '.join(known)}, is {kinds!r}"
        )
        return ()
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def _view(weights: Checkpoint, spec: DecoderSpec) -> Checkpoint:
    experts = spec.experts
    if experts is None:
        return weights
    made = Derivation(weights)
    whole = _Expert(weights)
    for i in experts.layers:
        layer = f"model.layers.{i}.mlp.experts"
        for e in range(experts.num_experts):
            _add_expert(made, spec, experts, layer, e, whole)
    return made.result()


def _add_expert(
    made: Derivation, spec: DecoderSpec, experts: ExpertSpec, layer: str, e: int, whole: _Expert
) -> None:
    count, inner, d = experts.num_experts, experts.intermediate_size, spec.hidden_size
    weights = made.weights
    for name, rows, columns, parts in (
        ("gate_up_proj", 2 * inner, d, ("gate_proj", "up_proj")),
        ("down_proj", d, inner, ("down_proj",)),
    ):
        theirs, step = f"{layer}.{name}", len(parts)
        packed = f"{theirs}_blocks" in weights.entries
        needs = mxfp4.needs(theirs, count, rows, columns)
        if not packed:
            needs = {theirs: Need((count, columns, rows))}
        for offset, part in enumerate(parts):
            ours, shape = f"{layer}.{e}.{part}", (rows // step, columns)
            if packed:
                read = _packed(weights, theirs, columns, e * rows + offset, step)
            else:
                read = _upright(whole, theirs, columns, e, offset, step)
            made.add(f"{ours}.weight", shape, needs, read, "bfloat16" if packed else None)
            bias, read = f"{theirs}_bias", _bias(weights, f"{theirs}_bias", e, offset, step)
            made.add(f"{ours}.bias", shape[:1], {bias: Need((count, rows))}, read)


def _packed(weights: Checkpoint, name: str, columns: int, first: int, step: int) -> Rows:
    return lambda a, b: mxfp4.read(
        weights, name, columns, first + a * step, first + (b - 1) * step + 1, step
    )


def _upright(whole: _Expert, name: str, columns: int, e: int, offset: int, step: int) -> Rows:
    return lambda a, b: whole.read(name, e, columns)[offset::step][a:b]


def _bias(weights: Checkpoint, name: str, e: int, offset: int, step: int) -> Rows:
    return lambda a, b: weights.rows(name, e, e + 1)[0, offset::step][a:b]


class _Expert:
    """The last expert that was read, upright: a transposed matrix has no rows to read alone."""

    def __init__(self, weights: Checkpoint) -> None:
        self._weights = weights
        self._key: tuple[str, int] | None = None
        self._matrix: Tensor | None = None

    def read(self, name: str, e: int, columns: int) -> Tensor:
        """Expert `e` of the tensor `name` [E, columns, rows], as [rows, columns]."""
        if self._matrix is None or self._key != (name, e):
            self._matrix = None  # before the next one is read: one at a time
            rows = self._weights.rows(name, e * columns, (e + 1) * columns)
            self._matrix = rows.t().contiguous()
            self._key = (name, e)
        return self._matrix
