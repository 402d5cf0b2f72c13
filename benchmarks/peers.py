"""The same model behind other servers: the usual FastAPI + torch one, and LitServe.

python -m benchmarks.peers usual --port 8000      # or litserve; MODELS names the registry

Both scale the whole picture to 28x28 and turn it where its rim is light: what most servers do.
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


def plain(data: bytes) -> np.ndarray:
    """A picture of a digit -> float32 (1, 28, 28), 0..1, ink high."""
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((28, 28)), np.float32) / 255
    rim = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return (1 - grey if rim.mean() > 0.5 else grey)[None]


class Network:
    """The current model of the registry MODELS, in eager torch."""

    def __init__(self) -> None:
        folder = Path(os.environ["MODELS"])
        name, record = registry.record(folder)
        self.data = record["dataset"]
        self.model = models.build(
            record["model"]["name"], 1, self.data["size"], len(self.data["classes"])
        )
        weights = torch.load(registry.file(folder, name), weights_only=True)
        self.model.load_state_dict(weights)
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> list[list[float]]:
        images = (torch.from_numpy(pictures) - self.data["mean"]) / self.data["std"]
        return self.model(images).softmax(1).tolist()

    def answer(self, shares: list[float]) -> dict[str, Any]:
        best = max(range(len(shares)), key=shares.__getitem__)
        return {"prediction": self.data["classes"][best], "probability": shares[best]}


def usual(port: int) -> None:
    """The model answers in the request's handler, on the event loop."""
    network, app = Network(), FastAPI()

    @app.post("/predict")
    async def predict(file: UploadFile) -> dict[str, Any]:
        return network.answer(network(plain(await file.read())[None])[0])

    uvicorn.run(app, port=port, log_level="warning")


class Api(ls.LitAPI):
    """LitServe's: a process for the model, which gets batches."""

    def setup(self, device: str) -> None:
        self.network = Network()

    def decode_request(self, request: Request) -> np.ndarray:
        return plain(request["file"].file.read())  # type: ignore[index]  # it is the form

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[list[float]]:
        return self.network(x)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return self.network.answer(output)


def litserve(port: int) -> None:
    server = ls.LitServer(Api(max_batch_size=16, batch_timeout=0.005), accelerator="cpu")
    server.run("127.0.0.1", port, log_level="warning", generate_client_file=False)


@click.command()
@click.argument("which", type=click.Choice(["usual", "litserve"]))
@click.option("--port", type=int, default=8000)
def main(which: str, port: int) -> None:
    """Serve the model until stopped."""
    {"usual": usual, "litserve": litserve}[which](port)


if __name__ == "__main__":
    main()
