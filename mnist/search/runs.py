"""Runs: what a worker trains, for which purpose, and what it reports. Knows no Optuna."""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist import batch_norms, folding, memory, models, outliers, plugins, training
from mnist.data import Dataset
from mnist.search import budget, checkpoints
from mnist.search.checkpoints import Checkpoints, QuotaExceeded
from mnist.search.pace import Pace
from mnist.shell import first_line

MAX_DEATHS = 3  # of a run's processes without a new checkpoint in between; then the run has failed
MEASURE_LR = 1e-8  # of speed measurements: no step diverges
# Least time between two reports without an accuracy, as reading them takes processor time: with 64
# reports in 1.5 s, a worker did 2,200 images per second instead of 2,900 (two cores of Zen 5).
REPORT_INTERVAL_S = 0.25
CHECKPOINT_INTERVAL_S = 30.0  # least time between checkpoints; --plain `parallel` takes 340 MB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyConfig:
    """What all runs of a study share."""

    network: str
    seed: int  # of the study
    trial_samples: int
    checkpoints: Checkpoints
    plain: bool = False  # the network's own layers, not its training form
    bfloat16: bool = False


@dataclass(frozen=True)
class Run:
    """What one worker trains: a trial, a confirmation, or the final model."""

    network: str
    params: dict[str, Any]
    samples: int
    seed: int
    rungs: tuple[int, ...] = ()
    final: bool = False  # on training and validation images together
    pace: Pace | None = None  # changes the length during the training
    outliers: bool = False  # also on pictures without a class
    measure: bool = False  # only measure the speed of some steps
    plain: bool = False
    bfloat16: bool = False
    threads: int | None = None
    micro_batch: int | None = None
    checkpoint: Path | None = None
    weights: Path | None = None  # file for the trained state dict and the number of images
    deaths: int = 0  # consecutive deaths of its processes since the checkpoint of time `mark`
    mark: int = 0

    @classmethod
    def for_trial(
        cls, config: StudyConfig, number: int, params: dict[str, Any], threads: int, **attempt: Any
    ) -> "Run":
        """A trial; `attempt`: the fields that retry() has set after an earlier attempt."""
        return cls(
            config.network,
            params,
            config.trial_samples,
            derive_seed(config.seed),  # the same for all trials: paired comparisons
            rungs=tuple(budget.rungs(config.trial_samples)),
            plain=config.plain,
            bfloat16=config.bfloat16,
            threads=threads,
            checkpoint=config.checkpoints.trial(number),
            **attempt,
        )

    @classmethod
    def for_confirmation(
        cls,
        config: StudyConfig,
        number: int,
        params: dict[str, Any],
        i: int,
        micro_batch: int | None,
    ) -> "Run":
        """Training as a trial, on fresh seed `i`, in one cycle, as no pruner compares it."""
        return cls(
            config.network,
            params,
            config.trial_samples,
            derive_seed(config.seed, i, 1),  # the same seeds for all trials
            plain=config.plain,
            bfloat16=config.bfloat16,
            micro_batch=micro_batch,
            checkpoint=config.checkpoints.confirmation(number, i),
        )

    @classmethod
    def for_final(
        cls,
        config: StudyConfig,
        number: int,
        params: dict[str, Any],
        samples: int,
        **options: Any,
    ) -> "Run":
        """The final training, as trial `number`; `options`: threads, micro_batch and pace."""
        return cls(
            config.network,
            params,
            samples,
            derive_seed(config.seed),
            final=True,
            outliers=not config.plain,
            plain=config.plain,
            bfloat16=config.bfloat16,
            checkpoint=config.checkpoints.final(number, samples),
            weights=config.checkpoints.weights(number, samples),
            **options,
        )

    @classmethod
    def for_speed(
        cls, network: str, params: dict[str, Any], threads: int, plain: bool, **options: Any
    ) -> "Run":
        """Some steps with a negligible learning rate, to measure their speed."""
        params = params | {"lr": MEASURE_LR}
        return cls(network, params, 0, 0, measure=True, plain=plain, threads=threads, **options)

    def retry(self, result: "RunResult") -> "Run | None":
        """The run to execute next after `result`; None where a retry cannot help."""
        if result.failure == "memory" and self.micro_batch is None:  # 3: no part has a single image
            return replace(self, micro_batch=max(3, self.params["batch_size"] // 4))
        if result.failure != "died":
            return None
        path = self.checkpoint
        modified = path.stat().st_mtime_ns if path and path.exists() else 0
        deaths = 1 if modified != self.mark else self.deaths + 1
        return replace(self, deaths=deaths, mark=modified) if deaths < MAX_DEATHS else None


def derive_seed(seed: int, *numbers: int) -> int:
    """A seed (31 bits) derived from the study's seed and further numbers, such as a trial's."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0] >> 1)


@dataclass(frozen=True)
class Report:
    """Progress of a run; where it has an accuracy, the worker waits for a reply (True: stop)."""

    progress: training.Progress


@dataclass(frozen=True)
class RunResult:
    """The end of a run: its accuracy, its speed, or the reason of its failure."""

    accuracy: float | None = None
    images_per_s: float | None = None
    stopped: bool = False  # by a reply
    failure: str | None = None  # nan, memory, disk, error, died
    reason: str = ""


@dataclass(frozen=True)
class Setup:
    """How a worker loads its data, and where it trains."""

    load: Callable[[], Dataset]
    device: str
    threads: int
    quota: int | None = None  # bytes for all checkpoints, including one that is being replaced
    checkpoint_s: float = CHECKPOINT_INTERVAL_S
    report_s: float = REPORT_INTERVAL_S
    index: int = 0  # among the workers of its pool
    imports: tuple[Path, ...] = ()  # plugins that define the network or the data


# --- in the worker process


def run_safely(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> RunResult:
    """Execute a run; each kind of failure becomes a RunResult."""
    try:
        if run.measure:
            return measure_speed(run, dataset, setup)
        return train(run, dataset, setup, pipe)
    except training.Diverged as error:
        return RunResult(failure="nan", reason=str(error))
    except QuotaExceeded as error:
        return RunResult(failure="disk", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a plugin's network may raise anything
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        phrases = ("out of memory", "allocate memory")
        out_of_memory = out_of_memory or any(phrase in str(error) for phrase in phrases)
        disk_full = checkpoints.is_disk_full(error)
        failure = "disk" if disk_full else "memory" if out_of_memory else "error"
        return RunResult(failure=failure, reason=describe_error(error))


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def build_network(network: str, dataset: Dataset, plain: bool) -> torch.nn.Module:
    """A new network for the data, in its training form unless `plain`."""
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    return model if plain else folding.training_form(model)


def _build_for(run: Run, dataset: Dataset) -> torch.nn.Module:
    """The run's network, initialised by the run's seed, on the device and in the memory format of
    the training."""
    torch.manual_seed(run.seed)
    model = build_network(run.network, dataset, run.plain).to(dataset.train.labels.device)
    if not plugins.is_from_plugin(models.NETWORKS[run.network]):  # a plugin may depend on the order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def measure_speed(run: Run, dataset: Dataset, setup: Setup) -> RunResult:
    """Measure the speed of the run's steps."""
    torch.set_num_threads(run.threads or setup.threads)
    settings: dict[str, Any] = {"bfloat16": run.bfloat16, "micro_batch": run.micro_batch}
    settings["outliers"] = _make_outliers(run, dataset, 64)
    speed = training.measure_speed(_build_for(run, dataset), dataset, **run.params, **settings)
    return RunResult(images_per_s=speed)


def train(run: Run, dataset: Dataset, setup: Setup, pipe: Any) -> RunResult:
    """Train, from the checkpoint if there is one; report progress and save checkpoints."""
    torch.set_num_threads(run.threads or setup.threads)
    model = _build_for(run, dataset)
    split = dataset.train + dataset.validation if run.final else dataset.train
    n_outliers = outliers.count(run.samples * batch_norms.OUTLIER_SHARE)
    reports = training.fit(
        model,
        dataset,
        split,
        None if run.final else dataset.validation,
        **run.params,
        samples=run.samples,
        validate_at=run.rungs,
        seed=run.seed,
        micro_batch=run.micro_batch,
        bfloat16=run.bfloat16,
        outliers=_make_outliers(run, dataset, n_outliers),
        adjust_total=run.pace.start() if run.pace else None,
        resume=checkpoints.load(run.checkpoint),
    )
    saved_at, accuracy, reported_at = time.monotonic(), None, -math.inf
    for progress in reports:
        is_last = progress.samples == progress.total
        due = time.monotonic() - reported_at > setup.report_s
        if due or is_last or progress.accuracy is not None:
            pipe.send(Report(replace(progress, state=None)))
            reported_at = time.monotonic()
        if progress.accuracy is not None:
            accuracy = progress.accuracy
            if pipe.recv():
                return RunResult(accuracy, stopped=True)
        due = time.monotonic() - saved_at > setup.checkpoint_s
        if run.checkpoint and due and progress.state and not is_last:
            try:
                checkpoints.save(progress.state(), run.checkpoint, setup.quota)
            except QuotaExceeded as error:  # the run continues without a checkpoint
                log.warning("%s", error)
            saved_at = time.monotonic()
    if run.weights:
        save_weights(model, progress.samples, run, setup.quota)
    return RunResult(accuracy)


def _make_outliers(run: Run, dataset: Dataset, n: int) -> torch.Tensor | None:
    """`n` pictures without a class; None where the run needs none, or none can be made."""
    if not run.outliers or dataset.recipe != "digit":
        return None
    images = dataset.train.images
    made = outliers.make(images.cpu().numpy(), n, run.seed)
    memory.return_freed_memory()  # 90 MB
    return torch.from_numpy(made).to(images.device)


def save_weights(model: torch.nn.Module, samples: int, run: Run, quota: int | None) -> None:
    """Write the weights of a final training on `samples` images; raises QuotaExceeded."""
    assert run.weights is not None
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    state = {"weights": weights, "samples": samples}
    with contextlib.suppress(QuotaExceeded):
        return checkpoints.save(state, run.weights, quota)
    if run.checkpoint:  # a finished run does not need it
        run.checkpoint.unlink(missing_ok=True)
    checkpoints.save(state, run.weights, quota)
