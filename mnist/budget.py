"""How a command spends its time: the plan, what is left of it, and how many images that allows.

Pure arithmetic on seconds, images and images a second; nothing here measures or waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

RUNGS = (1 / 4,)  # shares of a trial's images after which it is compared and may be pruned
REDUCTION = 3  # about one trial in so many survives a rung
# Of a trial's images, seen on average: to the first rung, and by the survivors the rest. More than
# one in REDUCTION survive, as the first trials are compared with few.
TRIAL_SHARE = RUNGS[0] + (1 - RUNGS[0]) * 0.45
TRIAL_OVERHEAD_S = 0.4  # a new network, its record in the study, on a processor of 2024
FORWARD = 0.45  # time for an image in evaluation, as a share of that in training in bfloat16
SEARCH_SHARE = 0.4  # of the time, confirmations included
# Most images of a trial and of the final model, however fast the machine; and least of a trial, as
# at its first rung the best one should be right on 95 % of the images: `parallel` on MNIST is so
# after 2,000 to 2,500.
MOST_TRIAL, LEAST_TRIAL, QUICK_TRIAL = 24_000, 6_000, 1_200
MOST_FINAL_PASSES, THOROUGH_PASSES, MOST_FINAL = 20, 60, 60_000
# The default run: on two cores with AVX-512 it ends within 8 minutes, also where the machine slows
# down a little meanwhile. A slower machine takes longer, as the result matters more.
TARGET_S, LIMIT_S, ENOUGH_FINAL = 7.2 * 60, 13.5 * 60, 300_000
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
    after it. `images_per_s`: the training speed behind them, in `bfloat16` or float32.
    """

    trial_samples: int
    trial_s: float
    final_s: float
    images_per_s: float
    confirm_s: float = 0.0  # studies of before there were any
    release_s: float = 0.0
    bfloat16: bool = False

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


def total_s(work: Work, images_per_s: float) -> float:
    """Seconds for the whole command: TARGET_S, or up to LIMIT_S on a machine that is too slow to
    show the final model ENOUGH_FINAL images in that time; as long as it takes where it is thorough.
    """
    if work.thorough:
        training_s = _search_s(work, work.train, images_per_s) + work.most_final / images_per_s
        return START_S + training_s + RELEASE_S
    enough = min(ENOUGH_FINAL, work.most_final) / images_per_s
    return min(max(TARGET_S, enough / (1 - SEARCH_SHARE) + RELEASE_S), LIMIT_S)


def plan(
    work: Work,
    images_per_s: float,
    left_s: float,
    *,
    trial_samples: int | None = None,
    quick: bool = False,
    bfloat16: bool = False,
) -> Plan:
    """Spend about `left_s` seconds: SEARCH_SHARE on the search, or less where MOST_TRIAL images are
    enough for a trial; then RELEASE_S; the rest on the final model.

    `trial_samples` is what was asked for. On a slow machine a trial has its least number of images,
    and the search takes more than its share.
    """
    release_s = QUICK_RELEASE_S if quick else RELEASE_S
    if trial_samples is None and work.thorough:
        trial_samples = work.train
    elif trial_samples is None:
        room_s = SEARCH_SHARE * (left_s - release_s) - _search_s(work, 0, images_per_s)
        each_s = (work.trials * TRIAL_SHARE + work.confirmations) / images_per_s
        least = QUICK_TRIAL if quick else LEAST_TRIAL
        trial_samples = int(min(max(room_s / each_s, least), MOST_TRIAL))
    trial_s = _trial_s(work, trial_samples, images_per_s)
    confirm_s = work.confirmations * _whole_trial_s(work, trial_samples, images_per_s)
    final_s = left_s - release_s - work.trials * trial_s - confirm_s
    least_s = (1 - SEARCH_SHARE) * max(0.0, left_s - release_s)
    final_s = min(max(final_s, least_s), work.most_final / images_per_s)
    return Plan(trial_samples, trial_s, final_s, images_per_s, confirm_s, release_s, bfloat16)


def _search_s(work: Work, samples: int, images_per_s: float) -> float:
    """Seconds for all trials and confirming runs."""
    runs_s = work.confirmations * _whole_trial_s(work, samples, images_per_s)
    return work.trials * _trial_s(work, samples, images_per_s) + runs_s


def _trial_s(work: Work, samples: int, images_per_s: float) -> float:
    """Seconds for a trial on average, as some are pruned."""
    complete = (TRIAL_SHARE - RUNGS[0]) / (1 - RUNGS[0])
    validated: float = len(RUNGS) * (work.subset + work.norm_images)
    validated += complete * (work.validation + work.norm_images)
    return TRIAL_OVERHEAD_S + (samples * TRIAL_SHARE + validated * FORWARD) / images_per_s


def _whole_trial_s(work: Work, samples: int, images_per_s: float) -> float:
    validated = work.validation + work.norm_images
    return TRIAL_OVERHEAD_S + (samples + validated * FORWARD) / images_per_s


def final_s(planned: Plan, left_s: float) -> float:
    """Seconds for the final training where `left_s` are left of the planned total: all but those
    of the release, as far as that is near to what was planned."""
    return min(max(left_s - planned.release_s, 0.75 * planned.final_s), 1.1 * planned.final_s)


def final_s_until(planned: Plan, left_s: float) -> float:
    """The same where --timeout leaves `left_s`, some of it for a machine that slows down."""
    return min(0.8 * max(0.0, left_s - planned.release_s), planned.final_s)


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
