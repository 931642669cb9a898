"""One decoder for every Llama-like family: what differs between families is data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.spec import DecoderSpec, GateSpec
from pyruntime.gates.routing import Router
from pyruntime.gates.token_gate import TokenGate
from pyruntime.layers.attention import Attention
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV
from pyruntime.layers.mlp import MLP
from pyruntime.layers.residual import Linear, Residual, Step
from pyruntime.layers.rope import cos_sin_table
from pyruntime.models.cost import Cost
from pyruntime.ops.backend import backend
from pyruntime.ops.weight import Weight

Tensors = Mapping[str, Tensor | Weight]


class Decoder:
    """A pre-norm decoder with rotary positions, grouped queries and a gated feed-forward.

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
        self._norm = self._vector("norm.weight")
        self._cos_sin = cos_sin_table(spec, min(spec.max_positions, 4096))
        self._layers = [(self._attention(i), self._mlp(i)) for i in range(spec.num_layers)]

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
        x, _ = self.ops.rms_norm(h, self._norm, self.spec.norm_eps)
        logits: Tensor = self.ops.segment_matmul(x, self._head.weight, out_dtype=torch.float32)
        return logits

    @property
    def layers(self) -> list[tuple[Attention, MLP]]:
        """The branches, in order of execution."""
        return self._layers

    def _lookup(self, tokens: Tensor) -> Tensor:
        table = self._embed
        return table.take_rows(tokens) if isinstance(table, Weight) else table[tokens]

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

    def _residual(self, layer: int, branch: int) -> Residual:
        name = ("attn", "mlp")[branch]
        norm = self._vector(f"layers.{layer}.{name}.norm.weight")
        return Residual(layer, branch, norm, self.spec.norm_eps, self._gate(layer, name))

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

    def _attention(self, layer: int) -> Attention:
        prefix = f"layers.{layer}.attn"
        normed = self.spec.qk_norm
        return Attention(
            self._residual(layer, 0),
            self._weight(f"{prefix}.q"),
            self._weight(f"{prefix}.kv"),
            self._weight(f"{prefix}.o"),
            self.spec.head_dim,
            self._vector(f"{prefix}.q_norm.weight") if normed else None,
            self._vector(f"{prefix}.k_norm.weight") if normed else None,
        )

    def _mlp(self, layer: int) -> MLP:
        prefix = f"layers.{layer}.mlp"
        return MLP(
            self._residual(layer, 1),
            self._weight(f"{prefix}.gate_up"),
            self._weight(f"{prefix}.down"),
        )


def _widened(weight: Weight) -> Weight:
    if weight.dtype == torch.float32:
        return weight
    return Weight.pack(weight.dense().float())
