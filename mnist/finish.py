"""The end of a study: confirm the best trials, train the final model, evaluate once, save."""

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial

from mnist import data, export, lowrank, models, own, registry, search, training
from mnist import study as studies
from mnist.display import Display, words
from mnist.members import Member
from mnist.options import Options
from mnist.space import Space
from mnist.workers import CHECKPOINT_S, Ended, Pool, Report, Run, cores, keep, restore, used

TINY_LR = 1e-8  # with which the machine is measured: no step of it diverges
WAIT_S = 1.0
LEAST_FINAL = 1_200  # images; a model that has seen fewer is not worth saving
RANK_IMAGES = 1_000  # training images from which layers of low rank are learnt
# Of the final training's work, so much goes into training them on. With a tenth of the model's
# work, as in `parallel`, they see half as many images again as it did; never over twice as many.
LOWERED_SHARE, LOWERED_MOST = 0.15, 2.0
LOWERED_HOW = {"batch_size": 50, "optimizer": "Adam", "lr": 0.0005, "weight_decay": 0.0}
MISTAKES = 24  # whose images are kept, to be looked at
EVALUATION_BYTES = 10_000_000  # more than what is kept of it
ABANDONED_S = 600  # writing a checkpoint takes seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What one command works on."""

    options: Options
    member: Member
    dataset: data.Dataset
    space: Space
    device: torch.device
    plan: search.Plan
    trials: int
    confirmed: int  # so many of the best trials are confirmed on fresh seeds
    total_s: float
    start: float
    latest: float

    @property
    def study(self) -> optuna.Study:
        return self.member.study

    @property
    def rest_s(self) -> float:
        """Seconds expected of all that comes after the search."""
        return self.plan.confirm_s + self.plan.final_s * (1 + lowering(self.options))

    @property
    def folder(self) -> Path:
        """For the checkpoints of this study; gone when it is finished."""
        return self.options.artifacts / f"{self.study.study_name}-{self.member.study_id[:8]}"

    def in_time(self, otherwise: str) -> None:
        """Raises search.Unfinished once --timeout is over."""
        if time.monotonic() > self.latest:
            raise search.Unfinished(f"--timeout: {otherwise}")


