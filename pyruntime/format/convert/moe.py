"""Mixture-of-experts layers in checkpoints: how they are configured, and how they are spelled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, NamedTuple

from pyruntime.errors import FormatError
from pyruntime.format.convert import llama
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.derive import Derivation
from pyruntime.format.convert.family import Modules
from pyruntime.format.spec import DecoderSpec, ExpertSpec, RouterSpec

_EXPERT = "model.layers.{i}.mlp.experts.{e}"
MODULES: Modules = MappingProxyType({
    **llama.MODULES,
    "layers.{i}.mlp.router": ("model.layers.{i}.mlp.gate",),
    "layers.{i}.mlp.experts.gate_up": (f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"),
    "layers.{i}.mlp.experts.down": (f"{_EXPERT}.down_proj",),
})  # fmt: skip


class Spelling(NamedTuple):
    """Where a layer keeps its experts: names inside the layer; one tensor for all without {e}."""

    gate: str
    up: str
    down: str


_UP, _DOWN = 1, 2  # places in a Spelling
SINGLE = Spelling(*(f"mlp.experts.{{e}}.{m}_proj.weight" for m in ("gate", "up", "down")))
MIXTRAL = Spelling(*(f"block_sparse_moe.experts.{{e}}.{m}.weight" for m in ("w1", "w3", "w2")))
# What transformers 5 holds in memory: [E, 2I, H], gate rows then up rows, and [E, H, I].
FUSED = Spelling("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def read_experts(
    config: Config,
    router: RouterSpec,
    *,
    top_k: int,
    experts: int,
    layers: Iterable[int] | None = None,
    width: tuple[str, ...] = ("intermediate_size", "moe_intermediate_size"),
    **fields: Any,
) -> ExpertSpec | None:
    """The experts that config.json describes; problems are left in `config`.

    `top_k` and `experts` are the family's defaults, `layers` those that have experts (None: all),
    `width` the keys of an expert's width, `fields` those of ExpertSpec.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    all_layers = range(config.integer("num_hidden_layers"))
    values: dict[str, Any] = {
        "num_experts": config.one_of(names, experts),
        "experts_per_token": config.one_of(("num_experts_per_tok", "moe_top_k", "moe_k"), top_k),
        "intermediate_size": config.integer(next((k for k in width if k in config.data), width[0])),
        "layers": tuple(all_layers if layers is None else layers),
        "router": router,
    }
    try:
        return ExpertSpec(**{**values, **fields})
    except FormatError as error:
        config.problems.append(str(error))
        return None


def view(
    weights: Checkpoint, spec: DecoderSpec, *spellings: Spelling, routers: tuple[str, ...] = ()
) -> Checkpoint:
    """`weights` with every expert as three matrices of its own, and the router, as MODULES names.

    The first of `spellings` and `routers` is the family's own: what is missing is called so. What
    MODULES names, and what transformers 5 holds in memory, is always understood.
    """
    experts = spec.experts
    if experts is None:
        return weights
    made = Derivation(weights)
    count, inner, d = experts.num_experts, experts.intermediate_size, spec.hidden_size
    spellings = tuple(dict.fromkeys((*spellings, SINGLE, FUSED)))
    routers = tuple(dict.fromkeys((*routers, "mlp.gate.weight")))
    for i in experts.layers:
        layer = f"model.layers.{i}."
        router = made.pick([layer + name for name in routers], layer + routers[0])
        made.alias(f"{layer}mlp.gate.weight", router, (count, d))
        usual = _usual(weights, spellings, layer)
        for e, part in itertools.product(range(count), range(3)):
            names = {_name(spelling, layer, e, part): spelling for spelling in spellings}
            ours = _name(SINGLE, layer, e, part)
            theirs = made.pick(names, _name(usual, layer, e, part))
            shape = (d, inner) if part == _DOWN else (inner, d)
            if "{e}" in names[theirs][part]:
                made.alias(ours, theirs, shape)
                continue
            rows = d if part == _DOWN else 2 * inner
            first = e * rows + (inner if part == _UP else 0)
            made.part(ours, shape, theirs, (count, rows, shape[1]), first)
    return made.result()


def _name(spelling: Spelling, layer: str, e: int, part: int) -> str:
    return layer + spelling[part].replace("{e}", str(e))


def _usual(weights: Checkpoint, spellings: tuple[Spelling, ...], layer: str) -> Spelling:
    """The spelling of a layer, told by its first expert."""
    for spelling in spellings:
        if any(_name(spelling, layer, 0, part) in weights.entries for part in range(3)):
            return spelling
    return spellings[0]
