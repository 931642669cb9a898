"""The encoder of a Switch Transformer: every token sees its whole sequence and runs one expert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.spec import EncoderSpec
from pyruntime.gates.experts import Capacity, CappedGate, Gate, constructor_of
from pyruntime.gates.experts import Linear as RouterMatrix
from pyruntime.layers.mlp import FeedForward
from pyruntime.layers.norm import Norm
from pyruntime.layers.residual import Linear
from pyruntime.ops.backend import backend
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan


class _Layer(NamedTuple):
    attention_norm: Norm
    q: Linear
    kv: Linear
    o: Linear
    network_norm: Norm
    gate: Gate | None
    network: FeedForward


class Encoder:
    """A pre-norm encoder with relative position biases.

    Args:
        spec: the architecture.
        tensors: those `pyruntime.format.spec.encoder_tensors` lists; read, never written.
        backend_name: forces an implementation of the ops.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        tensors: Mapping[str, Tensor | Weight],
        backend_name: str | None = None,
    ) -> None:
        self.spec = spec
        self.ops: ModuleType = backend("cpu", backend_name)
        self._tensors = tensors
        self._embed = self._vector("embed.weight")
        self._bias = self._vector("position_bias.weight")
        self._norm = self._norm_of("norm")
        self._layers = [self._layer(i) for i in range(spec.num_layers)]

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, lengths: Sequence[int], capacity: bool = False
    ) -> tuple[Tensor, dict[int, Plan]]:
        """Hidden states [N, d] of B sequences one after the other, and each expert layer's plan.

        Args:
            tokens: int64 [N].
            lengths: of the sequences; they sum to N.
            capacity: experts drop the tokens of a sequence beyond the spec's capacity, as the
                original code does; a dropped token keeps its residual alone. Without it a token's
                result depends on its own sequence only by attention.
        """
        h = self._embed[tokens]
        biases = {length: self._position_bias(length) for length in set(lengths)}
        sequences = torch.repeat_interleave(torch.tensor(lengths)).int()
        plans: dict[int, Plan] = {}
        everyone = Plan.all(h.shape[0])
        for index, layer in enumerate(self._layers):
            x, _ = layer.attention_norm(self.ops, h)
            self.ops.combine(self._attend(layer, x, lengths, biases), everyone, h)
            x, _ = layer.network_norm(self.ops, h)
            plan = None
            if layer.gate is not None:
                gate = layer.gate
                if capacity:
                    gate = CappedGate(gate, Capacity(self.spec.capacity, "sequence"))
                plan = plans[index] = gate.plan(self.ops, x, sequences=sequences)
            self.ops.combine(layer.network(self.ops, x, plan), plan or everyone, h)
        out, _ = self._norm(self.ops, h)
        return out, plans

    def _attend(
        self, layer: _Layer, x: Tensor, lengths: Sequence[int], biases: Mapping[int, Tensor]
    ) -> Tensor:
        """Attention within each sequence by itself: its bits do not depend on the others."""
        shape = (x.shape[0], self.spec.num_heads, self.spec.head_dim)
        q = self.ops.segment_matmul(x, layer.q.weight).view(shape)
        k, v = self.ops.segment_matmul(x, layer.kv.weight).chunk(2, dim=1)
        parts = [tensor.reshape(shape).split(list(lengths)) for tensor in (q, k, v)]
        out = [
            F.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=biases[query.shape[0]],
                scale=1.0,  # T5 trains without one
            )[0].transpose(0, 1)
            for query, key, value in zip(*parts, strict=True)
        ]
        attended = torch.cat(out).reshape(x.shape[0], -1) if out else q.flatten(1)
        y: Tensor = self.ops.segment_matmul(attended, layer.o.weight)
        return y

    def _position_bias(self, length: int) -> Tensor:
        """[1, heads, T, T] of one sequence in the model's dtype; buckets of arXiv 1910.10683."""
        place = torch.arange(length)
        distance = place[None] - place[:, None]
        half = self.spec.buckets // 2
        exact = half // 2
        far = distance.abs().clamp(min=1).float() / exact
        far = far.log() / math.log(self.spec.max_distance / exact) * (half - exact)
        bucket = torch.where(
            distance.abs() < exact, distance.abs(), (exact + far.long()).clamp(max=half - 1)
        )
        bucket = bucket + half * (distance > 0)
        bias = self._bias[bucket].permute(2, 0, 1)[None]
        return bias.to(getattr(torch, self.spec.dtype))

    # ---- tensors to layers ----

    def _vector(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, Weight):
            raise FormatError(f"{name}: expected a plain tensor, found panels")
        return tensor

    def _linear(self, name: str) -> Linear:
        weight = self._tensors[f"{name}.weight"]
        if not isinstance(weight, Weight):
            raise FormatError(f"{name}.weight: expected panels, found a plain tensor")
        return Linear(weight)

    def _norm_of(self, name: str) -> Norm:
        return Norm(self._vector(f"{name}.weight"), self.spec.norm_eps)

    def _layer(self, index: int) -> _Layer:
        attn, mlp = f"layers.{index}.attn", f"layers.{index}.mlp"
        network_norm, gate = self._norm_of(f"{mlp}.norm"), None
        if index in self.spec.expert_layers:
            bias = self._vector(f"{mlp}.router.bias") if self.spec.router_bias else None
            router = RouterMatrix(self._linear(f"{mlp}.router").weight, bias)
            gate = constructor_of("switch")(router)
            mlp = f"{mlp}.experts"
        network = FeedForward(self._linear(f"{mlp}.up"), self._linear(f"{mlp}.down"), "relu")
        return _Layer(
            self._norm_of(f"{attn}.norm"),
            self._linear(f"{attn}.q"),
            self._linear(f"{attn}.kv"),
            self._linear(f"{attn}.o"),
            network_norm,
            gate,
            network,
        )
