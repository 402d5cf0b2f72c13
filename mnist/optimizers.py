"""Optimizers by name, and the schedules of their learning rate."""

import bisect
import math
from collections.abc import Sequence

import torch
from torch import nn

OPTIMIZERS = ("Adam", "AdamW", "RMSprop", "SGD")
SCHEDULES = ("linear", "cosine", "constant")
WARM_UP = 0.15  # share of a cycle in which the learning rate rises


def make_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer called `name` (one of OPTIMIZERS), fused where torch has a fused one.

    `momentum` applies to SGD (default 0.9, Nesterov) and RMSprop (default 0).
    """
    weights, decay = model.parameters(), weight_decay
    match name:
        case "Adam":
            return torch.optim.Adam(weights, lr, weight_decay=decay, fused=True)
        case "AdamW":
            return torch.optim.AdamW(weights, lr, weight_decay=decay, fused=True)
        case "SGD":
            momentum = 0.9 if momentum is None else momentum
            return torch.optim.SGD(
                weights, lr, momentum, weight_decay=decay, nesterov=momentum > 0, fused=True
            )
        case "RMSprop":
            return torch.optim.RMSprop(
                weights, lr, momentum=momentum or 0.0, weight_decay=decay, foreach=True
            )
    raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")


def learning_rate_factor(position: float, schedule: str = "linear") -> float:
    """The factor on the learning rate at a position (0..1) in a cycle.

    It rises to 1 during WARM_UP, then falls to 0 by `schedule`, one of SCHEDULES; "constant" stays.
    """
    if position < WARM_UP or schedule == "constant":
        return min(position / WARM_UP, 1.0)
    remaining = (1 - position) / (1 - WARM_UP)
    return remaining if schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2


def cycle_position(step: int, ends: Sequence[int]) -> float:
    """The position (0..1) of a step (1..) in its learning rate cycle.

    `ends` are the last steps of the cycles, ascending.
    """
    i = bisect.bisect_left(ends, step)
    start = ends[i - 1] if i else 0
    return (step - 0.5 - start) / (ends[i] - start)
