"""How much compute a request may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.scales import Source

CAUSAL_MODES = ("calibrated",)
QUANTILE_MODES = ("batch_quantile", "seq_quantile", "exact_k")
MODES = CAUSAL_MODES + QUANTILE_MODES
KV_MODES = ("dense", "copy")
BRANCHES = ("attn", "mlp")
SCALE_SOURCES: tuple[Source, ...] = get_args(Source)
THRESHOLD_SOURCES = ("learned", "variance", "entropy")
_NEED_TOKENS = ("quadtree", "random")


@dataclass(frozen=True, slots=True)
class ExpertPolicy:
    """How many of the k experts a token has chosen it may use; the strictest limit holds.

    Every limit looks at one token of one layer alone, so it is causal. Experts rank by the score
    that makes their weight, the best first; the weights of those that are used are made anew, where
    the model normalises weights at all.

    Attributes:
        slots: at most this many experts.
        gap: stop at the first expert whose score exceeds the next one's by more than this: adaptive
            gating (Li et al., EMNLP 2023) for any k. Equality keeps the next.
        mass: the fewest experts that hold this share of the k experts' scores.

    Raises:
        InvalidInput: no limit at all, or one outside its range.
    """

    slots: int | None = None
    gap: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        if self.slots is None and self.gap is None and self.mass is None:
            raise InvalidInput("experts: expected at least one of slots, gap, mass")
        slots = self.slots
        if slots is not None and (type(slots) is not int or slots < 1):
            raise InvalidInput(f"experts: slots must be an integer of 1 or more, got {slots!r}")
        if self.gap is not None and not (_is_number(self.gap) and 0 <= self.gap <= 1):
            raise InvalidInput(f"experts: gap must be a number in [0, 1], got {self.gap!r}")
        if self.mass is not None and not (_is_number(self.mass) and 0 < self.mass <= 1):
            raise InvalidInput(f"experts: mass must be a number in (0, 1], got {self.mass!r}")

    @staticmethod
    def of(value: object) -> ExpertPolicy:
        """From its JSON form: a number of slots, or an object of limits.

        Raises:
            InvalidInput: anything else, named.
        """
        if isinstance(value, ExpertPolicy):
            return value
        if type(value) is int:
            return ExpertPolicy(slots=value)
        names = [field.name for field in fields(ExpertPolicy)]
        if not isinstance(value, dict):
            raise InvalidInput(
                f"experts: expected an integer, or an object of {', '.join(names)}, got {value!r}"
            )
        for name in value:
            if name not in names:
                raise InvalidInput(f"experts: unknown limit {name!r}; known: {', '.join(names)}")
        return ExpertPolicy(**value)

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name, value in self.limits.items())

    @property
    def limits(self) -> dict[str, float]:
        """Its JSON form: the limits that are set."""
        named = {"slots": self.slots, "gap": self.gap, "mass": self.mass}
        return {name: value for name, value in named.items() if value is not None}

    def limits_row(self, k: int) -> tuple[float, float, float]:
        """A row of the planner's limits for k experts per token: slots, gap, mass; inf is none."""
        return (
            float(k if self.slots is None else self.slots),
            math.inf if self.gap is None else self.gap,
            math.inf if self.mass is None else self.mass,
        )


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """When images may leave a model that has early exits.

    Attributes:
        threshold: of every exit, on the confidence of its criterion (larger: fewer leave); an
            entropy's confidence is minus the entropy.
        never: no image leaves early.
        tau: of JEI-DNN gates, leave where mass + gate / tau reaches the threshold: an extension of
            the paper's 0.5; larger: fewer leave.
        level: whoever is still there leaves at this exit, counted from 0.

    Raises:
        InvalidInput: nothing is set, `never` beside another, or a value outside its range.
    """

    threshold: float | None = None
    never: bool = False
    tau: float | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        others = (self.threshold, self.tau, self.level)
        if self.never == any(value is not None for value in others):
            raise InvalidInput("exit: expected never, or at least one of threshold, tau, level")
        threshold, tau, level = others
        if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
            raise InvalidInput(f"exit: threshold must be a finite number, got {threshold!r}")
        if tau is not None and not (_is_number(tau) and 0 < tau < math.inf):
            raise InvalidInput(f"exit: tau must be a positive number, got {tau!r}")
        if level is not None and (type(level) is not int or level < 0):
            raise InvalidInput(f"exit: level must be an integer of 0 or more, got {level!r}")

    @staticmethod
    def of(value: object) -> ExitPolicy:
        """From its JSON form: "never", a threshold, or an object of fields.

        Raises:
            InvalidInput: anything else, named.
        """
        if isinstance(value, ExitPolicy):
            return value
        if value == "never":
            return ExitPolicy(never=True)
        if isinstance(value, int | float) and _is_number(value):
            return ExitPolicy(threshold=float(value))
        names = [field.name for field in fields(ExitPolicy)]
        if not isinstance(value, dict):
            raise InvalidInput(
                f"exit: expected 'never', a number, or an object of {', '.join(names)}, "
                f"got {value!r}"
            )
        for name in value:
            if name not in names:
                raise InvalidInput(f"exit: unknown field {name!r}; known: {', '.join(names)}")
        return ExitPolicy(**value)


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """Which regions of an image stay one coarse patch, in a model of mixed scales.

    Attributes:
        source: who decides: a ``learned`` gate, the ``variance`` or ``entropy`` of a patch's
            pixels, ``quadtree`` or ``random`` up to `tokens`, ``all_fine`` or ``all_coarse``; None:
            the model's own.
        threshold: of a learned gate, on its logit (larger: more regions are fine); of variance and
            entropy, below which a patch stays coarse (smaller: more are fine), one for all scales
            or one for each of the model's ratios. None: the model's own.
        tokens: patches that an image may have, prefix rows aside: those that ask most for it are
            fine, as many as fit. Without a threshold, tokens alone decide.
        seed: of ``random``.

    Raises:
        InvalidInput: nothing is set, fields that do not belong together, or a value outside its
            range.
    """

    source: Source | None = None
    threshold: float | tuple[float, ...] | None = None
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        source, tokens = self.source, self.tokens
        if source is None and self.threshold is None and tokens is None:
            raise InvalidInput("scales: expected at least one of source, threshold, tokens")
        if source is not None and source not in SCALE_SOURCES:
            raise InvalidInput(
                f"scales: source must be one of {', '.join(SCALE_SOURCES)}, got {source!r}"
            )
        if self.threshold is not None:
            self._check_threshold(self.threshold)
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise InvalidInput(f"scales: tokens must be an integer of 1 or more, got {tokens!r}")
        if tokens is not None and source in ("all_fine", "all_coarse"):
            raise InvalidInput(f"scales: {source} leaves nothing for tokens to choose")
        if tokens is None and source in _NEED_TOKENS:
            raise InvalidInput(f"scales: {source} needs tokens, the patches an image may have")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InvalidInput(f"scales: seed must be an integer in [0, 2^63), got {self.seed!r}")

    def _check_threshold(self, threshold: Any) -> None:
        many = isinstance(threshold, list | tuple)
        values: tuple[Any, ...] = tuple(threshold) if many else (threshold,)
        if not values or not all(_is_number(v) and math.isfinite(v) for v in values):
            raise InvalidInput(
                f"scales: threshold must be a finite number, or one for each scale, got "
                f"{threshold!r}"
            )
        if self.source is not None and self.source not in THRESHOLD_SOURCES:
            raise InvalidInput(
                f"scales: threshold belongs to {', '.join(THRESHOLD_SOURCES)}, not {self.source!r}"
            )
        if many:
            object.__setattr__(self, "threshold", values)

    @staticmethod
    def of(value: object) -> ScalePolicy:
        """From its JSON form: a threshold, a source, "random:TOKENS:SEED", or an object of fields.

        Raises:
            InvalidInput: anything else, named.
        """
        if isinstance(value, ScalePolicy):
            return value
        if isinstance(value, int | float) and _is_number(value):
            return ScalePolicy(threshold=float(value))
        if isinstance(value, str):
            return _named_scales(value)
        names = [field.name for field in fields(ScalePolicy)]
        if not isinstance(value, dict):
            raise InvalidInput(
                f"scales: expected a number, a source, 'random:TOKENS:SEED', or an object of "
                f"{', '.join(names)}, got {value!r}"
            )
        for name in value:
            if name not in names:
                raise InvalidInput(f"scales: unknown field {name!r}; known: {', '.join(names)}")
        return ScalePolicy(**value)

    def __str__(self) -> str:
        named = {"source": self.source, "threshold": self.threshold, "tokens": self.tokens}
        parts = [f"{name}={value}" for name, value in named.items() if value is not None]
        return ",".join([*parts, *([f"seed={self.seed}"] if self.seed else [])])


