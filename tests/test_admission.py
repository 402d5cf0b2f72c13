"""serve/admission.py: requests over a limit are rejected until others end."""

import asyncio
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
        requests.admit(Queue(waiting=210))
    assert (busy.value.why, busy.value.retry_after_s) == ("queue", 3)
    requests.release()
    requests.admit(Queue())
    with pytest.raises(Busy, match="MAX_QUEUE"):
        requests.admit(Queue())


def test_a_release_makes_room_for_one_request() -> None:
    requests = Admission(Settings(max_queue=9), Metrics())
    requests.admit(Queue())
    requests.admit(Queue())
    requests.release()
    assert requests.requests == 1
    requests.release()
    assert requests.requests == 0


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
    monkeypatch.setattr(admission, "MAX_BODIES_BYTES", 100_000_000)
    requests = Admission(Settings(), Metrics())
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    requests.add_body_bytes(first, 40_000_000)
    requests.add_body_bytes(first, 30_000_000)
    with pytest.raises(Busy) as busy:
        requests.add_body_bytes(second, 30_000_001)
    assert str(busy.value) == (
        "the server is busy: the uploads in progress would exceed 100 MB; try again in 1 s"
    )
    assert (busy.value.why, busy.value.retry_after_s) == ("memory", 1)
    requests.release_body({})  # of a request without a body
    requests.add_body_bytes(second, 20_000_000)
    for _ in range(2):
        requests.release_body(first)
    requests.add_body_bytes(second, 80_000_000)
    with pytest.raises(Busy):
        requests.add_body_bytes(first, 1)


def reject(requests: Admission, *reasons: str) -> None:
    for why in reasons:
        requests.count_rejected(Busy(why, "it is full"))


def test_rejected_requests_are_counted_by_reason_and_logged_as_one_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    requests = Admission(Settings(), metrics)
    requests.report_rejected()
    assert not caplog.records  # nothing to report
    reject(requests, "queue", "deadline", "queue")
    for _ in range(2):  # the second one has nothing to report
        requests.report_rejected()
    (line,) = caplog.records
    assert (line.__dict__["status"], line.__dict__["requests"]) == (429, 3)
    reject(requests, "queue")
    requests.report_rejected()
    lines = metrics.text().decode().splitlines()
    assert 'turned_away_total{why="queue"} 3.0' in lines
    assert 'turned_away_total{why="deadline"} 1.0' in lines
    assert 'requests_total{method="POST",route="other",status="429"} 4.0' in lines


def test_reporting_continues_after_a_failed_report(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, reports = [], []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 3:
            raise asyncio.CancelledError

    def report() -> None:
        reports.append(True)
        raise OSError("the disk is full")

    requests = Admission(Settings(), Metrics())
    monkeypatch.setattr(admission.asyncio, "sleep", sleep)
    monkeypatch.setattr(requests, "report_rejected", report)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(requests.keep_reporting())
    assert waits == [admission.REPORT_S] * 4
    assert len(reports) == 3