def network(options: Options, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """A new network for the data."""
    classes = len(dataset.classes)
    return models.build(options.model, dataset.channels, dataset.size, classes).to(device)


def result(job: Job) -> dict[str, Any] | None:
    """Name and record of the model that was saved from the study's winner, if there is one.

    It may be in the registry of another machine: then the study itself has its record.
    """
    best, asked = winner(job), job.options.final_epochs
    if best is None:
        return None
    here = registry.read(job.options.output)["models"]
    elsewhere = job.member.update(lambda study: study.user_attrs.get("result", {}))
    for name, record in [*reversed(here.items()), *elsewhere.items()]:
        about = record["study"]
        same = (about.get("id"), about.get("trial")) == (job.member.study_id, best.number)
        if same and asked in (None, record.get("options", {}).get("final_epochs")):
            return record | {"name": name}
    return None


def winner(job: Job) -> FrozenTrial | None:
    return job.member.update(lambda study: studies.winner(study, job.confirmed))


def publish(job: Job, done: dict[str, Any]) -> None:
    """Let members on other machines know the result."""
    entry = {done["name"]: {key: value for key, value in done.items() if key != "name"}}

    def change(study: optuna.Study) -> None:
        if list(study.user_attrs.get("result", {})) != list(entry):
            study.set_user_attr("result", entry)

    job.member.update(change)


def sweep(job: Job) -> None:
    """Remove checkpoints that no longer matter: all of them once no trial is unfinished."""
    trials = job.member.update(lambda study: study.get_trials(deepcopy=False))
    if result(job) and all(trial.state.is_finished() for trial in trials):
        shutil.rmtree(job.folder, ignore_errors=True)
    for trial in trials:
        if trial.state.is_finished():
            (job.folder / f"trial-{trial.number}.pt").unlink(missing_ok=True)
    for path in job.folder.glob(".*.tmp"):  # by processes that were killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def finish(job: Job, pool: Pool, screen: Display) -> dict[str, Any]:
    """The study's result(), made by exactly one of the members that work on it."""
    while True:
        if job.member.finisher():
            confirm(job, pool, screen)
            if found := result(job):
                screen.say(f"trial {found['study']['trial']} has won before; its model is kept")
                return found
            trained = train(job, pool, screen)
            if found := save(job, trained, screen):
                return found
        screen.waiting("another process finishes the study")
        time.sleep(WAIT_S)
        job.in_time("another process has not finished the study yet")
        job.member.look()
        if found := result(job):
            return found


def confirm(job: Job, pool: Pool, screen: Display) -> None:
    """Have the best trials confirmed."""

    def run_of(trial: FrozenTrial, i: int) -> Run:
        return Run(
            job.options.model,
            trial.params,
            job.plan.trial_samples,
            studies.seed_of(job.options.seed, trial.number, i, 1),
            micro_batch=micro_batch(trial),
            checkpoint=job.folder / f"confirm-{trial.number}-{i}.pt",
        )

    for done, total in search.confirm(job.member, pool, run_of, job.confirmed):
        final = final_s(job) * (1 + lowering(job.options))
        left_s = job.plan.confirm_s * (1 - done / total) + final
        screen.confirmation(done, total, left_s)
        job.in_time("the best trials are not confirmed yet")


@dataclass(frozen=True)
class Trained:
    """Weights trained as `best` was, on training and validation images.

    `seconds` of all that training; None where it was over when this process came.
    """

    best: FrozenTrial
    weights: dict[str, torch.Tensor]
    samples: int
    seconds: float | None


def train(job: Job, pool: Pool, screen: Display) -> Trained:
    """Train the final model as the winner.

    Where that training fails, the trial is set aside and the next best is taken.
    """
    while job.member.update(lambda study: studies.best_trials(study, 1)):
        confirm(job, pool, screen)
        best = winner(job)
        if best is None:  # another member has just finished a better trial
            continue
        run = final_run(job, best)
        weights = restore(run.weights)  # of a process that was killed when it had got so far
        if weights is not None:
            return Trained(best, weights, run.samples, None)
        if means := job.member.update(lambda study: studies.means(study, job.confirmed)):
            said = ", ".join(f"trial {number} {mean:.2%}" for number, mean in means.items())
            screen.say(f"on fresh seeds: {said}")
        text = f"final model: as trial {best.number} ({words(best.params)}), {run.samples:,} images"
        screen.say(text)
        ended, seconds = carry_out(job, pool, screen, run)
        weights = restore(run.weights)
        if ended.failure is None and weights is not None:
            return Trained(best, weights, run.samples, seconds)
        if ended.failure in (None, "died"):
            raise search.Unfinished(f"the final training failed: {ended.reason or run.weights}")
        set_aside(job, best.number, f"{ended.failure}: {ended.reason}")
        screen.say(f"trial {best.number} is set aside: {ended.reason}")
    raise search.Unfinished("no complete trial is left to make the final model from")


def set_aside(job: Job, number: int, reason: str) -> None:
    job.member.update(lambda study: studies.set_aside(study, number, reason))


def carry_out(job: Job, pool: Pool, screen: Display, run: Run) -> tuple[Ended, float | None]:
    """Have one worker train the final model; also the seconds that all of it takes."""
    seen: list[tuple[int, float]] = []  # images, at what time; fewer of them after a restart
    for _, message in search.carry_out(pool, {"final": run}):
        if isinstance(message, Report):
            screen.training("final", message.progress, job.plan.final_s, lowering(job.options))
            seen.append((message.progress.samples, time.monotonic()))
        elif message is not None:
            (m, start), (n, end) = (seen[0], seen[-1]) if seen else ((0, 0.0), (0, 0.0))
            return message, (end - start) / (n - m) * run.samples if n > m else None
        else:
            job.in_time("the final training is not finished yet")
    raise AssertionError("a run ends with an Ended")


def final_run(job: Job, best: FrozenTrial) -> Run:
    """By all cores, as there is nothing else to do."""
    samples = final_samples(job, best)
    stem = job.folder / f"final-{best.number}-{samples}"
    return Run(
        job.options.model,
        best.params,
        samples,
        studies.seed_of(job.options.seed),
        final=True,
        threads=cores(),
        micro_batch=micro_batch(best),
        checkpoint=stem.with_suffix(".pt"),
        weights=stem.with_suffix(".weights.pt"),
    )


def micro_batch(trial: FrozenTrial) -> int | None:
    """With which it was trained in the end, where its memory was too small for whole batches."""
    return trial.user_attrs.get("again", {}).get("micro_batch")


def final_s(job: Job) -> float:
    """Seconds that the final training may take, as far as it goes by the time left."""
    if job.options.final_epochs:
        return job.plan.final_s
    passed_s, share = time.monotonic() - job.start, 1 / (1 + lowering(job.options))
    if job.options.timeout:  # leave room for the evaluation, and for a machine that slows down
        return min(0.7 * max(0.0, job.options.timeout - passed_s) * share, job.plan.final_s)
    left_s = (job.total_s - passed_s) * share
    return min(max(left_s, 0.75 * job.plan.final_s), 1.1 * job.plan.final_s)


def lowering(options: Options) -> float:
    """The time for training layers of low rank on, as a share of the final training's; a network
    in which none gains is done sooner."""
    return 0.0 if options.quick else LOWERED_SHARE


def final_samples(job: Job, best: FrozenTrial) -> int:
    """Images the final model sees: as asked for, as begun before, or what the time left allows."""
    epoch = len(job.dataset.train) + len(job.dataset.validation)
    if job.options.final_epochs:
        return round(job.options.final_epochs * epoch)
    for path in job.folder.glob(f"final-{best.number}-*.pt"):
        return int(path.name.split("-")[2].split(".")[0])
    least = min(LEAST_FINAL, epoch)
    most = min(final_s(job) * job.plan.images_per_s, search.most_final(job.dataset))
    if most <= least:
        return least
    measured = training.speed(
        network(job.options, job.dataset, job.device),
        job.dataset,
        **best.params | {"lr": TINY_LR},
        micro_batch=micro_batch(best),
    )
    # Not faster than planned: a machine is rarely alone for long.
    return max(least, round(min(final_s(job) * measured, most)))


def replaced(job: Job) -> bool:
    """Whether another member finishes the study by now, or has finished it: this one was silent."""
    return not job.member.finisher() or result(job) is not None


def save(job: Job, trained: Trained, screen: Display) -> dict[str, Any] | None:
    """Measure the finished model, open the test split this one time, save; the result().

    None where this member was replaced meanwhile.
    """
    options, dataset, best, weights = job.options, job.dataset, trained.best, trained.weights
    model = network(job.options, job.dataset, job.device)
    model.load_state_dict(weights)
    lowered = lower(job, trained, model, screen) if lowering(options) else None
    screen.say("evaluating, once, and saving")
    exported = export.export(model, dataset, lowered)
    state, predictions = io.BytesIO(), io.BytesIO()
    torch.save(weights, state)
    files = {"weights": (".pth", state.getvalue())} | exported.files
    evaluated = files["weights"][1] + files.get(exported.served.engine, ("", b""))[1]
    digest = hashlib.sha256(evaluated).hexdigest()
    if replaced(job):
        return None
    found = evaluate(job, model, exported, job.folder / f"test-{digest[:16]}.pt")
    scores = training.scores(found["probabilities"], found["labels"], dataset.classes)
    served_errors = export.errors(found["served"].numpy(), found["labels"].numpy())
    record = {
        "dataset": dataset.record(scores["n"]),
        "model": {"name": options.model, "parameters": models.parameters(model)},
        "hyperparameters": best.params,
        "training": {"samples": trained.samples, "seconds": trained.seconds},
        "study": {
            "name": job.study.study_name,
            "id": job.member.study_id,
            "trial": best.number,
            "trials": job.member.update(studies.finished),
        },
        "metrics": {
            "validation": validation(job, best),
            "calibration": exported.metrics,
            "test": scores | {"served_errors": served_errors},
        },
        "calibration": exported.calibration,
        "engines": {"served": exported.served.engine, "left_out": exported.left_out},
        "quick": options.quick,
        **origin(options),
    }
    parts: dict[str, Any] = {key: part.numpy() for key, part in found.items()}
    np.savez_compressed(predictions, **parts)
    files["predictions"] = (".test.npz", predictions.getvalue())
    if replaced(job):
        return None
    promote = options.promote
    if exported.served.engine == "torch" and own.made(models.NETWORKS[options.model]):
        log.warning("without ONNX nothing can serve a network of one's own; it is not made current")
        promote = "never"
    name = registry.save(options.output, files, record, promote)
    return registry.record(options.output, name)[1] | {"name": name}


def lower(job: Job, trained: Trained, model: torch.nn.Module, screen: Display) -> bytes | None:
    """The model with less work (mnist.lowrank), trained on for a while; ONNX in float32.

    It is kept until the model is saved: who takes over from a process that was killed goes on with
    the same. None where no layer gains, the time is over, or a network of one's own does not allow
    it.
    """
    path = job.folder / f"lowered-{trained.best.number}-{trained.samples}.pt"
    quota = job.options.disk_quota
    if (kept := restore(path)) is not None:
        return kept["onnx"].numpy().tobytes() or None
    content = b""
    try:
        if lowered := lowered_by(job, trained, model, screen, path.with_suffix(".checkpoint.pt")):
            content = export.to_onnx(lowered, job.dataset)
    except Exception as error:  # noqa: BLE001 - whatever a network of one's own raises
        log.warning("int8 goes without layers of low rank: %s", str(error) or repr(error))
    with contextlib.suppress(OSError):  # without it all goes on as well, unless it is killed
        keep({"onnx": torch.from_numpy(np.frombuffer(content, np.uint8).copy())}, path, quota)
    return content or None


def lowered_by(
    job: Job, trained: Trained, model: torch.nn.Module, screen: Display, checkpoint: Path
) -> torch.nn.Module | None:
    """The lowered model, trained on from the checkpoint, if there is one; None if nothing gains.

    Raises TimeoutError where the time is over, and what a network of one's own raises.
    """
    dataset, seed = job.dataset, studies.seed_of(job.options.seed)
    some = dataset.train.images[:RANK_IMAGES].to(job.device)
    torch.manual_seed(seed)
    lowered = lowrank.lower(model, training.standardise(some, dataset))
    if lowered is None:
        return None
    samples = round(min(LOWERED_SHARE / lowered.work, LOWERED_MOST) * trained.samples)
    screen.say(f"for int8: the model in {lowered.work:.0%} of its work, {samples:,} images more")
    saved = time.monotonic()
    for progress in training.fit(
        lowered.model,
        dataset,
        dataset.train + dataset.validation,
        **trained.best.params | LOWERED_HOW,
        samples=samples,
        seed=seed,
        micro_batch=micro_batch(trained.best),
        resume=restore(checkpoint),
    ):
        screen.training("low rank", progress, LOWERED_SHARE * job.plan.final_s)
        if time.monotonic() > job.latest:
            raise TimeoutError("--timeout")
        if time.monotonic() - saved > CHECKPOINT_S and progress.state:
            keep(progress.state(), checkpoint, job.options.disk_quota)
            saved = time.monotonic()
    return lowered.model


def evaluate(
    job: Job, model: torch.nn.Module, exported: export.Export, path: Path
) -> dict[str, torch.Tensor]:
    """What is found on the test split, which is opened here only.

    `probabilities` (N, classes) float32 of the weights and, as `served`, those of the file that is
    served, `labels` (N,) int64; of the weights' worst MISTAKES the indices `mistakes` (M,) int64
    and `images` (M, channels, size, size) uint8.
    They are kept at `path` until the model is saved: who takes over from a process that was killed
    in between does not evaluate again. Raises OSError where there is no room for them.
    """
    kept = restore(path)
    if kept is None:
        quota = job.options.disk_quota
        room = [shutil.disk_usage(job.folder).free]
        room += [] if quota is None else [quota - used(job.options.artifacts)]
        if min(room) < EVALUATION_BYTES:
            raise OSError(f"no room for the evaluation in {job.folder}; it is not begun")
        test = job.dataset.open_test()
        images = test.images.to(job.device)
        about = exported.calibration.get("full", exported.calibration)
        probabilities = training.predict(model, job.dataset, images, about["temperature"])
        worst = training.worst(probabilities, test.labels, MISTAKES)
        kept = {
            "probabilities": probabilities,
            "served": torch.from_numpy(exported.served(test.images.numpy())),
            "labels": test.labels,
            "mistakes": worst,
            "images": test.images[worst],
        }
        keep(kept, path)
    return kept


def validation(job: Job, best: FrozenTrial) -> dict[str, Any]:
    """The winner's errors as a trial, and its accuracy on fresh seeds."""
    assert best.value is not None
    n = len(job.dataset.validation)
    fresh = job.member.update(lambda study: studies.confirmations(study, best.number))
    values = fresh or [best.value]
    return {
        "errors": round((1 - best.value) * n),
        "n": n,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def origin(options: Options) -> dict[str, Any]:
    """What else produced a study or a model: options, own files, seed, versions, commit."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "optuna")}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "options": options.record(),
        "imports": {path.name: path.read_text() for path in options.import_},
        "seed": options.seed,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this code, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
