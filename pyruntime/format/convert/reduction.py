"""Token reduction: `--reduce tome:13`, `evit:0.7+fuse`, `dynamicvit:0.7`, and the tensors of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.spec import ReductionSpec, VisionSpec
from pyruntime.format.spec.reduction import Method

_PREDICTOR = "score_predictor."
_STAGES = 3  # blocks of EViT and DynamicViT that drop rows, a quarter of the depth apart
_FLAGS = {"tome": "mae", "evit": "fuse", "dynamicvit": None}


@dataclass(frozen=True, slots=True)
class Reduction:
    """What a caller asks for.

    Attributes:
        amount: pairs merged in each block, or the share of rows kept by each that drops some.
        flag: of EViT: what is dropped is fused into a row; of ToMe: as for models trained by MAE,
            keys count once, however many rows were merged into them.
    """

    method: Method
    amount: float
    flag: bool = False

    def spec(self, layers: int) -> ReductionSpec:
        """For a model of so many blocks; DynamicViT's share applies once more at every stage.

        Raises:
            ConversionError: a model too shallow, or numbers that make no sense.
        """
        share, stages = self.amount, tuple(layers * n // (_STAGES + 1) for n in (1, 2, 3))
        try:
            if self.method == "tome":
                return ReductionSpec(
                    "tome", tuple(range(layers)), merge=(int(share),) * layers,
                    proportional=not self.flag,
                )  # fmt: skip
            if self.method == "evit":
                return ReductionSpec("evit", stages, keep=(share,) * _STAGES, fuse=self.flag)
            # As powers, because int(N * keep) of a rounded product could differ by one.
            return ReductionSpec("dynamicvit", stages, keep=(share, share**2, share**3))
        except FormatError as error:
            raise ConversionError(f"{error} (a model of {layers} blocks)") from None


def parse_reduction(text: str) -> Reduction:
    """ "tome:13", "tome:13+mae", "evit:0.7", "evit:0.7+fuse" or "dynamicvit:0.7" -> Reduction.

    Raises:
        ConversionError: no such method or option, or no number.
    """
    name, _, rest = text.partition(":")
    number, plus, flag = rest.partition("+")
    if name not in _FLAGS:
        raise ConversionError(f"reduce {text!r}: no method {name!r} (one of {', '.join(_FLAGS)})")
    if plus and flag != _FLAGS[name]:
        known = f"{name} has +{_FLAGS[name]}" if _FLAGS[name] else f"{name} has none"
        raise ConversionError(f"reduce {text!r}: no option {flag!r} ({known})")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    whole = name == "tome"
    if not (math.isfinite(amount) and (amount.is_integer() or not whole)):
        kind = "a whole number of pairs" if whole else "a share of the rows"
        raise ConversionError(f"reduce {text!r}: {number!r} is not {kind}")
    return Reduction(cast(Method, name), amount, bool(plus))


def check_predictors(weights: Checkpoint, spec: ReductionSpec | None) -> None:
    """Refuse DynamicViT's predictors where nothing says how much they keep.

    Raises:
        ConversionError: they are there, and `spec` is of another method or none.
    """
    found = any(name.startswith(_PREDICTOR) for name in weights.entries)
    if found and (spec is None or spec.method != "dynamicvit"):
        raise ConversionError(
            f"{weights.paths[0]}: holds DynamicViT's predictors ({_PREDICTOR}*), and only the "
            "caller knows what they keep: reduce=dynamicvit:SHARE is needed (such as 0.7)"
        )


def add_reduction(made: Assembly, spec: VisionSpec) -> None:
    """The predictors' tensors."""
    if spec.reduction is None or spec.reduction.method != "dynamicvit":
        return
    for i in range(len(spec.reduction.blocks)):
        ours, theirs = f"reduce.{i}", f"{_PREDICTOR}{i}"
        made.module(f"{ours}.in.norm", f"{theirs}.in_conv.0")
        made.module(f"{ours}.in", f"{theirs}.in_conv.1")
        for j in range(3):
            made.module(f"{ours}.out.{j}", f"{theirs}.out_conv.{2 * j}")
