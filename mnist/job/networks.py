"""A network before its study: whether it can be trained here, and how fast."""

import contextlib
from dataclasses import replace
from typing import Any

import click
import torch
from torch.overrides import TorchFunctionMode

from mnist import data, folding, models
from mnist.job.display import root_cause
from mnist.job.options import Options
from mnist.process import total_memory
from mnist.search import loop, runs
from mnist.search.runs import Run
from mnist.search.urls import sqlite_file
from mnist.search.workers import Pool, training_threads

BYTES_PER_WEIGHT = 16  # the weight, its gradient and Adam's two moments, in float32
MIN_BFLOAT16_SPEEDUP = 1.1  # less may be noise; 1.2 took float32 once in five runs on AMX Xeon
SPEED_BATCH_SIZES = (64, 8)  # of the speed measurement; the second is used if the first fails


def validate_network(
    options: Options, dataset: data.Dataset, device: torch.device
) -> torch.nn.Module:
    """Build a network and check its output for two images: one logit per class.

    Raises click.UsageError: a plugin's network may fail in any way.
    """
    images, classes = dataset.train.images[:2].to(device), len(dataset.classes)
    on_cpu = device.type == "cpu"
    try:
        needed = count_weights(options, dataset) * BYTES_PER_WEIGHT if on_cpu else 0
        if needed > total_memory():
            sizes = f"{needed / 1e9:.3g} GB, and this process may use {total_memory() / 1e9:.3g} GB"
            remedy = "try --model cnn or, for a folder, a smaller --image-size"
            raise MemoryError(f"its training needs {sizes}; {remedy}")
        model = runs.build_network(options.model, dataset, options.plain).to(device)
        with torch.no_grad():
            shape = tuple(model.eval()(dataset.standardise(images)).shape)
    except Exception as error:  # a plugin's network may raise anything
        raise network_error(options, error) from error
    if shape != (2, classes):
        text = f"2 images give {shape}, not {(2, classes)}"
        raise click.UsageError(f"network {options.model!r} cannot be used: {text}")
    return model.train()


def network_error(options: Options, error: Exception) -> click.UsageError:
    text = f"{type(error).__name__}: {root_cause(error)}"
    return click.UsageError(f"network {options.model!r} cannot be used: {text}")


class _Uninitialised(TorchFunctionMode):
    """Skips `normal_`: on the device "meta", torch imports its compiler for it, 64 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def count_weights(options: Options, dataset: data.Dataset) -> int:
    """The number of the network's weights, without allocating them; 0 where that fails."""
    with contextlib.suppress(Exception), torch.device("meta"), _Uninitialised():
        return models.count_parameters(runs.build_network(options.model, dataset, options.plain))
    return 0


def measure_speed(options: Options, pool: Pool, try_bfloat16: bool) -> tuple[float, bool]:
    """Training images per second of a worker on all cores, and whether with bfloat16.

    Raises click.UsageError where the network cannot be trained.
    """
    for batch_size in SPEED_BATCH_SIZES:
        params = {"batch_size": batch_size, "optimizer": "Adam"}
        run = Run.for_speed(options.model, params, training_threads(), options.plain)
        try:
            speed = loop.measure_speed(pool, run)
            break
        except loop.RunFailed as error:  # e.g. for lack of memory
            last_error = error
    else:
        raise click.UsageError(f"network {options.model!r} cannot be used: {last_error}")
    if try_bfloat16:
        with contextlib.suppress(loop.RunFailed):  # an operation without bfloat16
            bfloat16_speed = loop.measure_speed(pool, replace(run, bfloat16=True))
            if bfloat16_speed > MIN_BFLOAT16_SPEEDUP * speed:
                return bfloat16_speed, True
    return speed, False


def select_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" prefers cuda, then mps, then cpu.

    Raises ValueError where this machine lacks the device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available.get(name):
        raise ValueError(f"device {name!r} is not on this machine; use auto or cpu")
    return torch.device(name)


def may_use_bfloat16(options: Options, device: torch.device, model: torch.nn.Module) -> bool:
    """Whether to measure bfloat16: for training forms, on devices that support it, in studies that
    no other machine shares, as a machine without bfloat16 would get other results."""
    if not folding.has_factors(model) or sqlite_file(options.storage) is None:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capable = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capable.get(f"{kind}_bf16") for kind in ("avx512", "amx"))
