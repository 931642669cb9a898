"""A loaded model: forward passes with a compute policy, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyruntime.engine.breakeven import measure_break_even
from pyruntime.engine.decisions import Decisions
from pyruntime.errors import FormatError, InvalidInput, Unavailable
from pyruntime.format.load import Container, read
from pyruntime.format.spec import DecoderSpec, VisionSpec
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import BLOCK, PagedKV
from pyruntime.models.cost import trace_of
from pyruntime.models.decoder import Decoder

if TYPE_CHECKING:
    from pyruntime.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """Result of `Runtime.forward`.

    Attributes:
        logits: float32 [B, T, V] for sequences of one length, else a list of [T_i, V].
        trace: what was executed, rows in order of the sequences.
    """

    logits: Tensor | list[Tensor]
    trace: Trace


class Runtime:
    """A converted model, ready to run.

    Attributes:
        spec, gates: what it is.
        model: the decoder.
        decisions: what policies mean for this model.
    """

    def __init__(self, container: Container, backend_name: str | None = None) -> None:
        self.container = container
        if not isinstance(container.spec, DecoderSpec):
            kind, opener = "an encoder", "load_encoder"
            if isinstance(container.spec, VisionSpec):
                kind, opener = "a vision transformer", "Classifier"
            raise FormatError(f"{container.path}: holds {kind}; open it with pyruntime.{opener}")
        self.spec = container.spec
        self.gates = container.gates
        record = container.calibration
        self.model = Decoder(container.spec, container.gates, container.tensors, backend_name)
        packed_below = measure_break_even(self.model) if self.gates else 1.0
        calibration = None if record is None else Calibration(record)
        self.decisions = Decisions(self.spec, self.gates, calibration, self.model.ops, packed_below)
        self._tokenizer: Tokenizer | None = None

    @property
    def calibration(self) -> Calibration | None:
        """Thresholds of the folder, or None."""
        return self.decisions.calibration

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, or None when it has none."""
        if self._tokenizer is None:
            from pyruntime.engine.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self.container.path)
        return self._tokenizer

    def resolve(self, policy: ComputePolicy | None) -> tuple[str, float]:
        """Mode and budget of a policy; see `pyruntime.engine.decisions.Decisions.resolve`."""
        return self.decisions.resolve(policy)

    def router(
        self,
        batch: Batch,
        policies: Sequence[ComputePolicy | None],
        replay: Tensor | Trace | None = None,
    ) -> Router:
        """The router of one step; see `pyruntime.engine.decisions.Decisions.router`."""
        return self.decisions.router(batch, policies, replay)

    def trace(
        self, router: Router, batch: Batch, policies: Sequence[ComputePolicy | None]
    ) -> Trace:
        """What a finished step executed."""
        resolved = [self.resolve(policy) for policy in policies]
        budgets = torch.tensor([budget for _, budget in resolved])[batch.seq_ids.long()]
        mode = ",".join(sorted({mode for mode, _ in resolved}))
        return trace_of(
            router,
            self.model.cost,
            self.spec.num_layers,
            batch.positions,
            batch.logit_rows,
            mode,
            budgets,
        )

    def forward(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        policy: ComputePolicy | Sequence[ComputePolicy | None] | None = None,
        *,
        replay: Tensor | Trace | None = None,
        attention_mask: Tensor | None = None,
    ) -> Output:
        """Logits of every position of B sequences, prefilled in one pass.

        Args:
            token_ids: int [T], int [B, T], or a list of B lists of different lengths.
            policy: one for all, or one per sequence.
            replay: an earlier trace whose decisions are repeated, or its `kept` alone.
            attention_mask: [B, T], 0 for padding, whose rows are left out (and get zero logits).

        Raises:
            InvalidInput: an empty sequence, a token out of the vocabulary, a context too long.
        """
        sequences, mask = _ragged(token_ids, attention_mask)
        self._check_tokens(sequences)
        batch, blocks = full_batch(sequences)
        policies: list[ComputePolicy | None]
        if policy is None or isinstance(policy, ComputePolicy):
            policies = [policy] * len(sequences)
        else:
            policies = list(policy)
        if len(policies) != len(sequences):
            raise InvalidInput(f"got {len(policies)} policies for {len(sequences)} sequences")
        router = self.router(batch, policies, replay)
        logits = self.model.forward(batch, PagedKV(self.spec, blocks), router)
        trace = self.trace(router, batch, policies)
        if mask is not None:
            full = torch.zeros(*mask.shape, logits.shape[1])
            full[mask] = logits
            return Output(full, trace)
        lengths = [len(sequence) for sequence in sequences]
        if len(set(lengths)) == 1:
            return Output(logits.view(len(lengths), lengths[0], -1), trace)
        return Output(list(logits.split(lengths)), trace)

    def _check_tokens(self, sequences: list[list[int]]) -> None:
        for sequence in sequences:
            if not sequence:
                raise InvalidInput("a sequence is empty: at least one token is needed")
            if len(sequence) > self.spec.max_positions:
                raise InvalidInput(
                    f"a sequence has {len(sequence)} tokens, the context holds "
                    f"{self.spec.max_positions}"
                )
            low, high = min(sequence), max(sequence)
            if low < 0 or high >= self.spec.vocab_size:
                bad = low if low < 0 else high
                raise InvalidInput(
                    f"token id {bad} is outside the vocabulary of {self.spec.vocab_size}"
                )


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    verify: bool = True,
    backend_name: str | None = None,
) -> Runtime:
    """Open a model folder in the runtime format.

    Args:
        path: the folder `pyruntime convert` wrote.
        device: "cpu".
        verify: compare every shard with its recorded SHA-256 first.
        backend_name: forces an implementation of the ops ("native" or "reference").

    Raises:
        FormatError: the folder is damaged or of another version.
        Unavailable: decoders do not run on that device yet.
    """
    if torch.device(device).type != "cpu":
        raise Unavailable(f"decoders run on the cpu; {device!r} has only the plan ops so far")
    return Runtime(read(path, verify), backend_name)


