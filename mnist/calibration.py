"""Temperature and threshold of uncertainty, fitted on the calibration split."""

import logging
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from mnist import ood
from mnist.data import Dataset
from mnist.inference import Classifier, Outputs
from mnist.metrics import count_errors

MAX_TEMPERATURE = 10.0  # the smallest is its inverse
MAX_UNCERTAIN = 0.01  # share of the calibration images
MAX_UNCERTAIN_OTHER = 0.1  # the same in engines that are not served; 1 to 2 % is usual
OOD_IMAGES = 5_000  # training images; with 2,500 of them 2 % less noise is flagged

log = logging.getLogger(__name__)

EngineOutputs = tuple[Classifier, Outputs]
"""A model in one engine, and its outputs for the calibration images."""


def calibrate(engines: dict[str, EngineOutputs], dataset: Dataset) -> Classifier:
    """The first engine's classifier, with temperature and threshold."""
    outputs = {engine: output for engine, (_, output) in engines.items()}
    first = next(iter(engines))
    temperature = fit_temperature(outputs[first][0], dataset.calibration.labels.numpy())
    return set_threshold(replace(engines[first][0], temperature=temperature), outputs, dataset)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the highest likelihood of the labels (N,) (Guo et al. 2017).

    Without errors, the likelihood would grow without limit as the temperature falls. The labels
    then count as if one of N + 2 was drawn at random (Laplace's rule of succession).
    """
    random_share = 0.0 if count_errors(logits, labels) else 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        shares = log_softmax(logits / np.exp(log_temperature), axis=1)
        true = shares[np.arange(len(labels)), labels].mean()
        return -float((1 - random_share) * true + random_share * shares.mean())

    limit = float(np.log(MAX_TEMPERATURE))
    optimum = minimize_scalar(loss, bounds=(-limit, limit), method="bounded")
    return round(float(np.exp(optimum.x)), 4)


def set_threshold(served: Classifier, outputs: dict[str, Outputs], dataset: Dataset) -> Classifier:
    """The classifier with a score and the threshold below which a picture is uncertain.

    `outputs` maps each engine to its outputs for the calibration images. The score is the
    out-of-distribution score of the features, or the largest logit where features are missing or
    differ between engines.
    """
    samples = dataset.train.head(OOD_IMAGES)
    try:
        _, features = served.outputs(samples.images.numpy())
        by_features = replace(served, ood_score=ood.fit(features, samples.labels.numpy()))
        scores = {engine: by_features.scores(*output) for engine, output in outputs.items()}
        limit = fit_threshold(scores[served.engine])
        for engine in scores:
            share = float((scores[engine] < limit).mean())
            if share > MAX_UNCERTAIN_OTHER:
                raise ValueError(f"{engine} is uncertain of {share:.1%} of calibration images")
        return replace(by_features, uncertain_below=limit)
    except ValueError as error:
        log.info("no out-of-distribution score: %s", error)
        limit = fit_threshold(outputs[served.engine][0].max(1))
        return replace(served, ood_score=None, uncertain_below=limit)


def fit_threshold(scores: np.ndarray) -> float:
    """The highest value, to four places, with at most MAX_UNCERTAIN of the scores (N,) below it."""
    lowest = np.sort(scores)[int(MAX_UNCERTAIN * len(scores))]
    return float(np.floor(np.float64(lowest) * 1e4) / 1e4)
