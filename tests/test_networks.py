"""mnist.job.networks: measurements before a study begins."""

import subprocess
import sys
from typing import Any

import click
import pytest
import torch

from mnist import data, folding, models
from mnist.job import networks
from mnist.job.options import Options
from mnist.search import loop
from mnist.search.runs import Run
from tests.conftest import ROOT


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """(batch size, bfloat16) -> images per second of a worker; other measurements fail."""
    speeds: dict[Any, float] = {}

    def speed(_: Any, run: Run) -> float:
        if (key := (run.params["batch_size"], run.bfloat16)) not in speeds:
            raise loop.RunFailed("RuntimeError: made up")
        return speeds[key]

    monkeypatch.setattr(networks.loop, "measure_speed", speed)
    return speeds


@pytest.mark.parametrize(
    ("measured", "try_bfloat16", "expected"),
    [
        ({(64, False): 100, (64, True): 150}, True, (150, True)),
        ({(64, False): 100, (64, True): 109}, True, (100, False)),  # not worth it
        ({(64, False): 100, (64, True): 150}, False, (100, False)),
        ({(64, False): 100}, True, (100, False)),  # an operation that has no bfloat16
        ({(8, False): 50, (8, True): 90}, True, (90, True)),  # too little memory for 64
    ],
)
def test_the_faster_precision_is_taken_where_it_is_worth_it(
    speeds: dict[Any, float], measured: Any, try_bfloat16: bool, expected: tuple[float, bool]
) -> None:
    speeds.update(measured)
    assert networks.measure_speed(Options(), None, try_bfloat16) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("speeds")
def test_a_network_that_cannot_be_trained_is_named() -> None:
    with pytest.raises(click.UsageError, match="network 'parallel' cannot be used: RuntimeError"):
        networks.measure_speed(Options(), None, True)  # type: ignore[arg-type]


def test_bfloat16_is_for_training_forms_of_studies_that_no_other_machine_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = folding.training_form(models.build("parallel", 1, 28, 10))
    plain, cpu = models.build("linear", 1, 28, 10), torch.device("cpu")
    shared = Options(storage="postgresql://host/studies")
    for has, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert networks.may_use_bfloat16(Options(), cpu, form) == expected
        assert not networks.may_use_bfloat16(Options(), cpu, plain)
        assert not networks.may_use_bfloat16(shared, cpu, form)


def test_weights_are_counted_without_the_compiler(digits: data.Dataset) -> None:
    program = (
        "import sys; from mnist import data; from mnist.job import networks;"
        "from mnist.job.options import Options;"
        "print(networks.count_weights(Options(model='parallel'), data.load('digits')));"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    form = folding.training_form(models.build("parallel", 1, digits.size, 10))
    assert done.stdout.split() == [str(models.count_parameters(form)), "False"]


def test_a_missing_device_is_named() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    with pytest.raises(ValueError, match="device 'mps' is not on this machine"):
        networks.select_device("mps")


@pytest.mark.parametrize(
    ("usable", "expected"),
    [({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")],
)
def test_the_fastest_device_of_the_machine_is_preferred(
    monkeypatch: pytest.MonkeyPatch, usable: set[str], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in usable)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in usable)
    assert networks.select_device() == torch.device(expected)
    assert networks.select_device("cpu") == torch.device("cpu")
    for name in {"cuda", "mps", "tpu"} - usable:
        with pytest.raises(ValueError, match=f"device '{name}' is not on this machine"):
            networks.select_device(name)
