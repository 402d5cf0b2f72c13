"""The house rules: imports point one way, the docs tell what there is."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from serve.app import app
from serve.settings import Settings
from tests.conftest import ROOT

LAYERS = (  # a module may import its own package and the layers before it
    {"mnist.disk", "mnist.masking"},
    {"mnist.process", "mnist.shell"},
    {"mnist.conformal", "mnist.folding", "mnist.ood", "mnist.plugins", "mnist.registry"}
    | {"mnist.augmentation", "mnist.optimizers", "mnist.memory", "mnist.scores"},
    {"mnist.images", "mnist.models"},
    {"mnist.data", "mnist.inference", "mnist.outliers"},
    {"mnist.metrics"},
    {"mnist.batch_norms"},
    {"mnist.training", "mnist.calibration"},
    {"mnist.export", "mnist.search"},
    {"mnist.report"},
    {"mnist.job"},
    {"mnist.predict"},
    {"run"},
    {"serve.errors", "serve.startup", "serve.visibility"},
    {"serve.schemas", "serve.metrics", "serve.settings", "serve.feedback", "serve.upgrades"},
    {"serve.admission", "serve.preflight", "serve.preflight_worker"},
    {"serve.store"},
    {"serve.batching", "serve.loading"},
    {"serve.engine"},
    {"serve.forms", "serve.middleware", "serve.parameters"},
    {"serve.dependencies", "serve.handlers", "serve.uploads"},
    {"serve.tensors"},
    {"serve.open_inference", "serve.sagemaker"},
    {"serve.app"},
)
# All that the server may import.
SERVED = {"mnist.conformal", "mnist.disk", "mnist.images", "mnist.inference", "mnist.process"}
SERVED |= {"mnist.registry", "mnist.registry.mirror"}


def find_modules() -> dict[str, Path]:
    """Find all modules of run.py, mnist/ and serve/ by their names."""
    paths = [ROOT / "run.py", *(ROOT / "mnist").rglob("*.py"), *(ROOT / "serve").rglob("*.py")]
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    modules = {
        name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)
    }
    return {name: path for name, path in modules.items() if name not in ("mnist", "serve")}


MODULES = find_modules()


def find_imports(path: Path) -> set[str]:
    """Find the modules that a file imports, including those of libraries."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner.values()}
    return names


def find_layer(module: str) -> int:
    """The index in LAYERS of a module's package, or of the module itself."""
    package = ".".join(module.split(".")[:2])
    return next(i for i, names in enumerate(LAYERS) if package in names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    package = module.split(".")[:2]
    for other in find_imports(MODULES[module]) & {*MODULES}:
        assert other.split(".")[:2] == package or find_layer(other) < find_layer(module), other
        if module.startswith("serve.") and other.startswith("mnist."):
            assert other in SERVED, other


def test_no_modules_import_each_other() -> None:
    graph = {name: find_imports(path) & {*MODULES} - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("optuna", ("run", "mnist.search", "mnist.job", "mnist.report")),
        ("matplotlib", ("mnist.report.plots", "mnist.report.model_plots")),
        ("torchvision", ("mnist.data.download",)),
    ],
)
def test_a_library_is_imported_in_its_place_only(library: str, places: tuple[str, ...]) -> None:
    importers = {
        module
        for module, path in MODULES.items()
        if library in {name.split(".")[0] for name in find_imports(path)}
    }
    assert importers
    assert all(module.startswith(places) for module in importers)
    assert {"mnist.search.workers", "mnist.search.runs"}.isdisjoint(importers)


def test_only_the_start_of_the_server_has_an_effect_at_its_import() -> None:
    calls = {
        module
        for module, path in MODULES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    }
    assert calls == {"serve.startup", "serve.app"}


def test_modules_functions_and_classes_are_short() -> None:
    limits = {ast.ClassDef: 150, ast.FunctionDef: 50, ast.AsyncFunctionDef: 50}
    long = set()
    for module, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 300, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= limits[type(node)]:
                    long.add(f"{module}.{node.name}")
    assert long == {"mnist.training.fit"}  # the training loop
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_each_version_is_written_once() -> None:
    lines = [
        line.split("==")[0]
        for path in ROOT.glob("requirements*.txt")
        for line in path.read_text().splitlines()
        if "==" in line
    ]
    assert len(lines) == len(set(lines))


def test_every_report_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/reports.md").read_text()
    named = re.findall(r"`(test_\w+\.py)`(?: \(((?:`[^`]+`(?:, )?)+)\))?", text)
    assert len(named) > 100
    for file, words in named:
        test = (ROOT / "tests" / file).read_text()
        for word in re.findall("`([^`]+)`", words):
            assert word in test, (file, word)


def test_every_option_setting_and_route_is_in_the_docs() -> None:
    docs = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("search", "serving"))
    options = re.findall(
        r"^    (\w+): .* = option\(", (ROOT / "mnist/job/options.py").read_text(), re.MULTILINE
    )
    routes = ["/", *app.openapi()["paths"]]
    assert len(options) > 10
    for word in (
        *(f"--{name.strip('_').replace('_', '-')}" for name in options),
        *(name.upper() for name in Settings.model_fields),
        *(route.replace("{name}", "NAME") for route in routes),
    ):
        assert f"`{word}" in docs or f" {word}" in docs, word
