"""A saved record -> a function from images to probabilities; torch is imported only then."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnist import registry

Classifier = Callable[[np.ndarray], np.ndarray]
"""images uint8 (N, channels, size, size), as images.normalise gives -> probabilities (N, classes)
float32"""


def load(folder: Path, name: str | None = None, threads: int | None = None) -> Classifier:
    """The classifier of one saved model, the current one by default; runs on the CPU.

    Raises registry.RegistryError where there is none or its weights are missing or altered.
    """
    import torch

    from mnist import models

    name, record = registry.record(folder, name)
    weights = registry.file(folder, name)
    data = record["dataset"]
    if threads is not None:
        torch.set_num_threads(threads)
    model = models.build(
        record["model"]["name"], data["channels"], data["size"], len(data["classes"])
    )
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        inputs = (torch.from_numpy(images).float() / 255 - data["mean"]) / data["std"]
        return model(inputs).softmax(1).numpy()

    return classify
