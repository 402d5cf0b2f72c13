"""The end of a study: confirmation of the best trials, training and saving of the final model."""

import time
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial

from mnist.job import release
from mnist.job.display import Display, format_params
from mnist.job.release import TrainedModel
from mnist.job.state import Job, find_result, make_speed_run, select_winner
from mnist.search import budget, loop
from mnist.search import study as studies
from mnist.search.workers import Pool, Report, Run, RunResult, available_cores, load_checkpoint

POLL_INTERVAL_S = 1.0
MIN_FINAL_SAMPLES = 1_200  # a model trained on fewer images is of no use


def finish(job: Job, pool: Pool, screen: Display) -> dict[str, Any]:
    """The study's result (see find_result); only the leading member makes it."""
    while True:
        if job.member.become_leader():
            confirm(job, pool, screen)
            if result := find_result(job):
                screen.print_line(
                    f"trial {result['study']['trial']} has won before; its model is kept"
                )
                return result
            trained = train_final(job, pool, screen)
            pool.stop_workers()  # frees memory for the plain network and its export
            if result := release.save(job, trained, screen):
                return result
        screen.show_waiting("another process finishes the study")
        time.sleep(POLL_INTERVAL_S)
        job.check_timeout("another process has not finished the study yet")
        job.member.poll()
        if result := find_result(job):
            return result


def confirm(job: Job, pool: Pool, screen: Display) -> None:
    """Train with the best trials' and the baselines' hyperparameters again, on fresh seeds."""

    def make_run(trial: FrozenTrial, i: int) -> Run:
        return Run(
            job.options.model,
            trial.params,
            job.plan.trial_samples,
            studies.derive_seed(job.options.seed, i, 1),  # the same seeds for all trials
            plain=job.options.plain,
            bfloat16=job.plan.bfloat16,
            micro_batch=studies.micro_batch(trial),
            checkpoint=job.folder / f"confirm-{trial.number}-{i}.pt",
        )

    for done, total in loop.confirm(job.member, pool, make_run, job.confirm):
        screen.show_confirmation(done, total)
        job.check_timeout("the best trials are not confirmed yet")


def train_final(job: Job, pool: Pool, screen: Display) -> TrainedModel:
    """Train the final model with the winner's hyperparameters.

    If the training fails, the trial is excluded and the next best one is used.
    """
    while job.member.run_locked(lambda study: studies.best_trials(study, 1)):
        confirm(job, pool, screen)
        best = select_winner(job)
        if best is None:  # another member has just finished a better trial
            continue
        run = make_final_run(job, pool, best)
        weights = load_checkpoint(run.weights)
        if weights is not None:  # an earlier process was killed after the final training
            return TrainedModel(best, weights, run.samples, None)
        if means := job.member.run_locked(
            lambda study: studies.mean_confirmations(study, job.confirm)
        ):
            text = ", ".join(f"trial {number} {mean:.2%}" for number, mean in means.items())
            screen.print_line(f"on fresh seeds: {text}")
        text = f"as trial {best.number} ({format_params(best.params)}), {run.samples:,} images"
        screen.print_line(f"final model: {text}")
        result, seconds = run_final_training(job, pool, screen, run)
        weights = load_checkpoint(run.weights)
        if result.failure is None and weights is not None:
            return TrainedModel(best, weights, run.samples, seconds)
        if result.failure in (None, "died"):
            raise loop.Unfinished(f"the final training failed: {result.reason or run.weights}")
        exclude_trial(job, best.number, f"{result.failure}: {result.reason}")
        screen.print_line(f"trial {best.number} is set aside: {result.reason}")
    raise loop.Unfinished("no complete trial is left to make the final model from")


def exclude_trial(job: Job, number: int, reason: str) -> None:
    job.member.run_locked(lambda study: studies.exclude_trial(study, number, reason))


def run_final_training(
    job: Job, pool: Pool, screen: Display, run: Run
) -> tuple[RunResult, float | None]:
    """Train the final model in a worker; also returns the seconds for all of `run.samples`."""
    progress: list[tuple[int, float]] = []  # images, time; a resumed run starts with more images
    expected_s = available_final_s(job)
    for _, message in loop.execute_runs(pool, {"final": run}):
        if isinstance(message, Report):
            screen.show_training("final", message.progress, expected_s, job.plan.release_s)
            progress.append((message.progress.samples, time.monotonic()))
        elif message is not None:
            (m, start), (n, end) = (progress[0], progress[-1]) if progress else ((0, 0.0), (0, 0.0))
            return message, (end - start) / (n - m) * run.samples if n > m else None
        else:
            job.check_timeout("the final training is not finished yet")
    raise AssertionError("a run ends with a RunResult")


def make_final_run(job: Job, pool: Pool, best: FrozenTrial) -> Run:
    """The final training, on all cores, as no other run competes for them."""
    samples = choose_final_samples(job, pool, best)
    stem = job.folder / f"final-{best.number}-{samples}"
    return Run(
        job.options.model,
        best.params,
        samples,
        studies.derive_seed(job.options.seed),
        final=True,
        plain=job.options.plain,
        bfloat16=job.plan.bfloat16,
        threads=available_cores(),
        micro_batch=studies.micro_batch(best),
        checkpoint=stem.with_suffix(".pt"),
        weights=stem.with_suffix(".weights.pt"),
    )


def available_final_s(job: Job) -> float:
    """Seconds for the final training: by --final-epochs, or from the remaining time."""
    if job.options.final_epochs:
        return job.plan.final_s
    elapsed_s = time.monotonic() - job.start
    if job.options.timeout:
        return budget.allot_final_s_until(job.plan, job.options.timeout - elapsed_s)
    return budget.allot_final_s(job.plan, job.plan.total_s - elapsed_s)


def choose_final_samples(job: Job, pool: Pool, best: FrozenTrial) -> int:
    """Images of the final training: as requested, as already begun, or as the time allows."""
    epoch = len(job.dataset.train) + len(job.dataset.validation)
    if job.options.final_epochs:
        return round(job.options.final_epochs * epoch)
    for path in job.folder.glob(f"final-{best.number}-*.pt"):
        return int(path.name.split("-")[2].split(".")[0])
    minimum = min(MIN_FINAL_SAMPLES, epoch)
    if available_final_s(job) * job.plan.images_per_s <= minimum:
        return minimum
    run = replace(
        make_speed_run(job.options, best.params),
        bfloat16=job.plan.bfloat16,
        micro_batch=studies.micro_batch(best),
    )
    try:
        images_per_s = loop.measure_speed(pool, run)
    except loop.RunFailed:  # the final training reports the reason
        images_per_s = job.plan.images_per_s
    affordable = available_final_s(job) * images_per_s * budget.SUSTAINED_SPEED
    return max(minimum, round(min(affordable, job.work.max_final_samples)))
