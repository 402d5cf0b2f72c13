"""Training as a generator of progress reports, and the evaluation of a model."""

import bisect
import ctypes
import functools
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from torch.nn import functional as F

from mnist.data import Dataset, Split
from mnist.folding import Factors
from mnist.inference import probabilities

OPTIMIZERS = ("Adam", "AdamW", "RMSprop", "SGD")
SCHEDULES = ("linear", "cosine", "constant")
WARM_UP = 0.15  # share of a cycle in which the learning rate rises
VALIDATION_SUBSET = 2_000  # validation images of a report before the end; the last one uses all
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, in malloc.h
MAX_KEPT_BYTES = 2**30  # freed memory that the process keeps
NORM_IMAGES = 1_000  # training images for the statistics of batch norms
# Images per forward pass in evaluation. With 250, a run of batch 64 takes 292 MB instead of 148,
# and one of batch 256 463 MB instead of 333 (`parallel` in bfloat16; imports and data: 360 MB).
EVAL_BATCH = 125
MIN_PROBABILITY = 1e-12  # lower bound in a log-loss, which is infinite for 0
# Decay of a training form's weights per training image, at the learning rate's peak: 27 errors on
# 5,000 validation images instead of 29 after 400,000 images, log-loss 0.0160 instead of 0.0179.
DECAY = 2.5e-6
SPEED_S, SPEED_STEPS = 2.5, 4  # a speed measurement takes the longer of the two
# Largest rotation (rad), change of scale (1) and shift (pixels) of an augmentation of strength 1.
ROTATION, SCALE, SHIFT = math.radians(8), 0.08, 1.5


class Diverged(ArithmeticError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Progress:
    """The state of a run after `samples` of `total` training images.

    `loss` is the mean since the last Progress. `errors` counts the wrong ones of `n` validation
    images, and `log_loss` is their mean negative log-likelihood; all three are None without a
    validation. `state()` returns what fit() needs to resume here (tensors and numbers); call it
    before asking for the next Progress.
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


def select_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" prefers cuda, then mps, then cpu.

    Raises ValueError where this machine lacks the device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available.get(name):
        raise ValueError(f"device {name!r} is not on this machine; use auto or cpu")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones, instead of returning it.

    By default glibc returns large blocks to the kernel, which clears each page before its next
    use: a step of batch 33 took 1.4 times as long (two cores of Zen 5, 2026-11-29).
    """
    mallopt = _find_libc_function("mallopt")
    if mallopt and mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BYTES):  # or it maps blocks one by one
        mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES)


def return_freed_memory() -> None:
    """Let glibc return freed memory now: between runs, whose batches differ in size."""
    if trim := _find_libc_function("malloc_trim"):
        trim(0)


