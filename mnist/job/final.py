"""The end of a study: confirmation of the best trials and training of the final model."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from optuna.trial import FrozenTrial

from mnist.job.clock import Clock
from mnist.job.display import Display
from mnist.job.options import Options
from mnist.job.results import select_winner
from mnist.report.text import format_params
from mnist.search import budget, checkpoints, loop
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.pace import Pace
from mnist.search.runs import Report, Run, RunResult, StudyConfig
from mnist.search.workers import Pool, training_threads

CONFIRMED_BY = 3 / 4  # of --timeout; later confirmations would take the time of the final training
MIN_FINAL_SAMPLES = 1_200  # a model trained on fewer images is of no use


@dataclass(frozen=True)
class TrainedModel:
    """Weights of a training form, with the hyperparameters of `best`, trained on training and
    validation images. `seconds`: the training time; None if an earlier process finished it."""

    best: FrozenTrial
    weights: dict[str, torch.Tensor]
    samples: int
    seconds: float | None


@dataclass(frozen=True)
class FinalTraining:
    """The training of one study's final model; `epoch` is the number of images in one epoch."""

    member: Member
    pool: Pool
    screen: Display
    options: Options
    config: StudyConfig
    plan: budget.Plan
    clock: Clock
    epoch: int

    def confirm(self) -> None:
        """Train again with the hyperparameters of the best trials and baselines, on fresh seeds,
        while --timeout leaves time for the final training."""
        if select_winner(self.member, self.options) is not None:  # all confirmed, or skipped
            return
        latest_s = CONFIRMED_BY * (self.options.timeout or math.inf)
        runs = loop.confirm(self.member, self.pool, self.config, self.options.confirmed)
        with contextlib.closing(runs):
            for done, total in runs:
                self.screen.show_confirmation(done, total)
                if done < total and self.clock.elapsed_s > latest_s:
                    text = f"--timeout: {done} of {total} confirmations are finished"
                    self.screen.print_line(f"{text}; the final model is made without them")
                    self.member.run_locked(studies.skip_confirmations)
                    self.pool.stop_workers()
                    return

    def train(self) -> TrainedModel:
        """Train the final model with the winner's hyperparameters.

        If the training fails, the trial is excluded and the next best one is used. Raises
        SearchFailed where no trial is left, Unfinished after --timeout.
        """
        while self.member.run_locked(lambda study: studies.best_trials(study, 1)):
            self.confirm()
            best = select_winner(self.member, self.options)
            if best is None:  # another member has just finished a better trial
                continue
            run = self._make_run(best)
            trained = _load_trained(run)
            if trained is not None:  # an earlier process was killed after the final training
                return TrainedModel(best, **trained, seconds=None)
            _announce(self.member, self.screen, self.options.confirmed, best, run)
            result, s_per_image = self._execute(run)
            trained = _load_trained(run)
            if result.failure is None and trained is not None:
                seconds = s_per_image and s_per_image * trained["samples"]
                return TrainedModel(best, **trained, seconds=seconds)
            if result.failure in (None, "died"):
                reason = result.reason or f"its weights are not at {run.weights}"
                raise loop.Unfinished(f"the final training failed: {reason}")
            self._exclude(best.number, result)
        raise loop.SearchFailed(
            "no complete trial is left to make the final model from; a larger --trials adds some"
        )

    def _exclude(self, number: int, result: RunResult) -> None:
        reason = f"{result.failure}: {result.reason}"
        self.member.run_locked(lambda study: studies.exclude_trial(study, number, reason))
        self.screen.print_line(f"trial {number} is excluded: {result.reason}")

    def _execute(self, run: Run) -> tuple[RunResult, float | None]:
        """Train in a worker; also returns the seconds per training image."""
        progress: list[tuple[int, float]] = []  # images, time; a resumed run starts above 0 images
        expected_s = self._available_s()
        for _, message in loop.execute_runs(self.pool, {"final": run}):
            if isinstance(message, Report):
                self.screen.show_training(
                    "final", message.progress, expected_s, self.plan.release_s
                )
                progress.append((message.progress.samples, time.monotonic()))
            elif message is not None:
                first, last = (progress[0], progress[-1]) if progress else ((0, 0.0), (0, 0.0))
                images, seconds = last[0] - first[0], last[1] - first[1]
                return message, seconds / images if images else None
            else:
                self.clock.check("the final training is not finished yet")
        raise AssertionError("a run ends with a RunResult")

    def _make_run(self, best: FrozenTrial) -> Run:
        """The final training, on all cores, as no other run competes for them."""
        samples, pace = self._choose_samples(best), None
        resumes = self.config.checkpoints.final(best.number, samples).exists()
        if not self.options.final_epochs and not resumes:  # a resumed training keeps its length
            deadline = time.monotonic() + self._available_s()
            pace = Pace.around(samples, MIN_FINAL_SAMPLES, self._max_samples(), deadline)
        return Run.for_final(
            self.config,
            best.number,
            best.params,
            samples,
            threads=training_threads(),
            micro_batch=studies.micro_batch(best),
            pace=pace,
        )

    def _choose_samples(self, best: FrozenTrial) -> int:
        """Images of the training: as requested, as already begun, or as the time allows."""
        if self.options.final_epochs:
            return round(self.options.final_epochs * self.epoch)

        paths = self.config.checkpoints
        stored = self.member.run_locked(lambda study: studies.final_samples(study, best.number))
        if stored is not None and any(
            path(best.number, stored).exists() for path in (paths.final, paths.weights)
        ):
            return stored
        samples = self._affordable_samples(best)
        self.member.run_locked(
            lambda study: studies.store_final_samples(study, best.number, samples)
        )
        return samples

    def _affordable_samples(self, best: FrozenTrial) -> int:
        minimum = min(MIN_FINAL_SAMPLES, self.epoch)
        if self._available_s() * self.plan.images_per_s <= minimum:
            return minimum
        run = Run.for_speed(
            self.config.network,
            best.params,
            training_threads(),
            self.config.plain,
            outliers=not self.config.plain,
            bfloat16=self.config.bfloat16,
            micro_batch=studies.micro_batch(best),
        )
        try:
            images_per_s = loop.measure_speed(self.pool, run)
        except loop.RunFailed:  # the final training reports the reason
            images_per_s = self.plan.images_per_s
        affordable = self._available_s() * images_per_s * budget.SUSTAINED_SPEED
        return max(minimum, round(min(affordable, self._max_samples())))

    def _max_samples(self) -> int:
        return budget.max_final_samples(self.epoch, self.options.thorough)

    def _available_s(self) -> float:
        """Seconds for the training: by --final-epochs, or from the remaining time."""
        if self.options.final_epochs:
            return self.plan.final_s
        if self.options.timeout:
            remaining_s = self.options.timeout - self.clock.elapsed_s
            return budget.allot_final_s_until(self.plan, remaining_s)
        return budget.allot_final_s(self.plan, self.plan.total_s - self.clock.elapsed_s)


def _load_trained(run: Run) -> dict[str, Any] | None:
    """Weights and samples of a finished training; None where an old version wrote weights alone."""
    state = checkpoints.load(run.weights)
    return None if state is None or "samples" not in state else state


def _announce(member: Member, screen: Display, k: int, best: FrozenTrial, run: Run) -> None:
    """Print the confirmations of the `k` best trials, and the run that is about to start."""
    skipped = member.run_locked(lambda study: studies.find_unconfirmed(study, k))
    means = member.run_locked(lambda study: studies.mean_confirmations(study, k))
    if means and not skipped:
        text = ", ".join(f"trial {number} {mean:.2%}" for number, mean in means.items())
        screen.print_line(f"on fresh seeds: {text}")
    params = format_params(best.params)
    screen.print_line(
        f"final model: as trial {best.number} ({params}), about {run.samples:,} images"
    )
