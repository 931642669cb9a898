"""A loaded encoder: hidden states of whole sequences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.load import Container, read
from pyruntime.format.spec import EncoderSpec
from pyruntime.models.encoder import Encoder
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """Result of `EncoderRuntime.encode`.

    Attributes:
        hidden: per sequence, [T, d] in the model's dtype.
        expert_plans: by expert layer, the plan over the rows of all sequences in order.
    """

    hidden: list[Tensor]
    expert_plans: dict[int, Plan]


class EncoderRuntime:
    """A converted encoder, ready to run."""

    def __init__(self, container: Container, backend_name: str | None = None) -> None:
        if not isinstance(container.spec, EncoderSpec):
            raise FormatError(f"{container.path}: holds no encoder; open it with pyruntime.load")
        self.container = container
        self.spec = container.spec
        self.model = Encoder(container.spec, container.tensors, backend_name)

    def encode(self, token_ids: Sequence[Sequence[int]], *, capacity: bool = False) -> Encoding:
        """Hidden states of B sequences, without padding.

        Args:
            token_ids: B lists of tokens, of any lengths.
            capacity: drop tokens beyond an expert's capacity, as the original code does.

        Raises:
            InvalidInput: an empty sequence, or a token out of the vocabulary.
        """
        lengths = [len(sequence) for sequence in token_ids]
        tokens = torch.tensor([t for sequence in token_ids for t in sequence], dtype=torch.int64)
        if 0 in lengths:
            raise InvalidInput(
                f"sequence {lengths.index(0)} is empty: at least one token is needed"
            )
        bad = tokens[(tokens < 0) | (tokens >= self.spec.vocab_size)]
        if bad.numel():
            raise InvalidInput(
                f"token id {int(bad[0])} is outside the vocabulary of {self.spec.vocab_size}"
            )
        hidden, plans = self.model.forward(tokens, lengths, capacity)
        return Encoding(list(hidden.split(lengths)), plans)


def load_encoder(
    path: str | os.PathLike[str], verify: bool = True, backend_name: str | None = None
) -> EncoderRuntime:
    """Open an encoder folder in the runtime format.

    Raises:
        FormatError: the folder is damaged, of another version, or holds no encoder.
    """
    return EncoderRuntime(read(path, verify), backend_name)
