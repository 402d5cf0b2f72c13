"""How a command spends its time: the plan, what is left of it, and how many images that allows.

Pure arithmetic on seconds, images and images a second; nothing here measures or waits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RUNGS = (1 / 3,)  # shares of a trial's images after which it is compared and may be pruned
REDUCTION = 3  # about one trial in so many survives a rung
# Of a trial's images, seen on average: to the first rung, and by the survivors the rest. More than
# one in REDUCTION survive, as the first trials are compared with few.
TRIAL_SHARE = RUNGS[0] + (1 - RUNGS[0]) * 0.4
TRIAL_OVERHEAD_S = 0.4  # a new network, its record in the study, on a processor of 2024
# Time for an image in evaluation, as a share of that in training; the larger one of bfloat16, in
# which nothing is evaluated.
FORWARD, BFLOAT16_FORWARD = 0.3, 0.45
SEARCH_SHARE, LEAST_FINAL_SHARE = 0.4, 0.3  # of the time; confirmations belong to the search
# Most images of a trial and of the final model, however fast the machine; and least of a trial, as
# at its first rung the best one should be right on 95 % of the images: the published best is so on
# 95.9 % after 4,000 (`parallel` on MNIST, benchmarks/curves.json).
MOST_TRIAL, LEAST_TRIAL, QUICK_TRIAL = 24_000, 12_000, 1_200
MOST_FINAL_PASSES, THOROUGH_PASSES, MOST_FINAL = 20, 60, 60_000
# The default run: on two cores with AVX-512 it ends within 8 minutes, also where the machine slows
# down a little meanwhile. A slower machine takes longer, as the result matters more.
TARGET_S, LIMIT_S, ENOUGH_FINAL = 7.2 * 60, 13.5 * 60, 240_000
QUICK_S = 30.0
START_S = 10.0  # until the plan is made
RELEASE_S = 20.0  # export, one evaluation, saving and the report, of `parallel` on two cores
QUICK_RELEASE_S = 8.0
PLAN_WEIGHT = 5  # trials
LEAST_SHARE = 0.05  # of a training, below which its speed so far says little


@dataclass(frozen=True)
class Plan:
    """What is planned for a study on the machine that began it.

    `trial_samples`: most training images of a trial. Seconds: `trial_s` for a trial on average,
    `confirm_s` for all confirmations, `final_s` for the final training, `release_s` for what comes
    after it, `total_s` for all of it. `images_per_s`: the training speed behind them, in `bfloat16`
    or float32.
    """

    trial_samples: int
    trial_s: float
    final_s: float
    images_per_s: float
    confirm_s: float = 0.0  # studies of before there were any
    release_s: float = 0.0
    bfloat16: bool = False
    total_s: float = 0.0  # of the whole command, from its start

    @property
    def after_search_s(self) -> float:
        return self.confirm_s + self.final_s + self.release_s


@dataclass(frozen=True)
class Work:
    """What a study asks for: numbers of trials and of confirming runs, and of images in the splits
    that each trains on and is validated on."""

    trials: int
    confirmations: int
    train: int
    validation: int
    subset: int  # validation images at a rung
    norm_images: int = 0  # through the network before each validation, for its batch norms
    thorough: bool = False  # for a night or a GPU: a trial sees a pass, the final model many

    @property
    def most_final(self) -> int:
        """Images that the final model sees at most, unless --final-epochs says otherwise."""
        passes = THOROUGH_PASSES if self.thorough else MOST_FINAL_PASSES
        return max(passes * (self.train + self.validation), MOST_FINAL)


def rungs(trial_samples: int) -> list[int]:
    """Numbers of images after which a trial of so many is compared, and may be pruned."""
    return [max(1, int(share * trial_samples)) for share in RUNGS]


def plan(
    work: Work,
    images_per_s: float,
    passed_s: float,
    *,
    timeout_s: float = math.inf,
    trial_samples: int | None = None,
    quick: bool = False,
    bfloat16: bool = False,
) -> Plan:
    """Spend a time that fits the machine, of which `passed_s` are over: SEARCH_SHARE on the search,
    less where MOST_TRIAL images are enough for a trial; then the release's; the rest on the final
    model.

    `trial_samples` is what was asked for. On a slow machine a trial has its least number of images,
    and the final model LEAST_FINAL_SHARE of the time, whatever that takes.
    """
    cost = _Cost(work, images_per_s, BFLOAT16_FORWARD if bfloat16 else FORWARD)
    release_s = QUICK_RELEASE_S if quick else RELEASE_S
    total_s = min(QUICK_S if quick else cost.total_s(), timeout_s)
    left_s = max(0.0, total_s - passed_s - release_s)
    if trial_samples is None:
        least = QUICK_TRIAL if quick else LEAST_TRIAL
        affordable = cost.affordable(SEARCH_SHARE * left_s)
        trial_samples = work.train if work.thorough else min(max(affordable, least), MOST_TRIAL)
    trial_s, confirm_s = cost.trial_s(trial_samples), cost.confirm_s(trial_samples)
    final_s = max(left_s - work.trials * trial_s - confirm_s, LEAST_FINAL_SHARE * left_s)
    final_s = min(final_s, work.most_final / images_per_s)
    all_s = min(passed_s + work.trials * trial_s + confirm_s + final_s + release_s, timeout_s)
    return Plan(
        trial_samples, trial_s, final_s, images_per_s, confirm_s, release_s, bfloat16, all_s
    )


@dataclass(frozen=True)
class _Cost:
    """Seconds that parts of a study take at a training speed; `forward`: see FORWARD."""

    work: Work
    images_per_s: float
    forward: float

    def total_s(self) -> float:
        """For the whole command: TARGET_S, or up to LIMIT_S where the machine is too slow to show
        the final model ENOUGH_FINAL images in that time; as long as it takes if it is thorough."""
        work, search_s = self.work, self.search_s(LEAST_TRIAL)
        if work.thorough:
            whole_s = self.search_s(work.train) + work.most_final / self.images_per_s
            return START_S + whole_s + RELEASE_S
        enough_s = min(ENOUGH_FINAL, work.most_final) / self.images_per_s
        return min(max(TARGET_S, START_S + search_s + enough_s + RELEASE_S), LIMIT_S)

    def trial_s(self, samples: int) -> float:
        """For a trial of so many images on average, as some are pruned."""
        complete = (TRIAL_SHARE - RUNGS[0]) / (1 - RUNGS[0])
        evaluated = len(RUNGS) * (self.work.subset + self.work.norm_images)
        evaluated_at_end = complete * (self.work.validation + self.work.norm_images)
        return self._seconds(samples * TRIAL_SHARE, evaluated + evaluated_at_end)

    def confirm_s(self, samples: int) -> float:
        """For all confirming runs, which are whole trials."""
        evaluated = self.work.validation + self.work.norm_images
        return self.work.confirmations * self._seconds(samples, evaluated)

    def search_s(self, samples: int) -> float:
        return self.work.trials * self.trial_s(samples) + self.confirm_s(samples)

    def affordable(self, search_s: float) -> int:
        """Images a trial with which the search takes so many seconds; none may be negative."""
        each = (self.work.trials * TRIAL_SHARE + self.work.confirmations) / self.images_per_s
        return int((search_s - self.search_s(0)) / each)

    def _seconds(self, trained: float, evaluated: float) -> float:
        return TRIAL_OVERHEAD_S + (trained + evaluated * self.forward) / self.images_per_s


def final_s(planned: Plan, left_s: float) -> float:
    """Seconds for the final training where `left_s` are left of the planned total: all but those
    of the release, as far as that is near to what was planned. Just that without a total."""
    if not planned.total_s:
        return planned.final_s
    return min(max(left_s - planned.release_s, 0.75 * planned.final_s), 1.1 * planned.final_s)


def final_s_until(planned: Plan, left_s: float) -> float:
    """The same where --timeout leaves `left_s`, some of it for a machine that slows down."""
    return min(0.8 * max(0.0, left_s - planned.release_s), planned.final_s)


def left_s(planned: Plan, search_s: float, confirm_s: float, passed_s: float) -> float:
    """Seconds until the end of a command, `passed_s` after its start, where the search and the
    confirmations will take so many more: the final training has what they leave."""
    before_s = search_s + confirm_s
    training_s = final_s(planned, planned.total_s - passed_s - before_s)
    return before_s + training_s + planned.release_s


def search_left_s(planned: Plan, todo: int, done: int, passed_s: float) -> float:
    """Seconds until the search is over: `todo` trials, after `done` of them in `passed_s`.

    The plan counts as much as PLAN_WEIGHT trials, so that the first ones do not mislead.
    """
    each_s = (passed_s + PLAN_WEIGHT * planned.trial_s) / (done + PLAN_WEIGHT)
    return each_s * max(0, todo)


def training_left_s(expected_s: float, share: float, passed_s: float) -> float:
    """Seconds until a training is over of which the `share` (0..1) is done, after `passed_s`."""
    if share < LEAST_SHARE:
        return max(0.0, expected_s - passed_s)
    return passed_s / share * (1 - share)


def forecast_error(forecasts: Sequence[tuple[float, float]], seconds: float) -> float:
    """Largest error of the announced end after the first quarter of a run, as a share of `seconds`,
    which the run took; `forecasts` are seconds passed and seconds then announced to be left."""
    later = [abs(passed + left - seconds) for passed, left in forecasts if passed > seconds / 4]
    return max(later, default=0.0) / seconds