@dataclass(frozen=True, slots=True)
class ComputePolicy:
    """A compute budget and the rule that spends it; None means what the model folder stores.

    Attributes:
        budget: share to keep, in [0, 1]: of branch executions in a model with residual gates (the
            skip ratio is 1 - budget), of the experts per token in one that has experts alone, of
            the work of the whole network in one that has early exits or mixed scales.
        mode: ``calibrated`` (fixed thresholds: causal, independent of batch mates), or a published
            non-causal rule of residual gates: ``batch_quantile``, ``seq_quantile`` or ``exact_k``.
        exit: when images may leave; see `exit_policy`. It takes the place of the exits that the
            checkpoint or a budget would choose.
        scales: which regions of an image stay coarse; see `scale_policy`. It takes the place of
            what the checkpoint or a budget would choose, and may be set together with `exit`.
        experts: limits on the experts of a token, or their number; see `expert_policy`. A policy
            that sets them and no budget leaves the rest of the model whole.
        kv_mode: ``dense`` computes keys and values of skipped tokens, ``copy`` takes those of the
            layer below (an approximation: measure accuracy before using it).
        branches: the branches that may skip.
        every_second_layer: layers with an even index never skip.

    Raises:
        InvalidInput: a value outside its range.
    """

    budget: float | None = None
    mode: str | None = None
    exit: ExitPolicy | str | float | None = None
    scales: ScalePolicy | str | float | None = None
    experts: int | ExpertPolicy | None = None
    kv_mode: str | None = None
    branches: tuple[str, ...] = BRANCHES
    every_second_layer: bool = False

    def __post_init__(self) -> None:
        budget = self.budget
        if budget is not None and not (_is_number(budget) and 0 <= budget <= 1):
            raise InvalidInput(f"budget must be a number in [0, 1], got {budget!r}")
        if self.mode is not None and self.mode not in MODES:
            raise InvalidInput(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.kv_mode is not None and self.kv_mode not in KV_MODES:
            raise InvalidInput(
                f"kv_mode must be one of {', '.join(KV_MODES)}, got {self.kv_mode!r}"
            )
        if not set(self.branches) <= set(BRANCHES):
            raise InvalidInput(f"branches must be among {BRANCHES}, got {self.branches}")
        if self.exit is not None:
            object.__setattr__(self, "exit", ExitPolicy.of(self.exit))
        if self.scales is not None:
            object.__setattr__(self, "scales", ScalePolicy.of(self.scales))
        if self.experts is not None:
            object.__setattr__(self, "experts", ExpertPolicy.of(self.experts))

    @property
    def expert_policy(self) -> ExpertPolicy | None:
        """`experts` as limits: a number k means ``slots=k``."""
        return None if self.experts is None else ExpertPolicy.of(self.experts)

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """`exit` as a record."""
        return None if self.exit is None else ExitPolicy.of(self.exit)

    @property
    def scale_policy(self) -> ScalePolicy | None:
        """`scales` as a record."""
        return None if self.scales is None else ScalePolicy.of(self.scales)

    def may_skip(self, layer: int, branch: int) -> bool:
        """Whether branch 0 (attention) or 1 (MLP) of a layer may skip at all."""
        if self.every_second_layer and layer % 2 == 0:
            return False
        return BRANCHES[branch] in self.branches


def _named_scales(text: str) -> ScalePolicy:
    """A source by its name, or "random:TOKENS" or "random:TOKENS:SEED"."""
    source, *numbers = text.split(":")
    if source == "random" and 1 <= len(numbers) <= 2 and all(n.isdecimal() for n in numbers):
        return ScalePolicy(
            "random", tokens=int(numbers[0]), seed=int(numbers[-1]) if numbers[1:] else 0
        )
    if source not in SCALE_SOURCES or numbers:
        raise InvalidInput(
            f"scales: expected one of {', '.join(SCALE_SOURCES)} or random:TOKENS:SEED, got "
            f"{text!r}"
        )
    return ScalePolicy(source)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
