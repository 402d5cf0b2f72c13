"""One training run, as a generator that yields progress; and the evaluation of a model."""

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
SUBSET = 2_000  # validation images behind a report in mid-run; the last report uses them all
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
KEPT_BYTES = 2**30  # most that is kept
NORM_IMAGES = 1_000  # for the statistics of batch norms
# Images at a time where nothing is trained: with 250 a run of batch 64 takes 292 MB, not 148, and
# one of batch 256 463 MB, not 333 (`parallel` in bfloat16, beside 360 for imports and data).
PART = 125
LEAST_PROBABILITY = 1e-12  # in a log-loss, which would be infinite of a 0
# Weights of a training form shrink by this share with each image, by the learning rate's schedule:
# 27 errors of 5,000 validation images instead of 29 after 400,000, log-loss 0.0160 for 0.0179.
DECAY = 2.5e-6
SPEED_S, SPEED_STEPS = 2.5, 4  # for which a machine's speed is measured, the longer of the two
ROTATION, SCALE, SHIFT = (
    math.radians(8),
    0.08,
    1.5,
)  # augmentation: at most so much (rad, 1, pixels)


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `samples` of `total` training images.

    `loss` is the mean since the last Progress; `errors` of `n` validation images are wrong, and
    `log_loss` is their mean negative log-likelihood; None where nothing was validated. `state()`
    is all that fit() needs to go on from here (tensors and numbers); to be called before the next
    Progress is asked for.
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


