"""Search spaces: the hyperparameters, named spaces, files and single entries."""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from mnist import augmentation, optimizers
from mnist.shell import expand_home

Space = dict[str, BaseDistribution]


class SpaceError(ValueError):
    """A search space or an entry of one is invalid."""


@dataclass(frozen=True)
class NumberRange:
    """A numeric hyperparameter, from `low` to `high`."""

    low: float
    high: float
    description: str
    whole: bool = False

    def describe_limits(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choices:
    """A categorical hyperparameter."""

    words: tuple[str, ...]
    description: str

    def describe_limits(self) -> str:
        return ", ".join(self.words)


HYPERPARAMETERS: dict[str, NumberRange | Choices] = {
    "batch_size": NumberRange(1, 4096, "images a step", whole=True),
    "optimizer": Choices(optimizers.OPTIMIZERS, "what turns gradients into steps"),
    "lr": NumberRange(1e-8, 10, "learning rate, the highest of its schedule"),
    "weight_decay": NumberRange(0, 1, "pulls weights to zero"),
    "momentum": NumberRange(0, 0.999, "of SGD and RMSprop; other optimizers ignore it"),
    "label_smoothing": NumberRange(0, 0.5, "share of the target that is spread over all classes"),
    "dropout": NumberRange(0, 0.9, "of all the network's dropout layers"),
    "augmentation": NumberRange(0, 3, "strength of the random changes of training images"),
    "augment": Choices(augmentation.KINDS, "kind of these changes; by default --augment"),
    "mirror": NumberRange(0, 1, "share of training images that exchange left and right"),
    "schedule": Choices(optimizers.SCHEDULES, "how the learning rate falls after its warm-up"),
}
"""The hyperparameters of training.fit, with their limits."""

DEFAULT: Space = {
    "batch_size": IntDistribution(32, 256, log=True),
    "optimizer": CategoricalDistribution(("Adam", "RMSprop", "SGD")),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
}
WIDE: Space = {
    "batch_size": IntDistribution(16, 512, log=True),
    "optimizer": CategoricalDistribution(optimizers.OPTIMIZERS),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
    "momentum": FloatDistribution(0.5, 0.99),
    "label_smoothing": FloatDistribution(0.0, 0.2),
    "augmentation": FloatDistribution(0.0, 2.0),
    "schedule": CategoricalDistribution(optimizers.SCHEDULES),
}
SPACES = {"default": DEFAULT, "wide": WIDE}
SPECS = "float:LOW:HIGH, int:LOW:HIGH, either with :log, choice:A,B,… or a single value"


def read_space(
    name: str,
    entries: Iterable[str] = (),
    dropout: bool = True,
    pictures: bool = False,
    mirror: bool = True,
) -> Space:
    """The named space or TOML file `name`; each "NAME=SPEC" of `entries` replaces or adds an entry.

    `dropout`: whether the network has dropout layers; `pictures`: whether the images are no ink,
    so that several kinds of augmentation may suit them; `mirror`: whether mirroring may, too.
    Raises SpaceError, which names the entry.
    """
    if name in SPACES:
        space = dict(SPACES[name])
        if name == "wide" and dropout:
            space["dropout"] = FloatDistribution(0.0, 0.7)
        if name == "wide" and pictures:
            space["augment"] = CategoricalDistribution(("digit", *augmentation.PICTURE_LIMITS))
            if mirror:
                space["mirror"] = CategoricalDistribution((0.0, augmentation.MIRRORED_SHARE))
    else:
        try:
            space = {key: parse_distribution(key, spec) for key, spec in _read_file(name).items()}
        except SpaceError as error:
            raise SpaceError(f"{name}: {error}") from error
    for entry in entries:
        key, equals, spec = entry.partition("=")
        if not equals:
            raise SpaceError(f"{entry!r} is not NAME=SPEC, such as lr=float:1e-5:1e-1:log")
        space[key.strip()] = parse_distribution(key.strip(), spec.strip())
    if not space:
        raise SpaceError(f'{name} has no entries; one line is, e.g., lr = "float:1e-5:1e-1:log"')
    if "dropout" in space and not dropout:
        raise SpaceError("dropout: the network has no dropout layer; leave the entry out")
    return space


def _read_file(name: str) -> Mapping[str, Any]:
    try:
        content = Path(expand_home(name)).read_bytes()
        return tomllib.loads(content.decode("utf-8-sig"))  # may have a BOM
    except FileNotFoundError as error:
        raise SpaceError(f"neither a space ({', '.join(SPACES)}) nor a file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpaceError(f"the file cannot be read: {error}") from error


def parse_distribution(key: str, spec: Any) -> BaseDistribution:
    """The distribution of hyperparameter `key` by `spec`, one of SPECS. Raises SpaceError."""
    param = HYPERPARAMETERS.get(key)
    if param is None:
        raise SpaceError(f"{key}: no such hyperparameter; known: {', '.join(HYPERPARAMETERS)}")
    if spec == []:
        raise SpaceError(f"{key}: the list is empty; give it a value, or leave the entry out")
    if isinstance(spec, list):  # in TOML: ["Adam", "SGD"]
        return _parse_choices(key, param, map(str, spec))
    kind, *parts = str(spec).split(":")
    if kind in ("float", "int"):
        return _parse_range(key, param, kind, parts, str(spec))
    words = parts[0].split(",") if kind == "choice" and len(parts) == 1 else [str(spec)]
    return _parse_choices(key, param, words)


def _parse_choices(
    key: str, param: NumberRange | Choices, words: Iterable[str]
) -> CategoricalDistribution:
    values = [_parse_value(key, param, word.strip()) for word in words]
    return CategoricalDistribution(list(dict.fromkeys(values)))


def _parse_range(
    key: str, param: NumberRange | Choices, kind: str, parts: list[str], spec: str
) -> BaseDistribution:
    log = parts[2:] == ["log"]
    if len(parts) != 2 + log or isinstance(param, Choices) or param.whole != (kind == "int"):
        kind_name = "int" if isinstance(param, NumberRange) and param.whole else "float"
        example = "choice:A,B" if isinstance(param, Choices) else f"{kind_name}:LOW:HIGH[:log]"
        raise SpaceError(f"{key}: {spec!r} does not fit; {example} does, or a single value")
    low, high = (_parse_value(key, param, part) for part in parts[:2])
    if low > high or (log and low <= 0):
        reason = "LOW is above HIGH" if low > high else "log needs LOW above 0"
        raise SpaceError(f"{key}: {spec!r}: {reason}")
    if kind == "int":
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _parse_value(key: str, param: NumberRange | Choices, word: str) -> Any:
    if isinstance(param, Choices):
        if word not in param.words:
            hint = f"; choice:{word} lets each be chosen" if "," in word else ""
            raise SpaceError(f"{key}: {word!r} is not one of {param.describe_limits()}{hint}")
        return word
    try:
        value = int(word) if param.whole else float(word)
    except ValueError as error:
        kind, name = ("a whole number", "int") if param.whole else ("a number", "float")
        raise SpaceError(
            f"{key}: {word!r} is not {kind}; it may be {name}:LOW:HIGH, that with :log, "
            "choice:A,B,… or a single value"
        ) from error
    if not param.low <= value <= param.high:
        raise SpaceError(f"{key}: {word} is not in {param.describe_limits()}")
    return value


def describe_repeats(space: Space, trials: int) -> str | None:
    """A warning where the space has fewer combinations than there are trials, so that some repeat
    others: they have the same seed, too, and the same result."""
    n = math.prod(map(_count_values, space.values()))
    if n >= trials:
        return None
    combinations = f"{n} combinations" if n > 1 else "one combination"
    return (
        f"the search space has only {combinations} for {trials} trials, so trials repeat others "
        "exactly; a range, such as --param lr=float:1e-5:1e-1:log, or fewer --trials avoid that"
    )


def _count_values(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return distribution.high - distribution.low + 1
    return 1 if distribution.single() else math.inf


def filter_params(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `params` that lie inside the space."""
    return {
        key: value for key, value in params.items() if key in space and _contains(space[key], value)
    }


def describe_outside(space: Space, params: Mapping[str, Any]) -> str | None:
    """Which of `params` lies outside the space, and what lies inside; None where all lie inside."""
    for key, value in params.items():
        if key not in space:
            return f"{key} is not in the space, which has {', '.join(space)}"
        if not _contains(space[key], value):
            return f"{key} {value!r} is not in {space[key]}"
    return None


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    is_whole = isinstance(distribution, FloatDistribution) or float(value).is_integer()
    return is_whole and distribution.low <= value <= distribution.high
