"""A table of learning curves: validation errors and log-loss of many configurations at fidelities.

python -m benchmarks.curves                    # hours; resumes, also from the rows of the table
python -m benchmarks.curves --export           # write benchmarks/curves.json of the runs so far

On two cores, two commands with `--threads 1` and `--share 1/2` or `2/2` have 1.5 times the speed.

`benchmarks.search` compares searches by replaying them on the table. A fidelity is a number of
training images after which a cycle of the learning rate ends, so its values are those of an
annealed model. One run goes through all fidelities, so a value follows more and shorter cycles than
that of a trial with a single rung. The table has three parts, each recorded as a study:
`curves-default` (space.DEFAULT, the published best first), `curves-wide` (space.WIDE), and
`curves-finals`, which trains the first configurations of the default space like a final model: in
one cycle, on more images, with several seeds.
"""

import json
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from benchmarks.curve_runs import (
    FIDELITIES,
    SPACES,
    Run,
    Settings,
    list_runs,
    parse_fidelities,
    parse_share,
    train,
)
from mnist import data, folding, memory, training
from mnist.data import Dataset
from mnist.job import networks
from mnist.search import study as studies
from mnist.search.storage import StudyError, open_study
from mnist.search.urls import mask_url_secrets
from mnist.search.workers import available_cores

TABLE = Path(__file__).with_name("curves.json")


# --- the record of the runs -----------------------------------------------------------------------


def record(study: optuna.Study, run: Run, result: dict[str, Any], n: int, **more: Any) -> None:
    """Add a run to its study in one transaction, with all of its values."""
    accuracies = [1 - errors / n for errors in result["errors"]]
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.COMPLETE,
            value=accuracies[-1],
            params=run.params,
            distributions=SPACES[run.part],
            intermediate_values=dict(zip(run.fidelities, accuracies, strict=True)),
            user_attrs={"number": run.number, "seed": run.seed, **result, **more},
        )
    )


def load_recorded(study: optuna.Study) -> dict[tuple[int, int], FrozenTrial]:
    """Load the study's runs by their keys: configuration number and seed."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {(trial.user_attrs["number"], trial.user_attrs["seed"]): trial for trial in trials}


def open_studies(storage: str, name: str, settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """Open the studies of all parts. Raises StudyError where one has runs of other settings."""
    part_studies = {part: open_study(storage, f"{name}-{part}") for part in SPACES}
    for part, study in part_studies.items():
        fidelities = [settings.final_samples] if part == "finals" else list(settings.fidelities)
        fingerprint = studies.fingerprint(dataset, settings.network, fidelities[-1], SPACES[part])
        ranks = [folding.CONV_RANK, folding.LINEAR_RANK]
        fingerprint |= {"fidelities": fidelities, "ranks": ranks}
        fingerprint |= {"dtype": settings.dtype, "seed": settings.seed}
        fingerprint |= {"label_smoothing": training.LABEL_SMOOTHING}
        studies.check_fingerprint(study, fingerprint)
    return part_studies


def restore(part_studies: dict[str, optuna.Study], path: Path, settings: Settings) -> None:
    """Record runs of an existing table with the same settings that the studies lack."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    header = content["header"]
    expected = {"fidelities": list(settings.fidelities), "final_samples": settings.final_samples}
    expected |= {"network": settings.network, "dtype": settings.dtype, "seed": settings.seed}
    expected |= {"label_smoothing": training.LABEL_SMOOTHING}  # older tables have none
    if any(header.get(key) != value for key, value in expected.items()):
        click.echo(f"the runs in {path} had other settings; they are not used")
        return
    results = {}
    for row in content["rows"]:
        result = {key: row[key] for key in ("errors", "log_loss", "diverged")}
        results[row["space"], row["number"], settings.seed] = result
        for final in row.get("finals", ()):
            result = {"errors": [final["errors"]], "log_loss": [final["log_loss"]]}
            results["finals", row["number"], final["seed"]] = result | {"diverged": False}
    recorded = {part: load_recorded(study) for part, study in part_studies.items()}
    for run in list_runs(settings):
        key = (run.part, *run.key)
        if key in results and run.key not in recorded[run.part]:
            record(part_studies[run.part], run, results[key], header["n"])