def _find_libc_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where the library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def standardise(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """uint8 (N, C, H, W), 0..255 -> float32; the training split gets mean 0 and deviation 1."""
    return (images.float() / 255 - dataset.mean) / dataset.std


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    padding: str = "zeros",
) -> torch.Tensor:
    """Rotate, scale and shift each image (N, C, H, W) float32 at random, by `strength`.

    Pixels from outside the image are 0, or with padding "border" the nearest edge pixel.
    """
    n, size = len(images), images.shape[-1]
    uniform = (torch.rand(n, 4, generator=generator).to(images.device) * 2 - 1) * strength
    angle, zoom = uniform[:, 0] * ROTATION, 1 + uniform[:, 1] * SCALE
    shift = uniform[:, 2:] * SHIFT * 2 / size  # affine_grid's unit is half an image
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = (torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


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


def set_dropout(model: nn.Module, p: float) -> None:
    """Set the dropout probability (0..1) of all the model's dropout layers."""
    for layer in dropout_layers(model):
        layer.p = p


def dropout_layers(model: nn.Module) -> list[nn.Dropout]:
    """The model's dropout layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


def cycle_position(step: int, ends: Sequence[int]) -> float:
    """The position (0..1) of a step (1..) in its learning rate cycle.

    `ends` are the last steps of the cycles, ascending.
    """
    i = bisect.bisect_left(ends, step)
    start = ends[i - 1] if i else 0
    return (step - 0.5 - start) / (ends[i] - start)


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
    label_smoothing: float = 0.0,
    dropout: float | None = None,
    augmentation: float = 1.0,
    schedule: str = "linear",
    samples: int,
    validate_at: Sequence[int] = (),
    subset: int = VALIDATION_SUBSET,
    seed: int = 0,
    micro_batch: int | None = None,
    bfloat16: bool = False,
    resume: dict[str, Any] | None = None,
) -> Generator[Progress]:
    """Train `model` in place on about `samples` images of `train`; both on one device.

    The defaults of batch_size, optimizer and lr are the published best; space.py lists the range of
    each hyperparameter. `dropout` replaces the network's probabilities. Yields a Progress a hundred
    times a run, one with the errors on `subset` fixed validation images after each number of
    samples in `validate_at`, and at the end one with the errors on all of `validation`. A cycle of
    the learning rate ends at each of these numbers: the noise of a high rate would hide what was
    learnt (Loshchilov and Hutter 2017, arXiv 1608.03983). At most `micro_batch` images pass through
    the network at once: the gradient is that of the whole batch, but batch norms see each part
    alone. With `bfloat16`, for training and
    validation, weights stay in float32. `resume` is the state() of an earlier Progress
    of the same run: with the same seed, model and number of threads, a resumed run gives the same
    weights on a CPU as an uninterrupted one. Raises Diverged.
    """
    batch_size = min(batch_size, len(train))
    steps = max(1, round(samples / batch_size))
    total = steps * batch_size
    rung_steps = sorted({math.ceil(rung / batch_size) for rung in validate_at} - {0})
    cycle_ends = [*(step for step in rung_steps if step < steps), steps]
    check_batch_size(model, batch_size)
    generator = torch.Generator().manual_seed(seed)
    order = ShuffledPasses(len(train), generator)
    torch_optimizer = make_optimizer(model, optimizer, lr, weight_decay, momentum)
    if dropout is not None:
        set_dropout(model, dropout)
    precision = torch.autocast(train.labels.device.type, torch.bfloat16, enabled=bfloat16)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision:
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    factors = [module for module in model.modules() if isinstance(module, Factors)]
    decayed_weights = [layer.weight for module in factors for layer in module.layers]
    start_step = _load_state(resume, model, torch_optimizer, order) if resume else 0
    losses: list[torch.Tensor] = []
    padding = "zeros" if dataset.recipe == "digit" else "border"
    model.train()
    for step in range(start_step + 1, steps + 1):
        index = order.take(batch_size)
        images = train.images[index].float() / 255
        if augmentation:
            images = augment(images, generator, augmentation, padding)
        lr_factor = learning_rate_factor(cycle_position(step, cycle_ends), schedule)
        for group in torch_optimizer.param_groups:
            group["lr"] = lr * lr_factor
        torch_optimizer.zero_grad()
        inputs = (images - dataset.mean) / dataset.std
        labels = train.labels[index]
        losses.append(_backward(loss_of, inputs, labels, micro_batch or batch_size))
        torch_optimizer.step()
        decay_weights(decayed_weights, 1 - DECAY * batch_size * lr_factor)
        seen = step * batch_size
        is_rung = step in rung_steps
        if step < steps and not is_rung and step * 100 // steps == (step - 1) * 100 // steps:
            continue
        mean_loss = float(torch.stack(losses).mean())
        losses.clear()
        if not math.isfinite(mean_loss):
            raise Diverged(f"the loss is {mean_loss} after {seen} samples; a lower lr may help")
        state = functools.partial(_make_state, step, model, torch_optimizer, order)
        if is_rung or step == steps:
            recompute_batch_norms(model, dataset, train)
        split = validation if step == steps else validation and validation.head(subset)
        if split is None or not (is_rung or step == steps):
            yield Progress(seen, total, mean_loss, state=state)
            continue
        with precision:
            wrong, n, log_loss = _validate(model, dataset, split)
        yield Progress(seen, total, mean_loss, wrong, n, log_loss, state)
        model.train()


def check_batch_size(model: nn.Module, batch_size: int) -> None:
    """Raise ValueError for a batch of one image in a network with 1-d batch norms."""
    if batch_size == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules()):
        raise ValueError("batch_size is 1; batch norms need at least 2, or use --plain")


def batch_norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """The model's batch norms that track running statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats
    ]


