"""What the heads of exits answer: sums, ensembles, cascades, and one class for all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyruntime.layers.exit_head import CERTAIN
from pyruntime.models.vit import VisionTransformer
from tests.models.vision_models import (
    CRITERIA,
    exits_of,
    heads_of,
    model_of,
    pictures,
    spec_of,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_boosted_heads_add_up() -> None:
    own, sums = (model_of(spec_of(exits=exits_of("max_prob", outputs=outputs)))
                 for outputs in ("own", "sum"))  # fmt: skip
    images = pictures(own.spec, 5)
    alone, added = heads_of(own, images), heads_of(sums, images)
    total = torch.zeros_like(alone[0])
    for stage in range(3):
        total = total + alone[stage]
        torch.testing.assert_close(added[stage], total)
    assert torch.equal(added[3], alone[3])  # the final head stands for itself


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_ensembles_weigh_all_answers_so_far(kind: str) -> None:
    spec = spec_of(exits=exits_of("max_prob", outputs=kind))
    tensors = tensors_of(spec)
    images = pictures(spec, 5)
    plain = {name: t for name, t in tensors.items() if "ensemble" not in name}
    alone = heads_of(VisionTransformer(spec_of(exits=exits_of("max_prob")), plain), images)
    found = heads_of(VisionTransformer(spec, tensors), images)
    for j in range(3):
        p = torch.stack(alone[: j + 1]).softmax(-1)
        weight = tensors[f"exits.{j}.ensemble.weight"]
        bias = tensors[f"exits.{j}.ensemble.bias"]
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        if kind == "geometric":
            expected = (weight[:, None, None] * p.log()).sum(0) + bias
        else:
            mean = (weight[:, None, None] * p).sum(0) + bias
            expected = (mean / mean.sum(1, keepdim=True)).log()
        torch.testing.assert_close(found[j], expected, atol=1e-5, rtol=1e-5)


def test_a_cascade_reads_the_answer_before() -> None:
    spec = spec_of(exits=CRITERIA["cascade"][:2])
    tensors = tensors_of(spec)
    model = VisionTransformer(spec, tensors)
    images = pictures(spec, 5)
    first, second, _ = heads_of(model, images)
    packed = model.embed(images)
    model.run_stage(packed, 0)
    model.run_stage(packed, 1)
    norm = torch.nn.functional.layer_norm
    row = norm(packed.x[packed.first_rows.long()], (40,), tensors["norm.weight"],
               tensors["norm.bias"], 1e-6)  # type: ignore[arg-type] # fmt: skip
    before = norm(first, (7,), tensors["exits.1.cascade.weight"],
                  tensors["exits.1.cascade.bias"], 1e-5)  # type: ignore[arg-type] # fmt: skip
    weight = tensors["exits.1.head.weight"].dense()[0]  # type: ignore[union-attr,operator]
    expected = torch.cat([row, before], 1) @ weight.T + tensors["exits.1.head.bias"]
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)


def test_a_constant_class_is_certain() -> None:
    model = model_of(spec_of(exits=CRITERIA["constant"]))
    logits = heads_of(model, pictures(model.spec, 3))[0]
    assert logits.tolist() == [[0, 0, 0, CERTAIN, 0, 0, 0]] * 3
