from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.engine.request import InvalidRequest, SamplingParams
from pyruntime.engine.sampling import make_generator, sample


def draw(logits: torch.Tensor, params: list[SamplingParams]) -> list[int]:
    return sample(logits, params, [make_generator(p) for p in params])


def some_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def allowed(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The specification: which tokens may be drawn, one loop at a time."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())
    if 0 < params.top_k < len(order):
        order = order[: params.top_k]
    weights = [math.exp((logits[i] - logits[order[0]]).item() / params.temperature) for i in order]
    total, mass, kept = sum(weights), 0.0, set()
    for i, weight in zip(order, weights, strict=True):
        if mass / total >= params.top_p + 1e-6:
            break
        kept.add(i)
        mass += weight
    return kept


params = st.builds(
    SamplingParams,
    temperature=st.floats(0.3, 3),
    top_k=st.sampled_from([0, -1, 1, 3, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.7, 0.2, 1e-9]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(params, min_size=1, max_size=5), st.integers(0, 99), st.sampled_from([7, 3000]))
def test_draws_stay_inside_the_filters_and_ignore_batch_mates(
    each: list[SamplingParams], seed: int, vocab: int
) -> None:
    logits = some_logits(len(each), vocab, seed)
    together = draw(logits, each)
    for i, p in enumerate(each):
        assert draw(logits[i : i + 1], [p]) == [together[i]]
        assert together[i] in allowed(logits[i], p)


def test_greedy_is_argmax_and_draws_nothing() -> None:
    logits = some_logits(4, 100)
    greedy = SamplingParams(temperature=0)
    assert make_generator(greedy) is None
    assert draw(logits, [greedy] * 4) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    p = SamplingParams(temperature=2.0, seed=1)
    generator = make_generator(p)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(logits, [p], [generator])[0]] += 1
    expected = (logits[0] / 2).softmax(-1)
    assert torch.allclose(counts / 4000, expected, atol=0.03)


def test_same_seed_same_draws_unseeded_differ() -> None:
    logits = some_logits(1, 1000).expand(30, -1) * 0.1
    seeded = SamplingParams(seed=7)
    assert draw(logits, [seeded] * 30) == draw(logits, [seeded] * 30)
    assert len(set(draw(logits, [SamplingParams()] * 30))) > 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-5, 1e30, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = some_logits(1, 50) * 100
    (token,) = draw(logits, [SamplingParams(temperature=temperature, seed=0)])
    assert 0 <= token < 50
    if temperature < 1:
        assert token == int(logits.argmax())


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.full((1, 5), float("nan")), [SamplingParams(seed=0)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 2}, "n: expected 1, the only supported value, got 2"),
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", ""]}, "stop: expected non-empty strings"),
        ({"stop": ["a"] * 17}, "stop: expected at most 16 strings, got 17"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_parameters_out_of_range_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**bad)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(bad))