@torch.no_grad()
def recompute_batch_norms(model: nn.Module, dataset: Dataset, train: Split) -> None:
    """Replace the batch norms' statistics by those of NORM_IMAGES unaugmented training images.

    The running statistics are of augmented images and lag some steps behind: with them, the same
    weights made 251 errors on 5,000 validation images after 8,000 training images, with those of
    2,000 unaugmented images 127 (`parallel`, Adam, batch 64, lr 0.003; docs/lab-log.md has more).
    """
    layers = batch_norms(model)
    if not layers:
        return
    momenta = [norm.momentum for norm in layers]
    model.eval()  # dropout stays off
    for norm in layers:
        norm.reset_running_stats()
        norm.momentum = None  # average over all batches
        norm.train()
    images = train.head(NORM_IMAGES).images
    for batch in images.split(EVAL_BATCH)[: max(1, len(images) // EVAL_BATCH)]:  # of equal size
        model(standardise(batch, dataset))
    for norm, value in zip(layers, momenta, strict=True):
        norm.momentum = value
    model.train()


@torch.no_grad()
def decay_weights(weights: list[torch.Tensor], factor: float) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    for weight in weights:
        weight.mul_(factor)


def _backward(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    micro_batch: int,
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over micro-batches; returns that loss."""
    total = torch.zeros((), device=inputs.device)
    parts = math.ceil(len(labels) / micro_batch)  # of nearly equal size: batch norms need 2 images
    for images, targets in zip(inputs.tensor_split(parts), labels.tensor_split(parts), strict=True):
        loss = loss_of(images, targets) * (len(targets) / len(labels))
        loss.backward()
        total += loss.detach()
    return total


def _make_state(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, order: ShuffledPasses
) -> dict[str, Any]:
    return {
        "step": step,
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


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, images: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Probabilities (N, classes) float32, on the CPU, for uint8 images (N, C, H, W)."""
    model.eval()
    logits = [model(standardise(batch, dataset)).float() for batch in images.split(EVAL_BATCH)]
    return torch.from_numpy(probabilities(torch.cat(logits).cpu().numpy(), temperature))


def errors(model: nn.Module, dataset: Dataset, split: Split) -> int:
    """The number of images of `split` that the model classifies wrongly."""
    return int((predict(model, dataset, split.images).argmax(1) != split.labels.cpu()).sum())


def _validate(model: nn.Module, dataset: Dataset, split: Split) -> tuple[int, int, float]:
    """Errors, number of images, and log-loss."""
    predicted, labels = predict(model, dataset, split.images), split.labels.cpu()
    true_probabilities = predicted[torch.arange(len(labels)), labels].clamp_min(MIN_PROBABILITY)
    wrong = int((predicted.argmax(1) != labels).sum())
    return wrong, len(labels), -float(true_probabilities.log().mean())


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
            run.close()
            break
    (m, start), (n, end) = seen[len(seen) // 2], seen[-1]
    return (n - m) / (end - start)


def worst_mistakes(probabilities: torch.Tensor, labels: torch.Tensor, limit: int) -> torch.Tensor:
    """Indices (M,) int64, M <= `limit`, of the mistakes with the lowest probability of the true
    class, the worst first."""
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    true_probabilities = probabilities[wrong, labels[wrong]]
    return wrong[true_probabilities.argsort(stable=True)[:limit]]


def classification_scores(
    probabilities: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """The scores of one split for a model's record.

    Errors, n and accuracy with its 95 % interval (Wilson's), and for each class precision, recall
    and F1 (0..1).
    """
    predicted, n = probabilities.argmax(1), len(labels)
    wrong = int((predicted != labels).sum())
    interval = binomtest(n - wrong, n).proportion_ci(0.95, method="wilson")
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=0.0
    )
    return {
        "errors": wrong,
        "n": n,
        "accuracy": round(1 - wrong / n, 6),
        "interval95": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "per_class": {
            name: {
                "precision": round(float(precision[i]), 4),
                "recall": round(float(recall[i]), 4),
                "f1": round(float(f1[i]), 4),
            }
            for i, name in enumerate(classes)
        },
    }