def device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes cuda, then mps, then cpu.

    Raises ValueError where this machine does not have it.
    """
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    if not have.get(name):
        raise ValueError(f"device {name!r} is not on this machine; use auto or cpu")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free, for the next ones, while the process lives.

    By default it returns large blocks to the kernel, which then clears each of their pages anew: a
    step of batch 33 took 1.4 times as long (two cores of Zen 5, 2026-11-29).
    """
    mallopt = _of_glibc("mallopt")
    if mallopt and mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):  # else it would map them one by one
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Have glibc return that memory all the same: between runs, whose batches differ in size."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def standardise(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """uint8 (N, C, H, W), 0..255 -> float32 with the training split's mean 0 and deviation 1."""
    return (images.float() / 255 - dataset.mean) / dataset.std


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    padding: str = "zeros",
) -> torch.Tensor:
    """Turn, scale and shift each image (N, C, H, W) float32 a little at random.

    What comes in from outside is 0, the paper of ink, or with padding "border" as the edge is.
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
    """The optimizer called `name` (one of OPTIMIZERS), fused where torch has it fused.

    `momentum` is of SGD (0.9 by default, Nesterov's) and RMSprop (0 by default).
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


def learning_rate(done: float, schedule: str = "linear") -> float:
    """The factor on the learning rate when the share `done` (0..1) of a cycle is over.

    It rises to 1 during WARM_UP, then falls to zero by `schedule`, one of SCHEDULES, or stays.
    """
    if done < WARM_UP or schedule == "constant":
        return min(done / WARM_UP, 1.0)
    left = (1 - done) / (1 - WARM_UP)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def set_dropout(model: nn.Module, share: float) -> None:
    """Let all the model's dropout layers drop that share (0..1)."""
    for layer in dropouts(model):
        layer.p = share


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    """The model's dropout layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


def cycle(step: int, ends: Sequence[int]) -> float:
    """The share (0..1) that is over of the cycle of the schedule to which a step (1..) belongs.

    A cycle ends with each of `ends`, ascending.
    """
    i = bisect.bisect_left(ends, step)
    start = ends[i - 1] if i else 0
    return (step - 0.5 - start) / (ends[i] - start)


class Order:
    """The order in which n samples are seen: shuffled passes, one after the other."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator = n, generator
        self.rest = torch.empty(0, dtype=torch.long)  # of the pass, or passes, begun

    def take(self, k: int) -> torch.Tensor:
        """The next k indices (k,) int64."""
        while len(self.rest) < k:
            self.rest = torch.cat([self.rest, torch.randperm(self.n, generator=self.generator)])
        taken, self.rest = self.rest[:k], self.rest[k:]
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
    subset: int = SUBSET,
    seed: int = 0,
    micro_batch: int | None = None,
    bfloat16: bool = False,
    resume: dict[str, Any] | None = None,
) -> Generator[Progress]:
    """Train `model`, in place, on about `samples` images of `train`; both on one device.

    The defaults of batch_size, optimizer and lr are the published best of DESIGN.md; space.py says
    what the hyperparameters may be. `dropout` replaces the network's own. Yields a Progress a
    hundred times a run; one that carries the errors on `subset` fixed validation images as soon as
    each number of samples in `validate_at` is reached; and, at the end, one with the errors on all
    of `validation`. At each of those numbers a cycle of the learning rate ends, as otherwise its
    noise would hide what was learnt (Loshchilov and Hutter 2017, arXiv 1608.03983).
    `micro_batch` images at most go through the network at once: the gradient is that of the whole
    batch, but batch norms see each part. In `bfloat16` weights stay in float32. `resume` is the
    state() of an earlier Progress of the same run, which then goes on from there: same seed, model
    and thread count give the same weights on a CPU, stopped or not. Raises Diverged.
    """
    batch_size = min(batch_size, len(train))
    steps = max(1, round(samples / batch_size))
    total = steps * batch_size
    rung_steps = sorted({math.ceil(rung / batch_size) for rung in validate_at} - {0})
    ends = [*(step for step in rung_steps if step < steps), steps]
    refuse_one(model, batch_size)
    generator = torch.Generator().manual_seed(seed)
    order = Order(len(train), generator)
    stepper = make_optimizer(model, optimizer, lr, weight_decay, momentum)
    if dropout is not None:
        set_dropout(model, dropout)
    precision = torch.autocast(train.labels.device.type, torch.bfloat16, enabled=bfloat16)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision:
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    factors = [module for module in model.modules() if isinstance(module, Factors)]
    decayed = [layer.weight for module in factors for layer in module.layers]
    first = _resume(resume, model, stepper, order) if resume else 0
    losses: list[torch.Tensor] = []
    padding = "zeros" if dataset.recipe == "digit" else "border"
    model.train()
    for step in range(first + 1, steps + 1):
        index = order.take(batch_size)
        images = train.images[index].float() / 255
        if augmentation:
            images = augment(images, generator, augmentation, padding)
        share = learning_rate(cycle(step, ends), schedule)
        for group in stepper.param_groups:
            group["lr"] = lr * share
        stepper.zero_grad()
        inputs = (images - dataset.mean) / dataset.std
        labels = train.labels[index]
        losses.append(_backward(loss_of, inputs, labels, micro_batch or batch_size))
        stepper.step()
        shrink(decayed, 1 - DECAY * batch_size * share)
        seen = step * batch_size
        rung = step in rung_steps
        if step < steps and not rung and step * 100 // steps == (step - 1) * 100 // steps:
            continue
        mean_loss = float(torch.stack(losses).mean())
        losses.clear()
        if not math.isfinite(mean_loss):
            raise Diverged(f"the loss is {mean_loss} after {seen} samples; a lower lr may help")
        state = functools.partial(_state, step, model, stepper, order)
        if rung or step == steps:
            renormalise(model, dataset, train)
        checked = validation if step == steps else validation and validation.head(subset)
        if checked is None or not (rung or step == steps):
            yield Progress(seen, total, mean_loss, state=state)
            continue
        yield Progress(seen, total, mean_loss, *_validated(model, dataset, checked), state)
        model.train()


def refuse_one(model: nn.Module, batch_size: int) -> None:
    """Raises ValueError where there are batch norms that would see one value alone."""
    if batch_size == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules()):
        raise ValueError("batch_size is 1; batch norms need at least 2, or use --plain")


def norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """The model's batch norms that keep statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats
    ]


@torch.no_grad()
def renormalise(model: nn.Module, dataset: Dataset, train: Split) -> None:
    """Give the model's batch norms the statistics of NORM_IMAGES training images as they are.

    Those kept in training are of augmented images, and some steps late: with them the same weights
    made 251 errors on 5,000 validation images after 8,000 training images, with those of 2,000
    images as they are 127 (`parallel`, Adam, batch 64, lr 0.003; docs/lab-log.md has more).
    """
    layers = norms(model)
    if not layers:
        return
    momentum = [norm.momentum for norm in layers]
    model.eval()  # dropout stays off
    for norm in layers:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all parts
        norm.train()
    images = train.head(NORM_IMAGES).images
    for part in images.split(PART)[: max(1, len(images) // PART)]:  # of one size
        model(standardise(part, dataset))
    for norm, value in zip(layers, momentum, strict=True):
        norm.momentum = value
    model.train()


@torch.no_grad()
def shrink(weights: list[torch.Tensor], factor: float) -> None:
    """Weight decay apart from the gradients (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    for weight in weights:
        weight.mul_(factor)


def _backward(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    micro_batch: int,
) -> torch.Tensor:
    """Gradients of the mean loss over the batch, a part at a time; returns that loss."""
    total = torch.zeros((), device=inputs.device)
    parts = math.ceil(len(labels) / micro_batch)  # of nearly one size: batch norms need more than 1
    for images, wanted in zip(inputs.tensor_split(parts), labels.tensor_split(parts), strict=True):
        loss = loss_of(images, wanted) * (len(wanted) / len(labels))
        loss.backward()
        total += loss.detach()
    return total


def _state(
    step: int, model: nn.Module, stepper: torch.optim.Optimizer, order: Order
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": stepper.state_dict(),
        "rest": order.rest.clone(),
        "order": order.generator.get_state(),
        "torch": torch.get_rng_state(),
    }


def _resume(
    state: dict[str, Any], model: nn.Module, stepper: torch.optim.Optimizer, order: Order
) -> int:
    model.load_state_dict(state["model"])
    stepper.load_state_dict(state["optimizer"])
    order.rest = state["rest"]
    order.generator.set_state(state["order"])
    torch.set_rng_state(state["torch"])
    return state["step"]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, images: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Probabilities (N, classes) float32, on the CPU, for uint8 images (N, C, H, W)."""
    model.eval()
    parts = [model(standardise(part, dataset)).float() for part in images.split(PART)]
    return torch.from_numpy(probabilities(torch.cat(parts).cpu().numpy(), temperature))


def errors(model: nn.Module, dataset: Dataset, split: Split) -> int:
    """How many images of `split` the model reads wrong."""
    return int((predict(model, dataset, split.images).argmax(1) != split.labels.cpu()).sum())


def _validated(model: nn.Module, dataset: Dataset, split: Split) -> tuple[int, int, float]:
    """Errors, of how many images, and log-loss."""
    shares, labels = predict(model, dataset, split.images), split.labels.cpu()
    of_truth = shares[torch.arange(len(labels)), labels].clamp_min(LEAST_PROBABILITY)
    wrong = int((shares.argmax(1) != labels).sum())
    return wrong, len(labels), -float(of_truth.log().mean())


def speed(model: nn.Module, dataset: Dataset, *, batch_size: int, **hyperparameters: Any) -> float:
    """Training images a second on this machine, from some SPEED_S seconds or SPEED_STEPS steps.

    The first half does not count. The model is trained meanwhile, so it is not to be used
    afterwards.
    """
    hyperparameters |= {"batch_size": batch_size, "samples": 100 * batch_size}  # a report a step
    run = fit(model, dataset, dataset.train, **hyperparameters)
    seen: list[tuple[int, float]] = []
    for progress in run:
        if progress.samples < progress.total or not seen:  # the last step does more than the others
            seen.append((progress.samples, time.perf_counter()))
        if len(seen) >= SPEED_STEPS and seen[-1][1] - seen[0][1] > SPEED_S:
            run.close()
            break
    (m, start), (n, end) = seen[len(seen) // 2], seen[-1]
    return (n - m) / (end - start)


def worst(probabilities: torch.Tensor, labels: torch.Tensor, most: int) -> torch.Tensor:
    """Indices (M,) int64, M <= most, of the mistakes that gave the true class the least
    probability, the worst first."""
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    given = probabilities[wrong, labels[wrong]]
    return wrong[given.argsort(stable=True)[:most]]


def scores(
    probabilities: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """What a model's record says of one split.

    Errors of n first, then the accuracy with its 95 % interval (Wilson's), and for each class
    precision, recall and F1 (0..1).
    """
    found, n = probabilities.argmax(1), len(labels)
    wrong = int((found != labels).sum())
    interval = binomtest(n - wrong, n).proportion_ci(0.95, method="wilson")
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, found, labels=range(len(classes)), zero_division=0.0
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
