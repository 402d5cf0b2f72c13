"""serve/admission.py: requests over a limit are rejected until others end."""

from dataclasses import dataclass
from typing import Any

import pytest

from serve import admission
from serve.admission import Admission, Busy
from serve.metrics import Metrics
from serve.settings import Settings


@dataclass
class Queue:
    waiting: int = 0
    pace_s: float = 0.01


def test_a_full_queue_rejects_requests_until_one_ends() -> None:
    requests = Admission(Settings(max_queue=3), Metrics())
    for _ in range(3):  # none of these requests has sent its picture yet
        requests.admit(Queue())
    with pytest.raises(Busy, match="MAX_QUEUE") as busy:
        requests.admit(Queue())
    assert busy.value.retry_after_s >= 1
    requests.release()
    requests.admit(Queue())


def test_a_wait_over_half_of_the_deadline_is_rejected_with_the_time_to_retry() -> None:
    requests = Admission(Settings(deadline_ms=4000), Metrics())
    requests.admit(Queue(waiting=200))
    with pytest.raises(Busy) as busy:
        requests.admit(Queue(waiting=201))
    assert str(busy.value) == (
        "the server is busy: no answer within 4000 ms (DEADLINE_MS); try again in 3 s"
    )
    assert (busy.value.why, busy.value.retry_after_s) == ("deadline", 3)


def test_bodies_over_the_limit_are_rejected_until_another_request_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_BODIES_BYTES", 100)
    requests = Admission(Settings(), Metrics())
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    requests.add_body_bytes(first, 40)
    requests.add_body_bytes(first, 30)
    with pytest.raises(Busy) as busy:
        requests.add_body_bytes(second, 31)
    assert str(busy.value) == "the server is busy: large uploads; try again in 1 s"
    assert (busy.value.why, busy.value.retry_after_s) == ("memory", 1)
    requests.release_body(first)
    requests.add_body_bytes(second, 100)
