"""What every expert gate is: an object that turns the rows of a step into a Plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from pyruntime.gates.experts.choice import Choice
from pyruntime.gates.experts.logits import Router
from pyruntime.plan import Plan


class Step(NamedTuple):
    """What a gate may know about the N rows of a call besides their hidden states.

    Attributes:
        tokens: int64 [N], the input token of every row (hash gates).
        sequences: int32 [N], the sequence of every row; the rows of one are in order.
        limits: float32 [N, 3], the most compute a row may use (see `Choice.cut`).
    """

    tokens: Tensor | None = None
    sequences: Tensor | None = None
    limits: Tensor | None = None


class Gate(ABC):
    """Chooses experts for rows; everything below it sees a Plan and never asks which kind it was.

    `causal`: a row's choices do not depend on later rows. `batch_invariant`: they depend on no
    other row at all. `weights_input`: the weight multiplies what an expert reads instead of what it
    returns (Llama-4). `identity_experts`: the last so many experts return their input (LongCat).
    """

    __slots__ = ()

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E, the number of segments of every plan."""

    @property
    @abstractmethod
    def choices(self) -> int:
        """K, the slots of a row; how many of them are used may depend on the row."""

    @property
    def causal(self) -> bool:
        """Whether later rows have no influence."""
        return True

    @property
    def batch_invariant(self) -> bool:
        """Whether other rows have no influence."""
        return True

    @property
    def weights_input(self) -> bool:
        """Whether weights multiply the experts' inputs."""
        return False

    @property
    def identity_experts(self) -> int:
        """How many of the last experts return their input unchanged."""
        return 0

    @abstractmethod
    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """Experts and weights of rows x [N, H], within the step's limits."""

    def plan(
        self,
        ops: ModuleType,
        x: Tensor,
        *,
        tokens: Tensor | None = None,
        sequences: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> Plan:
        """The plan of rows x [N, H]: E segments, K choices a row; arguments as in `Step`.

        Raises:
            InvalidInput: the gate needs what was not given, or cannot obey limits.
        """
        return self.decide(ops, x, Step(tokens, sequences, limits))

    def decide(self, ops: ModuleType, x: Tensor, step: Step) -> Plan:
        """The plan of what is chosen; for gates that have a faster way than by their choice."""
        ids, weights = self.choose(ops, x, step)
        plan: Plan = ops.plan_partition(ids.int().contiguous(), self.num_experts, weights)
        return plan


@dataclass(frozen=True, slots=True, eq=False)
class RouterGate(Gate):
    """A gate that reads one router.

    Attributes:
        router: gives the logits of E experts.
    """

    router: Router

    @property
    def num_experts(self) -> int:
        """E of the router."""
        return self.router.num_experts
