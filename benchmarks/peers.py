"""The peers of benchmarks.serving: the usual FastAPI + torch server, and LitServe.

python -m benchmarks.peers usual --port 8000      # or litserve; MODELS names the registry

Runs until stopped. Both servers scale the whole picture to 28x28 and invert it if its border is
light, as most servers do.
"""

import io
import os
from pathlib import Path
from typing import Any

import click
import litserve as ls
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from PIL import Image

from mnist import models, registry


def preprocess(file: bytes) -> np.ndarray:
    """Turn a picture of a digit into float32 (1, 28, 28), 0..1, ink is high."""
    grey = np.asarray(Image.open(io.BytesIO(file)).convert("L").resize((28, 28)), np.float32) / 255
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return (1 - grey if border.mean() > 0.5 else grey)[None]


class Classifier:
    """The current model of the registry MODELS, in eager torch."""

    def __init__(self) -> None:
        folder = Path(os.environ["MODELS"])
        name, record = registry.record(folder)
        self.dataset = record["dataset"]
        self.model = models.build(
            record["model"]["name"], 1, self.dataset["size"], len(self.dataset["classes"])
        )
        weights = torch.load(registry.file(folder, name), weights_only=True)
        self.model.load_state_dict(weights)
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> list[list[float]]:
        """Probabilities (N, classes) of images (N, 1, 28, 28)."""
        inputs = (torch.from_numpy(images) - self.dataset["mean"]) / self.dataset["std"]
        return self.model(inputs).softmax(1).tolist()

    def make_answer(self, probabilities: list[float]) -> dict[str, Any]:
        """Make the response's JSON."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {"prediction": self.dataset["classes"][best], "probability": probabilities[best]}


def serve_usual(port: int) -> None:
    """Serve with FastAPI and classify in the route, on the event loop."""
    classifier, app = Classifier(), FastAPI()

    @app.post("/predict")
    async def predict(file: UploadFile) -> dict[str, Any]:
        images = preprocess(await file.read())[None]
        return classifier.make_answer(classifier(images)[0])

    uvicorn.run(app, port=port, log_level="warning")


class Api(ls.LitAPI):
    """The hooks of LitServe, which sends batches to a process of the model's own."""

    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Request) -> np.ndarray:
        return preprocess(request["file"].file.read())  # the request is a form

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[list[float]]:
        return self.classifier(x)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return self.classifier.make_answer(output)


def serve_litserve(port: int) -> None:
    """Serve with LitServe, in batches of at most 16 pictures that wait for at most 5 ms."""
    server = ls.LitServer(Api(max_batch_size=16, batch_timeout=0.005), accelerator="cpu")
    server.run("127.0.0.1", port, log_level="warning", generate_client_file=False)


@click.command()
@click.argument("peer", type=click.Choice(["usual", "litserve"]))
@click.option("--port", type=int, default=8000, show_default=True)
def main(peer: str, port: int) -> None:
    """Serve the current model until stopped."""
    {"usual": serve_usual, "litserve": serve_litserve}[peer](port)


if __name__ == "__main__":
    main()
