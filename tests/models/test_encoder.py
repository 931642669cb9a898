"""Switch Transformers encoders: parity with transformers, capacity, independence of batch mates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pyruntime
from pyruntime.errors import ConversionError, FormatError, InvalidInput
from tests.models.session import plain
from tests.parity import need_transformers

need_transformers()

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (1, 17, 40)


def switch(folder: Path, **changes: Any) -> Any:
    """A random Switch Transformer, saved as Hugging Face saves it."""
    import transformers

    torch.manual_seed(0)
    values = {
        "vocab_size": 300, "d_model": 40, "d_kv": 8, "d_ff": 52, "num_layers": 4, "num_heads": 5,
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1,
        "num_experts": 5, "expert_capacity": 4, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "decoder_start_token_id": 0, "router_bias": False,
    }  # fmt: skip
    config = transformers.SwitchTransformersConfig(**{**values, **changes})
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter)
        elif "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


def sequences() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (n,), generator=random).tolist() for n in LENGTHS]


@pytest.mark.parametrize("changes", [{}, {"router_bias": True, "num_sparse_encoder_layers": 4}])
@pytest.mark.parametrize("capacity", [True, False])
def test_hidden_states_are_those_of_transformers(
    tmp_path: Path, changes: dict[str, Any], capacity: bool
) -> None:
    model = switch(tmp_path / "hf", expert_capacity=4 if capacity else 1000, **changes)
    report = pyruntime.convert(tmp_path / "hf", tmp_path / "model")
    assert "decoder" in str(report)
    runtime = pyruntime.load_encoder(tmp_path / "model")
    encoding = runtime.encode(sequences(), capacity=capacity)
    dropped = sum(plan.dropped for plan in encoding.expert_plans.values())
    assert (dropped > 0) == capacity
    for ids, hidden in zip(sequences(), encoding.hidden, strict=True):
        with torch.inference_mode():
            expected = model.encoder(torch.tensor([ids])).last_hidden_state[0]
        assert float((hidden - expected).abs().max()) <= 1e-4


def test_a_sequence_is_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    switch(tmp_path / "hf")
    pyruntime.convert(tmp_path / "hf", tmp_path / "model")
    runtime = pyruntime.load_encoder(tmp_path / "model")
    for capacity in (False, True):
        together = runtime.encode(sequences(), capacity=capacity).hidden
        for ids, hidden in zip(sequences(), together, strict=True):
            assert torch.equal(runtime.encode([ids], capacity=capacity).hidden[0], hidden)


def test_refusals(tmp_path: Path) -> None:
    switch(tmp_path / "hf")
    pyruntime.convert(tmp_path / "hf", tmp_path / "model")
    runtime = pyruntime.load_encoder(tmp_path / "model")
    with pytest.raises(InvalidInput, match="sequence 1 is empty"):
        runtime.encode([[5], []])
    with pytest.raises(InvalidInput, match="token id 300"):
        runtime.encode([[5, 300]])
    with pytest.raises(FormatError, match="encoder"):
        pyruntime.load(tmp_path / "model")
    with pytest.raises(FormatError, match="no encoder"):
        pyruntime.load_encoder(plain(tmp_path / "decoder"))
    switch(tmp_path / "gelu", feed_forward_proj="gated-gelu")
    with pytest.raises(ConversionError, match="gated-gelu"):
        pyruntime.convert(tmp_path / "gelu", tmp_path / "other")
