"""Exits in checkpoints: JEI-DNN's heads and gates, heads with a criterion, and declared exits.

Exits of other methods (BoostedNet's sums, ensembles, learned scores, constant classes) have no
common format: a preprocess.json declares them as `ExitSpec`s, and their tensors have our names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from torch import Tensor

from pyruntime.errors import ConversionError
from pyruntime.format.convert import unpickle
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint, Need, dense, flatten, open_torch
from pyruntime.format.spec import ExitSpec, VisionSpec, vision_tensors
from pyruntime.format.spec.vision import Criterion

HEAD, GATE = "intermediate_heads", "gates"
_NUMBERED = re.compile(rf"({HEAD}|{GATE})\.(\d+)\.")
# Criteria whose published rule compares strictly: DeeBERT's entropy, FREE's margin.
_STRICT = ("entropy", "margin")
_JOINT = re.compile(r"ckpt_([0-9.eE+-]+)_[0-9.eE+-]+\.pth$")


@dataclass(frozen=True, slots=True)
class Rule:
    """A criterion and a threshold on the scale of `ExitSpec.threshold`; None: never."""

    criterion: Criterion
    threshold: float | None


def parse_rule(text: str) -> Rule:
    """ "max_prob:0.9" or "margin" -> Rule.

    An entropy is given as it is published: leaves below it. Its confidence is minus the entropy.

    Raises:
        ConversionError: no such criterion, or no number.
    """
    name, colon, number = text.partition(":")
    known = tuple(c for c in get_args(Criterion) if c != "learned")
    if name not in known:
        raise ConversionError(f"exit {text!r}: no criterion {name!r} (one of {', '.join(known)})")
    if not colon:
        return Rule(cast(Criterion, name), 1.0 if name == "jei_dnn" else None)
    try:
        threshold = float(number)
    except ValueError:
        raise ConversionError(f"exit {text!r}: {number!r} is no number") from None
    if not abs(threshold) < float("inf"):
        raise ConversionError(f"exit {text!r}: the threshold must be finite")
    return Rule(cast(Criterion, name), -threshold if name == "entropy" else threshold)


def read_heads(folder: Path) -> Checkpoint:
    """JEI-DNN's warm-up heads, one file {block}.pth each, as intermediate heads.

    Raises:
        ConversionError: no such files, or what is wrong with them.
    """
    files = {path: int(path.stem) for path in folder.glob("*.pth") if path.stem.isdecimal()}
    if not files:
        raise ConversionError(f"{folder}: no heads: looked for files called 0.pth, 1.pth, …")
    joined, problems = Checkpoint({}, []), []
    for path, block in sorted(files.items(), key=lambda item: item[1]):
        try:
            head = open_torch(path, _read_head)
        except ConversionError as error:
            problems.append(str(error))
            continue
        joined = joined.joined(head.renamed(lambda name, b=block: f"{HEAD}.{b}.{name}"))  # type: ignore[misc]
    if problems:
        raise ConversionError("\n".join(problems))
    return joined


def read_exits(
    weights: Checkpoint, layers: int, rule: Rule | None, positions: object = None
) -> tuple[tuple[ExitSpec, ...], list[str]]:
    """The exits that `weights` holds, and notes.

    Head l reads block l. `rule` replaces the gates; it is needed where heads have none.
    `positions` is what a checkpoint says about the blocks of its heads, if it does.

    Raises:
        ConversionError: heads and gates that do not pair, or blocks that they cannot follow.
    """
    heads, gates = _numbers(weights.entries, HEAD), _numbers(weights.entries, GATE)
    problems = []
    if not heads and not gates and rule is not None:
        problems.append(f"an exit criterion is given, but there are no heads ({HEAD}.*)")
    if heads and not gates and rule is None:
        problems.append(
            f"{len(heads)} heads without gates: a criterion must be given (such as max_prob:0.9)"
        )
    if heads and not gates and rule is not None and rule.criterion == "jei_dnn":
        problems.append("jei_dnn needs gates, and the heads have none")
    if gates and gates != heads:
        for what, numbers in (("heads without gates", heads - gates),
                              ("gates without heads", gates - heads)):  # fmt: skip
            if numbers:
                problems.append(f"{what}: {', '.join(map(str, sorted(numbers)))}")
    if heads and max(heads) >= layers - 1:
        problems.append(f"head {max(heads)} of a model whose blocks end at {layers - 1}")
    if positions is not None and positions != sorted(heads):
        problems.append(
            f"intermediate_head_positions is {positions!r}, expected {sorted(heads)}: "
            "a head reads the block of its number"
        )
    if problems:
        where = ", ".join(map(str, weights.paths[:1]))
        raise ConversionError("\n".join(f"{where}: {text}" for text in problems))
    notes = []
    if gates and rule is not None and rule.criterion != "jei_dnn":
        notes.append(f"the gates are left out: exits leave by {rule.criterion}")
    rule = rule or Rule("jei_dnn", 1.0)
    if heads and rule.threshold is None:
        notes.append("the exits have no threshold: nothing leaves early before a calibration")
    strict = rule.criterion in _STRICT
    return tuple(
        ExitSpec(block, rule.criterion, rule.threshold, strict) for block in sorted(heads)
    ), notes  # fmt: skip


def check_declared(weights: Checkpoint, declared: tuple[ExitSpec, ...], rule: Rule | None) -> None:
    """Refuse exits that are declared where there are others, or another rule for them.

    Raises:
        ConversionError: two descriptions of the exits.
    """
    if not declared:
        return
    others = ["an exit criterion is given"] if rule is not None else []
    if any(_NUMBERED.match(name) for name in weights.entries):
        others.append(f"there are tensors {HEAD}.* or {GATE}.*")
    if others:
        where = ", ".join(map(str, weights.paths[:1]))
        raise ConversionError(f"{where}: exits are declared, but {' and '.join(others)}")


def add_declared(made: Assembly, spec: VisionSpec) -> None:
    """The tensors of exits that are called as they are here."""
    for tensor in vision_tensors(spec):
        if tensor.name.startswith("exits."):
            made.tensor(tensor.name, tensor.name)


def add_exits(made: Assembly, spec: VisionSpec) -> None:
    """The tensors of intermediate heads and their gates."""
    rows = made.weights.rows
    for j, exit_ in enumerate(spec.exits):
        made.module(f"exits.{j}.head", f"{HEAD}.{exit_.after_block}")
        if exit_.criterion != "jei_dnn":
            continue
        gate = f"{GATE}.{exit_.after_block}.linear"
        weight = f"{gate}.weight"
        made.computed(
            f"exits.{j}.gate.weight", (4,), {weight: Need((1, 4))},
            lambda a, b, name=weight: rows(name, 0, 1)[0, a:b],  # type: ignore[misc]
        )  # fmt: skip
        made.tensor(f"exits.{j}.gate.bias", f"{gate}.bias")
    if all(exit_.criterion != "jei_dnn" for exit_ in spec.exits):
        made.drop(f"{GATE}.")


def tradeoff(path: Path) -> float | None:
    """The lambda of a joint checkpoint, which only its file name holds: ckpt_{lambda}_{acc}.pth."""
    match = _JOINT.search(path.name)
    try:
        return float(match[1]) if match else None
    except ValueError:
        return None


def _numbers(names: Iterable[str], kind: str) -> set[int]:
    found = (_NUMBERED.match(name) for name in names)
    return {int(match[2]) for match in found if match and match[1] == kind}


def _read_head(path: Path) -> dict[str, Tensor]:
    data = unpickle.load(path)
    inner = data.get("state", data)
    return dense(path, dict(flatten(path, inner if isinstance(inner, dict) else data)))
