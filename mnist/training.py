"""Training as a generator of progress reports."""

import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mnist import batch_norms, metrics, optimizers
from mnist.augmentation import MIRRORED_SHARE, change_images
from mnist.data import Dataset, Split
from mnist.folding import Factors

VALIDATION_SUBSET = 2_000  # validation images of a report before the end; the last one uses all
# Decay of a training form's weights per training image, at the learning rate's peak: 27 errors on
# 5,000 validation images instead of 29 after 400,000 images, log-loss 0.0160 instead of 0.0179.
DECAY = 2.5e-6
# Share of the target for all classes together (Szegedy et al. 2016, arXiv 1512.00567): 110 errors
# of 15,000 held-out images instead of 128 after 60,000 images, 59 instead of 66 after 600,000.
LABEL_SMOOTHING = 0.1
SPEED_S, SPEED_STEPS = 2.5, 4  # a speed measurement takes the longer of the two


class Diverged(ArithmeticError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Progress:
    """The state of a run after `samples` of `total` training images.

    `loss` is the mean since the last Progress, with label smoothing. `errors` counts the wrong ones
    of `n` validation images, and `log_loss` is their mean negative log-likelihood; all three are
    None without a validation. `state()` returns what fit() needs to resume here (tensors and
    numbers); call it before asking for the next Progress.
    """

    samples: int
    total: int
    loss: float
    errors: int | None = None
    n: int | None = None
    log_loss: float | None = None
    state: Callable[[], dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        return None if self.errors is None or not self.n else 1 - self.errors / self.n


def set_dropout(model: nn.Module, p: float | None) -> None:
    """Set the dropout probability (0..1) of all the model's dropout layers; None leaves them."""
    for layer in dropout_layers(model):
        layer.p = layer.p if p is None else p


def dropout_layers(model: nn.Module) -> list[nn.Dropout]:
    """The model's dropout layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


class ShuffledPasses:
    """Indices of n samples in shuffled passes, one pass after the other."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator = n, generator
        self.remaining = torch.empty(0, dtype=torch.long)  # of the passes begun

    def take(self, k: int) -> torch.Tensor:
        """The next k indices (k,) int64."""
        while len(self.remaining) < k:
            self.remaining = torch.cat(
                [self.remaining, torch.randperm(self.n, generator=self.generator)]
            )
        taken, self.remaining = self.remaining[:k], self.remaining[k:]
        return taken


def fit(
    model: nn.Module,
    dataset: Dataset,
    train: Split,
    validation: Split | None = None,
    *,
    batch_size: int = 33,
    optimizer: str = "Adam",
    lr: float = 0.00039,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    label_smoothing: float = LABEL_SMOOTHING,
    dropout: float | None = None,
    augmentation: float = 1.0,
    augment: str | None = None,
    mirror: float | None = None,
    schedule: str = "linear",
    samples: int,
    validate_at: Sequence[int] = (),
    subset: int = VALIDATION_SUBSET,
    seed: int = 0,
    micro_batch: int | None = None,
    bfloat16: bool = False,
    outliers: torch.Tensor | None = None,
    adjust_total: Callable[[int, int], int] | None = None,
    resume: dict[str, Any] | None = None,
) -> Generator[Progress]:
    """Train `model` in place on about `samples` images of `train`; both on one device.

    The defaults of batch_size, optimizer and lr are the published best; space.py lists the range of
    each hyperparameter. `augment` is by default the data set's `kind`; `mirror` is
    MIRRORED_SHARE, or 0 for digits and where classes are mirror images. `dropout` replaces the
    network's probabilities. Yields a Progress a hundred times a run, one with the errors on
    `subset` fixed validation images after each number of samples in `validate_at`, and at the end
    one with the errors on all of `validation`. A cycle of the learning rate ends at each of these
    numbers: the noise of a high rate would hide what was learnt (Loshchilov and Hutter 2017, arXiv
    1608.03983). At most `micro_batch` images pass through the network at once: the gradient is that
    of the whole batch, but batch norms see each part alone. With `bfloat16`, for training and
    validation, weights stay in float32. `outliers` are pictures uint8 (M, C, H, W) without a class:
    to each batch, OUTLIER_SHARE of its size of them is added, with the same probability for each
    class as their target. Before each Progress but the last, `adjust_total` gets the number of
    images seen and the total, and returns a new total, to which the schedule is stretched (not with
    `validate_at`). `resume` is the state() of an earlier Progress of the same run: with the same
    seed, model, number of threads and total, a resumed run gives the same weights on a CPU as an
    uninterrupted one. Raises Diverged.
    """
    batch_size = min(batch_size, len(train))
    steps = max(1, round(samples / batch_size))
    rung_steps = sorted({math.ceil(rung / batch_size) for rung in validate_at} - {0})
    batch_norms.check_batch_size(model, batch_size)
    generator = torch.Generator().manual_seed(seed)
    order = ShuffledPasses(len(train), generator)
    torch_optimizer = optimizers.make_optimizer(model, optimizer, lr, weight_decay, momentum)
    set_dropout(model, dropout)
    precision = torch.autocast(train.labels.device.type, torch.bfloat16, enabled=bfloat16)

    def loss_of(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with precision:
            logits = model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)

    n_classes = len(dataset.classes)
    factors = [module for module in model.modules() if isinstance(module, Factors)]
    decayed_weights = [layer.weight for module in factors for layer in module.layers]
    step = _load_state(resume, model, torch_optimizer, order) if resume else 0
    steps = (resume or {}).get("steps", steps)  # states of old versions lack it
    cycle_ends = [*(rung for rung in rung_steps if rung < steps), steps]
    losses: list[torch.Tensor] = []
    model.train()
    while step < steps:
        step += 1
        index = order.take(batch_size)
        images, targets = train.images[index], train.labels[index]
        if outliers is not None:
            images, targets = _add_outliers(images, targets, outliers, n_classes, generator)
        images = images.float() / 255
        if augmentation:
            images = _augment(images, generator, augmentation, dataset, augment, mirror)
        position = optimizers.cycle_position(step, cycle_ends)
        lr_factor = optimizers.learning_rate_factor(position, schedule)
        for group in torch_optimizer.param_groups:
            group["lr"] = lr * lr_factor
        torch_optimizer.zero_grad()
        inputs = (images - dataset.mean) / dataset.std
        losses.append(_backward(loss_of, inputs, targets, micro_batch or len(inputs)))
        torch_optimizer.step()
        decay_weights(decayed_weights, 1 - DECAY * batch_size * lr_factor)
        seen = step * batch_size
        is_rung = step in rung_steps
        if step < steps and not is_rung and step * 100 // steps == (step - 1) * 100 // steps:
            continue
        mean_loss = float(torch.stack(losses).mean())
        losses.clear()
        cycle_ends[-1] = steps = _adjust_steps(adjust_total, step, steps, batch_size)
        if not math.isfinite(mean_loss):
            raise Diverged(f"the loss is {mean_loss} after {seen} samples; a lower lr may help")
        state = functools.partial(_make_state, step, steps, model, torch_optimizer, order)
        wrong, n, log_loss = None, None, None
        if is_rung or step == steps:
            batch_norms.recompute_statistics(model, dataset, train, outliers)
            if validation is not None:
                split = validation if step == steps else validation.head(subset)
                with precision:
                    wrong, n, log_loss = metrics.validate(model, dataset, split)
                model.train()
        yield Progress(seen, steps * batch_size, mean_loss, wrong, n, log_loss, state)


def _adjust_steps(
    adjust_total: Callable[[int, int], int] | None, step: int, steps: int, batch_size: int
) -> int:
    """The new number of all steps after `step` of them, at least one more except at the end."""
    if adjust_total is None or step == steps:
        return steps
    return max(step + 1, round(adjust_total(step * batch_size, steps * batch_size) / batch_size))


@torch.no_grad()
def decay_weights(weights: list[torch.Tensor], factor: float) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    for weight in weights:
        weight.mul_(factor)


def _augment(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float,
    dataset: Dataset,
    kind: str | None,
    mirror: float | None,
) -> torch.Tensor:
    if mirror is None:
        mirror = 0.0 if dataset.kind == "digit" or dataset.mirrored_classes else MIRRORED_SHARE
    kind, is_ink = kind or dataset.kind, dataset.recipe == "digit"
    return change_images(images, generator, strength, kind, is_ink=is_ink, mirror=mirror)


def _add_outliers(
    images: torch.Tensor,
    labels: torch.Tensor,
    outliers: torch.Tensor,
    n_classes: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add outliers to a batch; returns images and the target probability of each class."""
    n = math.ceil(batch_norms.OUTLIER_SHARE * len(images))
    chosen = torch.randint(len(outliers), (n,), generator=generator)
    targets = F.one_hot(labels, n_classes).float()
    equal = torch.full((n, n_classes), 1 / n_classes, device=targets.device)
    return torch.cat([images, outliers[chosen]]), torch.cat([targets, equal])


def _backward(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    micro_batch: int,
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over micro-batches; returns that loss."""
    total = torch.zeros((), device=inputs.device)
    parts = math.ceil(len(inputs) / micro_batch)  # of nearly equal size: batch norms need 2 images
    splits = inputs.tensor_split(parts), targets.tensor_split(parts)
    for part, part_targets in zip(*splits, strict=True):
        loss = loss_of(part, part_targets) * (len(part) / len(inputs))
        loss.backward()
        total += loss.detach()
    return total


def _make_state(
    step: int, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, order: ShuffledPasses
) -> dict[str, Any]:
    return {
        "step": step,
        "steps": steps,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rest": order.remaining.clone(),
        "order": order.generator.get_state(),
        "torch": torch.get_rng_state(),
    }


def _load_state(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, order: ShuffledPasses
) -> int:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    order.remaining = state["rest"]
    order.generator.set_state(state["order"])
    torch.set_rng_state(state["torch"])
    return state["step"]


def measure_speed(
    model: nn.Module, dataset: Dataset, *, batch_size: int, **hyperparameters: Any
) -> float:
    """Training images per second on this machine, over SPEED_S seconds or SPEED_STEPS steps.

    The first half does not count. The measurement trains the model; discard it afterwards.
    """
    hyperparameters |= {"batch_size": batch_size, "samples": 100 * batch_size}  # reports each step
    run = fit(model, dataset, dataset.train, **hyperparameters)
    seen: list[tuple[int, float]] = []
    for progress in run:
        if progress.samples < progress.total or not seen:  # the last step also validates
            seen.append((progress.samples, time.perf_counter()))
        if len(seen) >= SPEED_STEPS and seen[-1][1] - seen[0][1] > SPEED_S:
            break
    (m, start), (n, end) = seen[len(seen) // 2], seen[-1]
    return (n - m) / (end - start)
