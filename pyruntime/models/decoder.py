"""One decoder for every Llama-like family: what differs between families is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.spec import DecoderSpec, GateSpec, LatentSpec
from pyruntime.gates.experts import gate_of
from pyruntime.gates.routing import Router
from pyruntime.gates.token_gate import TokenGate
from pyruntime.layers.attention import Attention
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV
from pyruntime.layers.latent import LatentAttention
from pyruntime.layers.mlp import MLP, FeedForward
from pyruntime.layers.moe import MoE
from pyruntime.layers.norm import Norm
from pyruntime.layers.residual import Linear, Residual, Step
from pyruntime.layers.rope import cos_sin_table
from pyruntime.models.cost import Cost
from pyruntime.ops.backend import backend
from pyruntime.ops.weight import Weight

Tensors = Mapping[str, Tensor | Weight]
_LATENT_EPS = 1e-6  # of the norms inside latent attention, whatever config.json says of the others


class Decoder:
    """A pre-norm decoder with rotary positions and gated feed-forward networks or experts.

    Args:
        spec: the architecture.
        gates: the residual gates, or None.
        tensors: those `pyruntime.format.spec.decoder_tensors` lists. They are read, never written.
        backend_name: forces an implementation of the ops (tests compare them).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        gates: GateSpec | None,
        tensors: Tensors,
        backend_name: str | None = None,
    ) -> None:
        self.spec = spec
        self.gates = gates
        self.cost = Cost.of(spec, gates)
        self.ops = backend("cpu", backend_name)
        self._tensors = tensors
        self._embed = tensors["embed.weight"]
        self._head = self._weight("embed" if spec.tie_embeddings else "lm_head")
        self._norm = self._norm_of("norm")
        self._cos_sin = cos_sin_table(spec, min(spec.max_positions, 4096))
        self._layers = [(self._attention(i), self._feed_forward(i)) for i in range(spec.num_layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: PagedKV, router: Router) -> Tensor:
        """Logits float32 [M, vocabulary] of the batch's logit rows.

        Mutates the cache entries `batch.slots`, and records decisions in the router.
        """
        step = Step(self.ops, batch, kv, router, self._positions_to(batch))
        h = self._lookup(batch.tokens)
        for attention, mlp in self._layers:
            attention(h, step)
            mlp(h, step)
        if batch.logit_rows.shape[0] != batch.num_rows:
            h = h[batch.logit_rows]
        x, _ = self._norm(self.ops, h)
        logits: Tensor = self.ops.segment_matmul(
            x, self._head.weight, bias=self._head.bias, out_dtype=torch.float32
        )
        if self.spec.logits_scaling != 1.0:
            logits /= self.spec.logits_scaling
        return logits

    @property
    def layers(self) -> list[tuple[Attention | LatentAttention, MLP | MoE]]:
        """The branches, in order of execution."""
        return self._layers

    def _lookup(self, tokens: Tensor) -> Tensor:
        table = self._embed
        rows = table.take_rows(tokens) if isinstance(table, Weight) else table[tokens]
        factor = self.spec.embedding_multiplier
        return rows if factor == 1.0 else rows * factor

    def _positions_to(self, batch: Batch) -> Tensor:
        # Contexts of 128k tokens are announced more often than used: the table grows by doubling.
        newest = int(batch.positions.max()) if batch.num_rows else 0
        if newest >= self._cos_sin.shape[0]:
            size = min(self.spec.max_positions, 2 * (newest + 1))
            self._cos_sin = cos_sin_table(self.spec, size)
        return self._cos_sin

    # ---- tensors to layers ----

    def _vector(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, Weight):
            raise FormatError(f"{name}: expected a plain tensor, found panels")
        return tensor

    def _weight(self, name: str) -> Linear:
        weight = self._tensors[f"{name}.weight"]
        if not isinstance(weight, Weight):
            raise FormatError(f"{name}.weight: expected panels, found a plain tensor")
        bias = f"{name}.bias"
        return Linear(weight, self._vector(bias) if bias in self._tensors else None)

    def _optional(self, name: str) -> Tensor | None:
        return self._vector(name) if name in self._tensors else None

    def _norm_of(self, name: str, eps: float | None = None) -> Norm:
        weight = self._vector(f"{name}.weight")
        eps = self.spec.norm_eps if eps is None else eps
        return Norm(weight, eps, self._optional(f"{name}.bias"))

    def _residual(self, layer: int, branch: int) -> Residual:
        name = ("attn", "mlp")[branch]
        norm = self._norm_of(f"layers.{layer}.{name}.norm")
        gate = self._gate(layer, name)
        return Residual(layer, branch, norm, gate, self.spec.residual_multiplier)

    def _gate(self, layer: int, name: str) -> TokenGate | None:
        gates = self.gates
        if gates is None or not (gates.gate_attention if name == "attn" else gates.gate_mlp):
            return None
        prefix = f"gates.{name}" if gates.shared else f"layers.{layer}.{name}.gate"
        multiplies = gates.actually_gate  # if not, the gate only ranks and nothing is scaled
        entry = multiplies and gates.gating_mode == "before_module"
        if gates.gate_type == "scalar":
            probe = self._vector(f"{prefix}.weight").flatten()
            bias = float(self._vector(f"{prefix}.bias"))
            return TokenGate(probe, bias, multiplies=multiplies, entry=entry)
        if gates.gate_type == "vector":
            gate = self._weight(prefix)
            return TokenGate(weight=gate.weight, bias=gate.bias, multiplies=multiplies, entry=entry)
        up, down = self._weight(f"{prefix}.up"), self._weight(f"{prefix}.down")
        return TokenGate(
            weight=_widened(down.weight),
            bias=down.bias,
            up=up.weight,
            up_bias=up.bias,
            multiplies=multiplies,
            entry=entry,
        )

    def _attention(self, layer: int) -> Attention | LatentAttention:
        prefix, spec = f"layers.{layer}.attn", self.spec
        if spec.latent is not None:
            return self._latent_attention(layer, spec.latent)
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        return Attention(
            self._residual(layer, 0),
            self._weight(f"{prefix}.q"),
            self._weight(f"{prefix}.kv"),
            self._weight(f"{prefix}.o"),
            spec.head_dim,
            self._optional(f"{prefix}.q_norm.weight"),
            self._optional(f"{prefix}.k_norm.weight"),
            scale,
            self._optional(f"{prefix}.sinks"),
            spec.window or 0 if layer in spec.window_layers else 0,
        )

    def _latent_attention(self, layer: int, latent: LatentSpec) -> LatentAttention:
        prefix, scale = f"layers.{layer}.attn", self.spec.attention_scale
        low = latent.q_rank is not None
        return LatentAttention(
            self._residual(layer, 0),
            latent,
            self._weight(f"{prefix}.q_a") if low else None,
            self._norm_of(f"{prefix}.q_a_norm", _LATENT_EPS) if low else None,
            self._weight(f"{prefix}.q_nope"),
            self._weight(f"{prefix}.q_rope"),
            self._weight(f"{prefix}.kv_a"),
            self._norm_of(f"{prefix}.kv_a_norm", _LATENT_EPS),
            self._weight(f"{prefix}.k_b"),
            self._weight(f"{prefix}.v_b"),
            self._weight(f"{prefix}.o"),
            (latent.nope_dim + latent.rope_dim) ** -0.5 if scale is None else scale,
        )

    def _feed_forward(self, layer: int) -> MLP | MoE:
        prefix, experts = f"layers.{layer}.mlp", self.spec.experts
        residual = self._residual(layer, 1)
        if experts is None or layer not in experts.layers:
            return MLP(residual, self._network(prefix))
        router = self._weight(f"{prefix}.router")
        gate = gate_of(
            experts, router.weight, router.bias, self._optional(f"{prefix}.router.selection_bias")
        )
        routed = self._network(f"{prefix}.experts")
        routed = replace(
            routed, epilogue=experts.activation, alpha=experts.alpha, limit=experts.limit
        )
        shared = self._network(f"{prefix}.shared") if experts.shared_size else None
        shared_gate = None
        if experts.shared_gate:
            # In the model's dtype it multiplies like any matrix: the same bits in every batch.
            probe = self._vector(f"{prefix}.shared.gate.weight")
            shared_gate = Weight.pack(probe.to(getattr(torch, self.spec.dtype)))
        return MoE(residual, gate, routed, shared, shared_gate)

    def _network(self, prefix: str) -> FeedForward:
        return FeedForward(self._weight(f"{prefix}.gate_up"), self._weight(f"{prefix}.down"))


def _widened(weight: Weight) -> Weight:
    if weight.dtype == torch.float32:
        return weight
    return Weight.pack(weight.dense().float())
