"""A saved record -> a function from images to probabilities; torch is imported only then."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnist import registry

Classifier = Callable[[np.ndarray], np.ndarray]
"""images uint8 (N, channels, size, size), as images.normalise gives -> probabilities (N, classes)
float32"""


def load(folder: Path, name: str | None = None, threads: int | None = None) -> Classifier:
    """The classifier of one saved model, the current one by default; runs on the CPU.

    Raises registry.RegistryError where there is none, its weights are missing or altered, or they
    do not make the network that the record names.
    """
    import torch

    from mnist import models

    name, record = registry.record(folder, name)
    weights = registry.file(folder, name)
    data = record["dataset"]
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        model = models.build(
            record["model"]["name"], data["channels"], data["size"], len(data["classes"])
        )
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # what a pickle raises has no common class
        why = textwrap.shorten(str(error), 150)  # torch writes paragraphs
        raise registry.RegistryError(f"model {name} cannot be loaded: {why}") from error
    model.eval()

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        inputs = (torch.from_numpy(images).float() / 255 - data["mean"]) / data["std"]
        return model(inputs).softmax(1).numpy()

    return classify