def find_processor_name(device: torch.device) -> str:
    """The name of the GPU or CPU that trains."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_origin(settings: Settings, device: torch.device) -> dict[str, Any]:
    """The entries of the table's header about the command and the machine."""
    return {
        "command": settings.format_command(),
        "date": datetime.now(UTC).date().isoformat(),
        "processor": find_processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# --- training -------------------------------------------------------------------------------------


def execute_missing(
    part_studies: dict[str, Any],
    settings: Settings,
    dataset: Dataset,
    share: tuple[int, int] = (1, 1),
) -> Iterator[tuple[Run, dict[str, Any], float, float]]:
    """Train and record the missing runs; yields each run, its result, its seconds, seconds left.

    Share (i, n): each n-th run from the i-th on.
    """
    recorded = {part: load_recorded(study) for part, study in part_studies.items()}
    own_runs = list_runs(settings)[share[0] - 1 :: share[1]]
    missing = [run for run in own_runs if run.key not in recorded[run.part]]
    images_left = sum(run.fidelities[-1] for run in missing)
    images_trained, trained_s = 0, 0.0
    for run in missing:
        start = time.perf_counter()
        result = train(run, settings, dataset)
        seconds = time.perf_counter() - start
        n = len(dataset.validation)
        record(part_studies[run.part], run, result, n, seconds=round(seconds, 2))
        if not result["diverged"]:  # such a run may end after a few images
            images_trained += run.fidelities[-1]
            trained_s += seconds
        images_left -= run.fidelities[-1]
        yield run, result, seconds, images_left * trained_s / max(images_trained, 1)


def format_result(run: Run, result: dict[str, Any], n: int, seconds: float, left_s: float) -> str:
    """Format the progress line after a run."""
    outcome = "diverged" if result["diverged"] else f"{result['errors'][-1]} errors of {n}"
    minutes = round(left_s / 60)
    return (
        f"{run.part} {run.number} (seed {run.seed}), {run.fidelities[-1]:,} images: {outcome}, "
        f"{seconds:.0f} s; {minutes // 60} h {minutes % 60:02} min left"
    )


# --- the table ------------------------------------------------------------------------------------


def build_table(storage: str, name: str, settings: Settings) -> dict[str, Any]:
    """Build the table of all runs so far: `header` and `rows`. Raises StudyError if none exists."""
    part_studies = {part: open_study(storage, f"{name}-{part}") for part in SPACES}
    origin = part_studies["default"].user_attrs.get("made")
    if origin is None:
        raise StudyError(f"{mask_url_secrets(storage)} has no study {name}-default")
    recorded = {part: load_recorded(study) for part, study in part_studies.items()}
    rows = [
        _make_row(part, number, trial, recorded["finals"])
        for part in ("default", "wide")
        for (number, _), trial in sorted(recorded[part].items())
    ]
    fingerprints = {part: study.user_attrs["fingerprint"] for part, study in part_studies.items()}
    keys = ("network", "ranks", "fidelities", "dtype", "seed", "label_smoothing")
    all_runs = list_runs(settings)
    header = origin | {key: fingerprints["default"][key] for key in keys}
    header |= {
        "n": fingerprints["default"]["validation images"],
        "final_samples": fingerprints["finals"]["fidelities"][-1],
        "runs": {
            part: {"done": len(trials), "of": sum(run.part == part for run in all_runs)}
            for part, trials in recorded.items()
        },
    }
    return {"header": header, "rows": rows}


def _make_row(
    part: str, number: int, trial: FrozenTrial, finals: dict[tuple[int, int], FrozenTrial]
) -> dict[str, Any]:
    row = {"space": part, "number": number, "params": trial.params}
    row |= {key: trial.user_attrs[key] for key in ("errors", "log_loss", "diverged")}
    final_results = [
        {"seed": seed} | {key: final.user_attrs[key][-1] for key in ("errors", "log_loss")}
        for (i, seed), final in sorted(finals.items())
        if i == number
    ]
    if part == "default" and final_results:
        row["finals"] = final_results
    return row


def write_table(content: dict[str, Any], path: Path) -> None:
    """Write the table as JSON, with a line for each row."""
    head, *rows = (
        json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
        for row in (content["header"], *content["rows"])
    )
    path.write_text('{"header":' + head + ',"rows":[\n' + ",\n".join(rows) + "\n]}\n")


@click.command()
@click.option("--storage", default="sqlite:///curves.sqlite3", show_default=True)
@click.option(
    "--study", default="curves", show_default=True, help="Prefix of the names of the studies."
)
@click.option(
    "--table", "path", type=click.Path(path_type=Path), default=TABLE, help="To be written."
)
@click.option(
    "--export", is_flag=True, help="Write the table of the runs so far, and train nothing."
)
@click.option("--dataset", default=Settings.dataset, show_default=True)
@click.option("--network", default=Settings.network, show_default=True)
@click.option("--default", default=Settings.default, show_default=True, help="Configurations.")
@click.option("--wide", default=Settings.wide, show_default=True, help="Configurations.")
@click.option("--finals", default=Settings.finals, show_default=True, help="Configurations.")
@click.option("--final-seeds", default=Settings.final_seeds, show_default=True)
@click.option(
    "--fidelities",
    default=",".join(map(str, FIDELITIES)),
    callback=parse_fidelities,
    show_default=True,
    help="Training images, ascending.",
)
@click.option("--final-samples", default=Settings.final_samples, show_default=True)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--bfloat16/--no-bfloat16", default=Settings.bfloat16, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="By default all cores.")
@click.option(
    "--share", default="1/1", callback=parse_share, help="I/N: train the I-th of N shares."
)
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(
    storage: str,
    study: str,
    path: Path,
    export: bool,
    device: str,
    threads: int | None,
    share: tuple[int, int],
    data_dir: Path | None,
    **options: Any,
) -> None:
    """Train the missing runs, then write the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = Settings(**options)
    try:
        if not export:
            torch.set_num_threads(threads or available_cores())
            torch_device = networks.select_device(device)
            dataset = data.load(settings.dataset, data_dir).to(torch_device)
            part_studies = open_studies(storage, study, settings, dataset)
            restore(part_studies, path, settings)
            origin = describe_origin(settings, torch_device)
            part_studies["default"].set_user_attr("made", origin)
            memory.keep_freed_memory()
            for run, result, *times in execute_missing(part_studies, settings, dataset, share):
                click.echo(format_result(run, result, len(dataset.validation), *times))
        content = build_table(storage, study, settings)
    except (StudyError, data.DataError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    write_table(content, path)
    runs = content["header"]["runs"]
    counts = (f"{count['done']}/{count['of']} {part}" for part, count in runs.items())
    click.echo(f"{path.name}: runs {', '.join(counts)}; {path.stat().st_size / 1000:,.0f} KB")


if __name__ == "__main__":
    main()
