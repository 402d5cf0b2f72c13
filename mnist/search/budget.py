"""The time budget of a command: its plan, and estimates of the time left.

Arithmetic on seconds, images and images per second; nothing here measures or waits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RUNGS = (1 / 2,)  # shares of a trial's images after which the pruner compares it
REDUCTION_FACTOR = 3  # about one in this many trials survives a rung
# Share of the trials that survive the rung; more than one in REDUCTION_FACTOR, as the first trials
# are compared with few.
SURVIVING = 0.4
TRIAL_OVERHEAD_S = 0.4  # to build a network and record a trial, on a processor of 2024
FORWARD_SHARE = 0.3  # time per image in evaluation, as a share of that in training
SEARCH_SHARE, MIN_FINAL_SHARE = 0.4, 0.3  # of the time; the search includes confirmations
# Bounds on the training images of a trial, however fast the machine. Longer trials rank better, but
# take time from the final training: Kendall's tau with the errors after 60,000 images is 0.77 at
# 6,000 images and 0.83 at 12,000 (`parallel` on MNIST, docs/benchmarks.md).
MAX_TRIAL_SAMPLES, MIN_TRIAL_SAMPLES, QUICK_TRIAL_SAMPLES = 24_000, 6_000, 1_200
# Bounds on the final training; on small data it may exceed the epochs, up to a number of images.
# `compact` still gains: 69 errors of 15,000 after 36 epochs, 85 after 13 (docs/lab-log.md).
MAX_FINAL_EPOCHS, THOROUGH_EPOCHS, SMALL_DATA_FINAL_SAMPLES = 40, 60, 60_000
# The default run: about 8 minutes on two cores with AVX-512. A slower machine takes longer, up to
# LIMIT_S, for a better final model.
TARGET_S, LIMIT_S, ENOUGH_FINAL_SAMPLES = 7.5 * 60, 13.5 * 60, 240_000
# The same for things and photos, which take longer to learn: on Fashion-MNIST, `parallel` makes 569
# errors of 7,500 held-out images after 240,000 training images, and 447 after 600,000 (one seed).
ENOUGH_PICTURE_SAMPLES = 1_000_000
# Speed of a training of minutes, as a share of that of a measurement of seconds; 0.78 and 0.89 were
# seen on two cores of Zen 4 whose speed changed by a third within minutes.
SUSTAINED_SPEED = 0.9
QUICK_S = 30.0
START_S = 10.0  # from the command's start to the plan
RELEASE_S = 20.0  # export, evaluation, saving and report of `parallel` on two cores
QUICK_RELEASE_S = 8.0
PLAN_WEIGHT = 5  # weight of the planned time of a trial, in trials
MIN_SHARE = 0.05  # of a training; before it, the measured speed is unreliable


@dataclass(frozen=True)
class Plan:
    """The plan of a study, made for the machine that began it; stored with the study.

    `trial_samples`: most training images of a trial. Seconds: `trial_s` for a trial on average,
    `confirm_s` for all confirmations, `final_s` for the final training, `release_s` for what
    follows, `total_s` for everything. `images_per_s`: the training speed that the plan assumes, in
    `bfloat16` or float32.
    """

    trial_samples: int
    trial_s: float
    final_s: float
    images_per_s: float
    confirm_s: float = 0.0  # plans of old studies lack this and the following
    release_s: float = 0.0
    bfloat16: bool = False
    total_s: float = 0.0  # of the whole command, from its start

    @property
    def after_search_s(self) -> float:
        return self.confirm_s + self.final_s + self.release_s


@dataclass(frozen=True)
class Workload:
    """The work of a study: numbers of trials, of confirming runs, and of images in the splits."""

    trials: int
    confirmations: int
    train: int
    validation: int
    subset: int  # validation images at a rung
    norm_images: int = 0  # forward passes for batch norms before each validation
    enough_samples: int = ENOUGH_FINAL_SAMPLES  # training images that justify up to LIMIT_S
    thorough: bool = False  # a trial sees a whole epoch, the final model THOROUGH_EPOCHS
    surviving: float = SURVIVING  # share of the trials; 1 without a pruner

    @property
    def trial_share(self) -> float:
        """Mean share of a trial's images that is trained."""
        return RUNGS[0] + (1 - RUNGS[0]) * self.surviving

    @property
    def max_final_samples(self) -> int:
        return max_final_samples(self.train + self.validation, self.thorough)


def max_final_samples(epoch: int, thorough: bool) -> int:
    """Most images of the final training on `epoch` images, unless --final-epochs is given."""
    epochs = THOROUGH_EPOCHS if thorough else MAX_FINAL_EPOCHS
    return max(epochs * epoch, SMALL_DATA_FINAL_SAMPLES)


def rungs(trial_samples: int) -> list[int]:
    """Numbers of images after which the pruner compares a trial of `trial_samples` images."""
    return [max(1, int(share * trial_samples)) for share in RUNGS]


