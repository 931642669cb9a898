"""What an answer at each exit costs: as the paper's repository counts, and in MACs."""

from __future__ import annotations

from itertools import accumulate

from examples.jei_dnn.model import TOKEN_DIM, Config

FEATURES = TOKEN_DIM // 2


def _tokens(c: Config) -> tuple[int, int, int]:
    """Tokens of the two performers, and of the blocks (with the class token)."""
    return (c.image_px // 4) ** 2, (c.image_px // 8) ** 2, c.grid**2 + 1


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return outputs * (inputs + bias)


def repository_costs(c: Config) -> list[float]:
    """The "Mul-Adds" of networkslab/dynn for every exit, the final head last.

    A linear layer is charged its weights once, however many tokens it runs on; attention itself is
    free; LayerNorm costs 2.5 and GELU 4 per number. Not MACs, but what the paper's plots show.
    """
    first, second, count = _tokens(c)
    d, hidden, classes = c.width, c.mlp_ratio * c.width, c.classes

    def performer(dim: int, tokens: int) -> float:
        weights = _linear(dim, 3 * TOKEN_DIM) + 3 * _linear(TOKEN_DIM, TOKEN_DIM)
        return weights + tokens * (2.5 * dim + 2.5 * TOKEN_DIM + 4 * TOKEN_DIM)

    stem = performer(147, first) + performer(9 * TOKEN_DIM, second) + _linear(9 * TOKEN_DIM, d)
    weights = _linear(d, 3 * d, bias=False) + _linear(d, d) + _linear(d, hidden)
    block = weights + _linear(hidden, d) + count * (2 * 2.5 * d + 4 * hidden)
    norm = count * 2.5 * d
    head = norm + _linear(d, classes)
    gate = 9 * classes + 6
    # The last block's output is normalised twice in the code that is measured there.
    stages = [block + head + gate] * c.gates + [block + head + norm]
    return list(accumulate(stages, initial=stem))[1:]


def true_costs(c: Config) -> list[float]:
    """Multiply-accumulates of every exit's whole path, the final head last.

    Heads count, on one row each; normalisations and activations do not.
    """
    first, second, count = _tokens(c)
    d, hidden = c.width, c.mlp_ratio * c.width

    def performer(dim: int, tokens: int) -> int:
        linears = 3 * dim * TOKEN_DIM + 3 * TOKEN_DIM**2
        attention = 4 * TOKEN_DIM * FEATURES + FEATURES
        return tokens * (linears + attention)

    stem = performer(147, first) + performer(9 * TOKEN_DIM, second)
    stem += (count - 1) * 9 * TOKEN_DIM * d
    block = count * (4 * d * d + 2 * d * hidden) + 2 * count * count * d
    stages = [block + d * c.classes] * c.depth
    return list(accumulate(stages, initial=float(stem)))[1:]


def shares(costs: list[float]) -> list[float]:
    """Costs as shares of the full network's."""
    return [cost / costs[-1] for cost in costs]
