"""A table of learning curves: validation errors and log-loss of many configurations at fidelities.

python -m benchmarks.curves                    # hours; resumes, also from the rows of the table
python -m benchmarks.curves --export           # benchmarks/curves.json of the runs so far

On two cores two commands, with `--threads 1` and `--share 1/2` or `2/2`, do 1.5 times as much.

`benchmarks.search` replays searches on the table. A fidelity is a number of training images at
which a cycle of the learning rate ends, so its value is that of an annealed model. One run goes
through all fidelities: the value at one has more, and shorter, cycles behind it than that of a
trial with a single rung. The runs are three studies: `curves-default` (space.DEFAULT, the published
best first), `curves-wide` (space.WIDE), and `curves-finals`, which trains the first configurations
of the default space as a final model is: in one cycle, on more images, with several seeds.
"""

import json
import platform
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from benchmarks.curve_runs import FIDELITIES, SPACES, Run, Settings, carry_out, runs
from mnist import data, folding, memory, training
from mnist.data import Dataset
from mnist.search import study as studies
from mnist.search.storage import StudyError, open_study, without_password
from mnist.search.workers import available_cores

TABLE = Path(__file__).with_name("curves.json")
# --- their record ---------------------------------------------------------------------------------


def record(study: optuna.Study, run: Run, result: dict[str, Any], n: int, **more: Any) -> None:
    """Add a run to its study in one transaction: all of its values are there, or none."""
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


def recorded(study: optuna.Study) -> dict[tuple[int, int], FrozenTrial]:
    """The study's runs by the numbers of their configurations and their seeds."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {(trial.user_attrs["number"], trial.user_attrs["seed"]): trial for trial in trials}


def opened(storage: str, name: str, settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """The three studies by their parts. Raises StudyError where they are of another table."""
    opened_studies = {part: open_study(storage, f"{name}-{part}") for part in SPACES}
    for part, study in opened_studies.items():
        fidelities = [settings.final_samples] if part == "finals" else list(settings.fidelities)
        wanted = studies.fingerprint(dataset, settings.network, fidelities[-1], SPACES[part])
        ranks = [folding.CONV_RANK, folding.LINEAR_RANK]
        wanted |= {"fidelities": fidelities, "ranks": ranks}
        studies.check_fingerprint(study, wanted | {"dtype": settings.dtype, "seed": settings.seed})
    return opened_studies


def restore(part_studies: dict[str, optuna.Study], path: Path, settings: Settings) -> None:
    """Record the runs that the studies lack, from a table of the same settings."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    header = content["header"]
    same = {"fidelities": list(settings.fidelities), "final_samples": settings.final_samples}
    same |= {"network": settings.network, "dtype": settings.dtype, "seed": settings.seed}
    if any(header[key] != value for key, value in same.items()):
        return
    results = {}
    for row in content["rows"]:
        result = {key: row[key] for key in ("errors", "log_loss", "diverged")}
        results[row["space"], row["number"], settings.seed] = result
        for final in row.get("finals", ()):
            result = {"errors": [final["errors"]], "log_loss": [final["log_loss"]]}
            results["finals", row["number"], final["seed"]] = result | {"diverged": False}
    done = {part: recorded(study) for part, study in part_studies.items()}
    for run in runs(settings):
        key = (run.part, *run.key)
        if key in results and run.key not in done[run.part]:
            record(part_studies[run.part], run, results[key], header["n"])


