"""python -m mnist.registry: list, choose, verify and remove the saved models."""

import sys
from pathlib import Path

import click

from mnist import registry, shell


@click.group()
@click.option(
    "--folder",
    type=shell.UserPath(path_type=Path),
    default="saved_models",
    envvar="MODELS",
    show_default=True,
    show_envvar=True,
    help="The registry.",
)
@click.pass_context
def main(context: click.Context, folder: Path) -> None:
    """List the saved models, choose the one that is served, verify and remove them."""
    context.obj = folder


@main.command("list")
@click.pass_obj
def _list(folder: Path) -> None:
    """One line for each model; the current one has a star."""
    info = registry.read(folder)
    if not info["models"]:
        click.echo(f"no models in {folder}; `python run.py` saves one", err=True)
    for name, entry in info["models"].items():
        test = entry["metrics"]["test"]
        click.echo(
            f"{'*' if name == info['current'] else ' '} {name}  {entry['dataset']['name']}  "
            f"{entry['model']['name']}  {test['errors']} errors of {test['n']}"
            + ("  quick" if entry["quick"] else "")
        )


@main.command("use")
@click.argument("name")
@click.pass_obj
def _use(folder: Path, name: str) -> None:
    """Make NAME the model that is served."""
    registry.use(folder, name)


@main.command("verify")
@click.pass_obj
def _verify(folder: Path) -> None:
    """Compare every file with its recorded checksum."""
    wrong = []
    for name, entry in registry.read(folder)["models"].items():
        try:
            for kind in entry["files"]:
                registry.file(folder, name, kind)
            click.echo(f"{name} ok")
        except registry.RegistryError as error:
            wrong.append(str(error))
    if wrong:
        raise registry.RegistryError("\nregistry: ".join(wrong))


@main.command("remove")
@click.argument("name")
@click.pass_obj
def _remove(folder: Path, name: str) -> None:
    """Delete NAME's files and record."""
    registry.remove(folder, name)


def run_cli(arguments: list[str]) -> int:
    """Run the command; each error is one line on standard error and an exit code."""
    shell.accept_any_text()
    try:
        main.main(arguments, "python -m mnist.registry")
    except registry.RegistryError as error:
        return print_error(str(error), 1)
    except OSError as error:
        return print_error(str(error), 2)
    except Exception as error:  # noqa: BLE001 - the last resort
        return print_error(shell.describe_crash(error), 1)
    return 0


def print_error(message: str, code: int) -> int:
    click.echo(f"registry: {message}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