def full_batch(sequences: Sequence[Sequence[int]]) -> tuple[Batch, int]:
    """Whole sequences as one step on a fresh cache; also the number of blocks it needs."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    seq_ids: list[int] = []
    tables: list[list[int]] = []
    used = 0
    for i, sequence in enumerate(sequences):
        count = -(-len(sequence) // BLOCK)
        tables.append(list(range(used, used + count)))
        tokens += list(sequence)
        positions += range(len(sequence))
        slots += range(used * BLOCK, used * BLOCK + len(sequence))
        seq_ids += [i] * len(sequence)
        used += count
    width = max(map(len, tables), default=0)
    batch = Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        seq_ids=torch.tensor(seq_ids, dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        logit_rows=torch.arange(len(tokens)),
    )
    return batch, used


def _ragged(
    token_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> tuple[list[list[int]], Tensor | None]:
    if not isinstance(token_ids, Tensor):
        if hasattr(token_ids, "__dlpack__"):
            token_ids = torch.utils.dlpack.from_dlpack(token_ids)
        else:
            return [list(sequence) for sequence in token_ids], None
    if token_ids.dim() == 1:
        token_ids = token_ids[None]
    if token_ids.dim() != 2 or token_ids.dtype.is_floating_point:
        raise InvalidInput(
            f"token_ids: expected integers [T] or [B, T], got {token_ids.dtype} "
            f"{list(token_ids.shape)}"
        )
    if attention_mask is None:
        return token_ids.tolist(), None
    if attention_mask.shape != token_ids.shape:
        raise InvalidInput(
            f"attention_mask: expected {list(token_ids.shape)}, got {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    return [ids[seen].tolist() for ids, seen in zip(token_ids, mask, strict=True)], mask