def make_plan(
    work: Workload,
    images_per_s: float,
    elapsed_s: float,
    *,
    timeout_s: float = math.inf,
    trial_samples: int | None = None,
    quick: bool = False,
    bfloat16: bool = False,
) -> Plan:
    """Divide the time that suits the machine, of which `elapsed_s` have passed.

    The search gets SEARCH_SHARE, less where MAX_TRIAL_SAMPLES are enough for a trial; the release
    gets its time; the final training gets the rest. On a slow machine a trial still has
    MIN_TRIAL_SAMPLES, and the final training MIN_FINAL_SHARE of the time, however long that takes.
    `trial_samples` is the requested number of images, if any.
    """
    cost = _Cost(work, images_per_s)
    release_s = QUICK_RELEASE_S if quick else RELEASE_S
    total_s = min(QUICK_S if quick else cost.total_s(), timeout_s)
    remaining_s = max(0.0, total_s - elapsed_s - release_s)
    if trial_samples is None:
        least = QUICK_TRIAL_SAMPLES if quick else MIN_TRIAL_SAMPLES
        affordable = cost.affordable(SEARCH_SHARE * remaining_s)
        trial_samples = (
            work.train if work.thorough else min(max(affordable, least), MAX_TRIAL_SAMPLES)
        )
    trial_s, confirm_s = cost.trial_s(trial_samples), cost.confirm_s(trial_samples)
    final_s = max(remaining_s - work.trials * trial_s - confirm_s, MIN_FINAL_SHARE * remaining_s)
    final_s = min(final_s, work.max_final_samples / images_per_s)
    planned_s = min(elapsed_s + work.trials * trial_s + confirm_s + final_s + release_s, timeout_s)
    return Plan(
        trial_samples, trial_s, final_s, images_per_s, confirm_s, release_s, bfloat16, planned_s
    )


@dataclass(frozen=True)
class _Cost:
    """Seconds that parts of a study take at a training speed."""

    work: Workload
    images_per_s: float

    def total_s(self) -> float:
        """For the whole command: TARGET_S, or up to LIMIT_S where the machine is too slow to train
        the final model on `enough_samples` by then; without a limit if it is thorough."""
        work, search_s = self.work, self.search_s(MIN_TRIAL_SAMPLES)
        if work.thorough:
            whole_s = self.search_s(work.train) + work.max_final_samples / self.images_per_s
            return START_S + whole_s + RELEASE_S
        enough_s = min(work.enough_samples, work.max_final_samples) / self.images_per_s
        return min(max(TARGET_S, START_S + search_s + enough_s + RELEASE_S), LIMIT_S)

    def trial_s(self, samples: int) -> float:
        """For a trial of `samples` images on average, as some are pruned."""
        evaluated = len(RUNGS) * (self.work.subset + self.work.norm_images)
        evaluated_at_end = self.work.surviving * (self.work.validation + self.work.norm_images)
        return self._seconds(samples * self.work.trial_share, evaluated + evaluated_at_end)

    def confirm_s(self, samples: int) -> float:
        """For all confirming runs, which are never pruned."""
        evaluated = self.work.validation + self.work.norm_images
        return self.work.confirmations * self._seconds(samples, evaluated)

    def search_s(self, samples: int) -> float:
        return self.work.trials * self.trial_s(samples) + self.confirm_s(samples)

    def affordable(self, search_s: float) -> int:
        """Images per trial with which the search takes `search_s`; negative where it cannot."""
        images_per_sample = self.work.trials * self.work.trial_share + self.work.confirmations
        return int((search_s - self.search_s(0)) * self.images_per_s / images_per_sample)

    def _seconds(self, trained: float, evaluated: float) -> float:
        return TRIAL_OVERHEAD_S + (trained + evaluated * FORWARD_SHARE) / self.images_per_s


def allot_final_s(plan: Plan, remaining_s: float) -> float:
    """Seconds for the final training, where `remaining_s` of the planned total remain: the time
    before the release, limited to 0.75 to 1.1 times the planned time of the training.

    For a plan without a total, the planned time of the training.
    """
    if not plan.total_s:
        return plan.final_s
    return min(max(remaining_s - plan.release_s, 0.75 * plan.final_s), 1.1 * plan.final_s)


def allot_final_s_until(plan: Plan, remaining_s: float) -> float:
    """The same where --timeout leaves `remaining_s`; a fifth is kept for a machine that slows."""
    return min(0.8 * max(0.0, remaining_s - plan.release_s), plan.final_s)


def estimate_remaining_s(plan: Plan, search_s: float, confirm_s: float, elapsed_s: float) -> float:
    """Seconds until the end of a command, `elapsed_s` after its start, where search and
    confirmations still take these times, and the final training gets the rest."""
    before_s = search_s + confirm_s
    training_s = allot_final_s(plan, plan.total_s - elapsed_s - before_s)
    return before_s + training_s + plan.release_s


def estimate_search_s(plan: Plan, remaining: int, done: int, elapsed_s: float) -> float:
    """Seconds until `remaining` trials are finished, after `done` of them in `elapsed_s`.

    The plan weighs as much as PLAN_WEIGHT trials, as the first few trials may mislead.
    """
    trial_s = (elapsed_s + PLAN_WEIGHT * plan.trial_s) / (done + PLAN_WEIGHT)
    return trial_s * max(0, remaining)


def estimate_training_s(expected_s: float, share: float, elapsed_s: float) -> float:
    """Seconds until the end of a training, of which `share` (0..1) is done after `elapsed_s`."""
    if share < MIN_SHARE:
        return max(0.0, expected_s - elapsed_s)
    return elapsed_s / share * (1 - share)


def forecast_error(forecasts: Sequence[tuple[float, float]], seconds: float) -> float:
    """The largest error of the forecasts after the first quarter of a run, as a share of `seconds`,
    its real duration; `forecasts` are pairs of elapsed seconds and forecast remaining seconds."""
    errors = [
        abs(elapsed + remaining - seconds)
        for elapsed, remaining in forecasts
        if elapsed > seconds / 4
    ]
    return max(errors, default=0.0) / seconds
