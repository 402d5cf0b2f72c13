"""A running server against its OpenAPI schema, and against hostile files."""

import base64
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import load, servers
from tests import hostile

schemathesis = pytest.importorskip("schemathesis", reason="it is in requirements-dev.txt")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402

pytestmark = pytest.mark.slow


def _pictures() -> list[bytes]:
    """Drawn bars, each of which gets an answer."""
    pictures = []
    for form in ("PNG", "JPEG", "WEBP"):
        page = np.full((60, 50), 255, np.uint8)
        page[10:50, 22:28] = 0
        stream = io.BytesIO()
        Image.fromarray(page).save(stream, form)
        pictures.append(stream.getvalue())
    return pictures


PICTURES = st.sampled_from(_pictures())
for kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, PICTURES)
schemathesis.openapi.format("binary", PICTURES)
schemathesis.openapi.format("byte", PICTURES.map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.format("class", st.sampled_from("0123456789"))


@pytest.fixture(scope="module")
def api(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    first = load.request("/predict", _pictures()[0])
    feedback = tmp_path_factory.mktemp("feedback")
    with servers.server(saved, first, FEEDBACK_DIR=str(feedback)) as server:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def test_every_response_matches_the_schema(api: Any) -> None:
    """For each route, with valid and with invalid data."""
    operations = [operation.ok() for operation in api.get_all_operations()]
    assert len(operations) == 17
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                body = case.body if isinstance(case.body, dict) else {}
                # A form has only text: the number 0 would be the class "0", null the file "null".
                assume(isinstance(body.get("label", ""), str))
                assume(isinstance(body.get("file", b""), bytes | str))
                assume(isinstance(body.get("files", []), list))
                case.call_and_validate()

            with contextlib.suppress(Unsatisfiable):  # `GET /health` has no invalid data
                check()


def test_hostile_files_get_a_4xx_and_cost_no_memory(saved: Path) -> None:
    print(hostile.attack(saved, 300))