def processor(device: torch.device) -> str:
    """The name of what trains."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def made_by(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What the table's header says of the machine and the command."""
    return {
        "command": settings.command(),
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# --- the work -------------------------------------------------------------------------------------


def work(
    part_studies: dict[str, Any],
    settings: Settings,
    dataset: Dataset,
    share: tuple[int, int] = (1, 1),
) -> Iterator[tuple[Run, dict[str, Any], float, float]]:
    """Execute and record the missing runs; yields each with its seconds and the seconds left.

    Share (i, n): each n-th run from the i-th on.
    """
    done = {part: recorded(study) for part, study in part_studies.items()}
    own = runs(settings)[share[0] - 1 :: share[1]]
    todo = [run for run in own if run.key not in done[run.part]]
    left, images, took_s = sum(run.fidelities[-1] for run in todo), 0, 0.0
    for run in todo:
        start = time.perf_counter()
        result = carry_out(run, settings, dataset)
        seconds = time.perf_counter() - start
        n = len(dataset.validation)
        record(part_studies[run.part], run, result, n, seconds=round(seconds, 2))
        if not result["diverged"]:  # it may have ended at once
            images, took_s = images + run.fidelities[-1], took_s + seconds
        left -= run.fidelities[-1]
        yield run, result, seconds, left * took_s / max(images, 1)


def line(run: Run, result: dict[str, Any], n: int, seconds: float, left_s: float) -> str:
    """What is said of a run that is over."""
    what = "diverged" if result["diverged"] else f"{result['errors'][-1]} errors of {n}"
    minutes = round(left_s / 60)
    return (
        f"{run.part} {run.number} (seed {run.seed}), {run.fidelities[-1]:,} images: {what}, "
        f"{seconds:.0f} s; {minutes // 60} h {minutes % 60:02} min left"
    )


def table(storage: str, name: str, settings: Settings) -> dict[str, Any]:
    """The header and the rows of all runs so far. Raises StudyError where there are none."""
    part_studies = {part: open_study(storage, f"{name}-{part}") for part in SPACES}
    made = part_studies["default"].user_attrs.get("made")
    if made is None:
        raise StudyError(f"{without_password(storage)} has no study {name}-default")
    done = {part: recorded(study) for part, study in part_studies.items()}
    rows = [
        _row(part, number, trial, done["finals"])
        for part in ("default", "wide")
        for (number, _), trial in sorted(done[part].items())
    ]
    kept = part_studies["default"].user_attrs["fingerprint"]
    header = made | {key: kept[key] for key in ("network", "ranks", "fidelities", "dtype", "seed")}
    finals = part_studies["finals"].user_attrs["fingerprint"]["fidelities"][-1]
    wanted = {part: sum(run.part == part for run in runs(settings)) for part in SPACES}
    runs_of = {part: {"done": len(done[part]), "of": wanted[part]} for part in SPACES}
    header |= {"n": kept["validation images"], "final_samples": finals, "runs": runs_of}
    return {"header": header, "rows": rows}


def _row(
    part: str, number: int, trial: FrozenTrial, finals: dict[tuple[int, int], FrozenTrial]
) -> dict[str, Any]:
    row = {"space": part, "number": number, "params": trial.params}
    row |= {key: trial.user_attrs[key] for key in ("errors", "log_loss", "diverged")}
    own = [(seed, final.user_attrs) for (i, seed), final in sorted(finals.items()) if i == number]
    if part == "default" and own:
        row["finals"] = [
            {"seed": seed, "errors": attrs["errors"][-1], "log_loss": attrs["log_loss"][-1]}
            for seed, attrs in own
        ]
    return row


def write(content: dict[str, Any], path: Path) -> None:
    """As JSON, a row a line."""
    head, *rows = (
        json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
        for row in (content["header"], *content["rows"])
    )
    path.write_text('{"header":' + head + ',"rows":[\n' + ",\n".join(rows) + "\n]}\n")


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        fidelities = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not numbers with commas between") from error
    if not all(a < b for a, b in zip((0, *fidelities), fidelities, strict=False)):
        raise click.BadParameter(f"{text!r} does not ascend from above 0")
    return fidelities


def _share(_: click.Context, __: click.Parameter, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n:
        raise click.BadParameter(f"{text!r} is not a share such as 1/2")
    return i, n


@click.command()
@click.option("--storage", default="sqlite:///curves.sqlite3", show_default=True)
@click.option(
    "--study", default="curves", show_default=True, help="What the studies' names begin with."
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
    callback=_numbers,
    show_default=True,
    help="Training images, ascending.",
)
@click.option("--final-samples", default=Settings.final_samples, show_default=True)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--bfloat16/--no-bfloat16", default=Settings.bfloat16, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="By default all cores.")
@click.option("--share", default="1/1", callback=_share, help="I/N: do the I-th of N shares.")
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
            place = training.select_device(device)
            dataset = data.load(settings.dataset, data_dir).to(place)
            part_studies = opened(storage, study, settings, dataset)
            restore(part_studies, path, settings)
            part_studies["default"].set_user_attr("made", made_by(settings, place))
            memory.keep_freed_memory()
            for run, result, *times in work(part_studies, settings, dataset, share):
                click.echo(line(run, result, len(dataset.validation), *times))
        content = table(storage, study, settings)
    except (StudyError, data.DataError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    write(content, path)
    counts = (f"{n['done']}/{n['of']} {part}" for part, n in content["header"]["runs"].items())
    click.echo(f"{path.name}: runs {', '.join(counts)}; {path.stat().st_size / 1000:,.0f} KB")


if __name__ == "__main__":
    main()
