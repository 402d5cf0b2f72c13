"""The house rules: imports point one way, the docs tell what there is."""

import ast
import re
from pathlib import Path

import pytest

from serve.settings import Settings
from tests.conftest import ROOT

ALLOWED = {  # who may import what of the project
    "mnist/data.py": {
        "mnist.files",
        "mnist.folders",
        "mnist.plugins",
        "mnist.reading",
        "mnist.sources",
        "mnist.splits",
    },
    "mnist/files.py": set(),
    "mnist/folders.py": {
        "mnist.files",
        "mnist.images",
        "mnist.reading",
        "mnist.sources",
        "mnist.splits",
    },
    "mnist/images.py": {"mnist.ink"},
    "mnist/ink.py": set(),
    "mnist/budget.py": set(),
    "mnist/folding.py": set(),
    "mnist/models.py": {"mnist.folding"},
    "mnist/reading.py": {"mnist.images"},
    "mnist/sources.py": {"mnist.files", "mnist.images", "mnist.reading", "mnist.splits"},
    "mnist/splits.py": set(),
    "mnist/training.py": {"mnist.data", "mnist.folding", "mnist.inference"},
    "mnist/ood.py": set(),
    "mnist/export.py": {
        "mnist.data",
        "mnist.inference",
        "mnist.models",
        "mnist.ood",
        "mnist.scores",
        "mnist.training",
    },
    "mnist/plugins.py": set(),
    "mnist/space.py": {"mnist.training"},
    "mnist/study.py": {"mnist.budget", "mnist.data", "mnist.space"},
    "mnist/members.py": {"mnist.space", "mnist.study"},
    "mnist/workers.py": {
        "mnist.data",
        "mnist.folding",
        "mnist.models",
        "mnist.plugins",
        "mnist.training",
    },
    "mnist/search.py": {
        "mnist.members",
        "mnist.space",
        "mnist.study",
        "mnist.training",
        "mnist.workers",
    },
    "mnist/options.py": {
        "mnist.data",
        "mnist.folding",
        "mnist.models",
        "mnist.plugins",
        "mnist.space",
        "mnist.study",
    },
    "mnist/display.py": {"mnist.budget", "mnist.search", "mnist.study", "mnist.training"},
    "mnist/job.py": {
        "mnist.budget",
        "mnist.data",
        "mnist.folding",
        "mnist.members",
        "mnist.models",
        "mnist.options",
        "mnist.registry",
        "mnist.search",
        "mnist.space",
        "mnist.study",
        "mnist.workers",
    },
    "mnist/prepare.py": {
        "mnist.budget",
        "mnist.data",
        "mnist.display",
        "mnist.folding",
        "mnist.job",
        "mnist.members",
        "mnist.models",
        "mnist.options",
        "mnist.plugins",
        "mnist.search",
        "mnist.space",
        "mnist.study",
        "mnist.training",
        "mnist.workers",
    },
    "mnist/finish.py": {
        "mnist.budget",
        "mnist.display",
        "mnist.job",
        "mnist.release",
        "mnist.search",
        "mnist.study",
        "mnist.workers",
    },
    "mnist/release.py": {
        "mnist.display",
        "mnist.export",
        "mnist.job",
        "mnist.folding",
        "mnist.models",
        "mnist.options",
        "mnist.plugins",
        "mnist.registry",
        "mnist.study",
        "mnist.training",
        "mnist.workers",
    },
    "mnist/compare.py": {"mnist.inference", "mnist.registry"},
    "mnist/scores.py": set(),
    "mnist/plots.py": {"mnist.scores"},
    "mnist/report.py": {
        "mnist.display",
        "mnist.members",
        "mnist.plots",
        "mnist.registry",
        "mnist.scores",
        "mnist.study",
    },
    "mnist/predict.py": {"mnist.images", "mnist.inference", "mnist.plots", "mnist.registry"},
    "mnist/registry.py": set(),
    "mnist/inference.py": {"mnist.models", "mnist.ood", "mnist.registry"},
    "serve/app.py": {
        "mnist.images",
        "mnist.registry",
        "serve",
        "serve.admission",
        "serve.engine",
        "serve.feedback",
        "serve.middleware",
        "serve.schemas",
        "serve.metrics",
        "serve.settings",
        "serve.uploads",
    },
    "serve/uploads.py": {"serve.admission", "serve.engine", "serve.schemas"},
    "serve/admission.py": {"serve.metrics", "serve.settings"},
    "serve/middleware.py": {"serve.admission", "serve.settings"},
    "serve/engine.py": {
        "mnist.registry",
        "serve.admission",
        "serve.batching",
        "serve.loading",
        "serve.metrics",
        "serve.settings",
    },
    "serve/loading.py": {
        "mnist.images",
        "mnist.inference",
        "mnist.registry",
        "serve.admission",
        "serve.preflight",
        "serve.settings",
    },
    "serve/preflight.py": {"mnist.registry"},
    "serve/preflight_worker.py": {"mnist.inference", "mnist.registry"},
    "serve/batching.py": {"serve.admission", "serve.metrics", "serve.settings"},
    "serve/feedback.py": {"mnist", "mnist.images"},
    "serve/metrics.py": set(),
    "serve/schemas.py": set(),
    "serve/settings.py": {"mnist", "mnist.registry"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            plain = node.module in ("mnist", "serve")
            names |= {f"{node.module}.{a.name}" for a in node.names} if plain else {node.module}
    return names


def test_imports_point_one_way() -> None:
    modules = [*(ROOT / "mnist").glob("*.py"), *(ROOT / "serve").glob("*.py")]
    for path in modules:
        if path.name != "__init__.py":
            internal = {
                name for name in imports(path) if name.split(".")[0] in ("mnist", "serve", "run")
            }
            assert internal <= ALLOWED[str(path.relative_to(ROOT))], path


@pytest.mark.parametrize("library", ["matplotlib", "optuna", "torchvision"])
def test_a_library_is_imported_in_its_room_only(library: str) -> None:
    rooms = {
        "optuna": {
            "space.py",
            "study.py",
            "members.py",
            "search.py",
            "display.py",
            "job.py",
            "prepare.py",
        }
        | {"finish.py", "release.py", "plots.py", "report.py"},
        "matplotlib": {"plots.py"},
        "torchvision": {"files.py"},
    }[library]
    for path in (ROOT / "mnist").glob("*.py"):
        if any(name.split(".")[0] == library for name in imports(path)):
            assert path.name in rooms


def test_each_version_is_written_once() -> None:
    lines = [
        line.split("==")[0]
        for path in ROOT.glob("requirements*.txt")
        for line in path.read_text().splitlines()
        if "==" in line
    ]
    assert len(lines) == len(set(lines))


def test_every_option_setting_and_route_is_in_the_docs() -> None:
    docs = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("search", "serving"))
    options = re.findall(
        r"^    (\w+): .* = option\(", (ROOT / "mnist/options.py").read_text(), re.MULTILINE
    )
    routes = re.findall(r'^@app\.\w+\(\s*"([^"]+)"', (ROOT / "serve/app.py").read_text(), re.M)
    assert len(options) > 10
    for word in (
        *(f"--{name.strip('_').replace('_', '-')}" for name in options),
        *(name.upper() for name in Settings.model_fields),
        *(route.replace("{name}", "NAME") for route in routes),
    ):
        assert f"`{word}" in docs or f" {word}" in docs, word
