"""JEI-DNN's composition of gates and its decision, as the paper's repository has them."""

from __future__ import annotations

import torch
from torch import Tensor

LEAVE_FROM = 0.5


def exit_masses(g: Tensor) -> Tensor:
    """Gate outputs [G, B] -> the probability of leaving at each exit [G + 1, B], summing to one.

    A gate's output is a share of the whole mass, cut to what is left of it; the final head gets the
    rest.
    """
    before = g.cumsum(0) - g
    masses = torch.minimum(g, 1 - before).clamp(min=0)
    return torch.cat([masses, 1 - masses.sum(0, keepdim=True)])


def leave(g: Tensor) -> Tensor:
    """Gate outputs [G, B] -> the exit each image takes, [B] int64; G is the final head.

    It leaves at the first gate where the chance to leave, given that it is still there, is 0.5.
    """
    masses = exit_masses(g)
    stay = torch.ones_like(g[0])
    level = torch.full(g.shape[1:], len(g), dtype=torch.int64, device=g.device)
    for gate in range(len(g)):
        # 0 / 0 once the mass is used up; the comparison is then false, and the image has left.
        chance = (masses[gate] / stay).clamp(0, 1)
        level[(chance >= LEAVE_FROM) & (level == len(g))] = gate
        stay = stay * (1 - chance)
    return level
