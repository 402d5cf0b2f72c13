"""serve/batching.py: waiting pictures share a batch, late ones are rejected."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from serve import batching
from serve.admission import Admission, Busy
from serve.batching import Batcher, Job
from serve.metrics import Metrics
from serve.settings import Settings
from tests.conftest import Clock


@pytest.fixture(autouse=True)
def clock(queue_clock: Clock) -> Clock:
    return queue_clock


class Sums:
    """A model that answers with the sum of a picture's bytes, once `gate` is set."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.batches_started = 0
        self.gate = threading.Event()
        self.gate.set()

    def is_small(self, data: bytes) -> bool:
        return data != b"large"

    def normalise(self, data: bytes) -> np.ndarray:
        if data == b"bad":
            raise ValueError("bad")
        return np.frombuffer(data, np.uint8)

    def classify(self, pictures: np.ndarray) -> list[int]:
        self.batches_started += 1
        self.gate.wait(60)
        self.batch_sizes.append(len(pictures))
        return [int(row.sum()) for row in pictures]


def run(scenario: Any, **settings: Any) -> Any:
    """Run scenario(queue, model) with these settings; returns its result."""

    async def start_and_stop() -> Any:
        values, metrics = Settings(**settings), Metrics()
        model, queue = Sums(), Batcher(values, metrics, Admission(values, metrics))
        try:
            return await scenario(queue, model)
        finally:
            model.gate.set()
            queue.stop()

    return asyncio.run(start_and_stop())


async def send(queue: Batcher, model: Sums, n: int) -> list[asyncio.Task[Any]]:
    """Send n pictures one after the other: each thread starts with one, the others wait."""
    tasks = []
    for i in range(n):
        tasks.append(asyncio.create_task(queue.classify(b"\1", model)))
        await asyncio.sleep(0)
        while model.batches_started < min(i + 1, queue.threads):
            await asyncio.sleep(0.001)
    return tasks


def admit(queue: Batcher) -> None:
    queue._admission.admit(queue)


async def gather_results(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def test_each_picture_gets_its_own_answer_and_waiting_pictures_share_a_batch() -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[int]:
        model.gate.clear()
        pictures = [bytes([i, 1]) for i in range(30)]
        answers = [asyncio.create_task(queue.classify(picture, model)) for picture in pictures]
        await asyncio.sleep(0)
        model.gate.set()
        results = await asyncio.gather(*answers)
        assert [row for _, row in results] == [i + 1 for i in range(30)]
        assert results[3][0].tolist() == [3, 1]
        return model.batch_sizes

    sizes = run(scenario)
    assert sum(sizes) == 30
    assert max(sizes) == batching.MAX_BATCH
    assert len(sizes) < 10


def test_a_bad_picture_fails_no_other_picture() -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        pictures = (b"bad", b"\1", b"bad")
        return await gather_results(*(queue.classify(picture, model) for picture in pictures))

    first, second, third = run(scenario)
    assert (str(first), str(third)) == ("bad", "bad")
    assert second[1] == 1


def test_an_error_of_a_model_reaches_all_its_pictures_and_the_next_is_answered() -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        broken = Sums()
        broken.classify = lambda _: [][1]  # type: ignore[method-assign]
        return await gather_results(queue.classify(b"\1", broken), queue.classify(b"\2", model))

    failed, answered = run(scenario)
    assert isinstance(failed, IndexError)
    assert answered[1] == 2


def test_an_error_outside_a_model_reaches_all_pictures_and_the_next_is_answered() -> None:
    def fail(_: int) -> None:
        raise OSError("the disk is full")

    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(queue._metrics.batches, "observe", fail)
            failed = await gather_results(*(queue.classify(b"\1", model) for _ in range(3)))
        return [*failed, await queue.classify(b"\2", model)]

    *failed, answered = run(scenario, threads=1)
    assert [str(error) for error in failed] == ["the disk is full"] * 3
    assert answered[1] == 2


def test_the_pace_is_that_of_all_threads_together(clock: Clock) -> None:
    clock.now_s = 100.0

    async def scenario(queue: Batcher, model: Sums) -> list[float]:
        def classify_slowly(_: np.ndarray) -> list[int]:
            clock.now_s += 0.3
            return [0]

        slow = Sums()
        slow.classify = classify_slowly  # type: ignore[method-assign]
        paces = []
        for busy in (0, 1):
            model.gate.clear()
            others = await send(queue, model, busy)
            queue._recent_s, queue._recent_pictures = 1.0, 10.0
            await queue.classify(b"\1", slow)
            paces.append(queue.pace_s)
            model.gate.set()
            await asyncio.gather(*others)
        return paces

    expected = [(0.95 * 1 + seconds) / (0.95 * 10 + 1) for seconds in (0.3, 0.15)]
    assert run(scenario, threads=2) == pytest.approx(expected)


def test_a_lone_small_picture_is_answered_without_a_thread() -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[str]:
        threads: list[str] = []
        classify = model.classify

        def noting_thread(rows: np.ndarray) -> list[int]:
            threads.append(threading.current_thread().name.rpartition("_")[0])
            return classify(rows)

        model.classify = noting_thread  # type: ignore[method-assign]

        async def request(data: bytes) -> Any:
            admit(queue)
            try:
                return await queue.classify(data, model)
            finally:
                queue._admission.release()

        assert (await request(b"\2"))[1] == 2
        await request(b"large")
        with pytest.raises(ValueError, match="bad"):
            await request(b"bad")
        await asyncio.gather(request(b"\1"), request(b"\1"))  # not alone
        admit(queue)  # one request with two pictures
        await asyncio.gather(*(queue.classify(b"\1", model) for _ in range(2)))
        queue._admission.release()
        for pace_s in (0.5, 0.0001):
            while queue._busy_threads:  # a thread has yet to see that the queue is empty
                await asyncio.sleep(0.001)
            queue._recent_s, queue._recent_pictures = pace_s, 1.0
            await request(b"\1")
        return threads

    alone, *queued, quick = run(scenario, threads=1)
    assert alone == quick == ""
    assert set(queued) == {"inference"}


def test_as_many_batches_run_at_a_time_as_there_are_threads() -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[int]:
        model.gate.clear()
        answers = await send(queue, model, 4)
        model.gate.set()
        await asyncio.gather(*answers)
        return model.batch_sizes

    assert sorted(run(scenario, threads=1)) == [1, 3]
    assert sorted(run(scenario, threads=8)) == [1, 1, 2]


def test_a_picture_that_waited_past_the_deadline_is_rejected(clock: Clock) -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        model.gate.clear()
        answers = await send(queue, model, batching.MAX_THREADS + 2)
        clock.now_s += 0.2
        model.gate.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    *first, late, last = run(scenario, deadline_ms=100, threads=2)
    assert all(answer[1] == 1 for answer in first)  # they started in time
    assert isinstance(late, Busy)
    assert isinstance(last, Busy)


def test_a_picture_that_waited_just_until_the_deadline_is_answered(clock: Clock) -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        model.gate.clear()
        answers = await send(queue, model, 2)
        clock.now_s += 0.1
        model.gate.set()
        return await gather_results(*answers)

    assert [row for _, row in run(scenario, deadline_ms=100, threads=1)] == [1, 1]


def test_a_late_picture_s_client_is_told_to_retry_when_the_queue_is_empty(clock: Clock) -> None:
    async def scenario(queue: Batcher, model: Sums) -> list[Any]:
        model.gate.clear()
        answers = await send(queue, model, 1 + 20)
        clock.now_s += 0.2
        queue._recent_s, queue._recent_pictures = 10.0, 10.0
        model.gate.set()
        return await gather_results(*answers)

    _, *late = run(scenario, deadline_ms=100, threads=1)
    assert {error.why for error in late} == {"deadline"}
    # At a pace of 0.92 s, with 12, 4 and no pictures behind a batch.
    assert [error.retry_after_s for error in late] == [12] * 8 + [4] * 8 + [1] * 4


def test_a_request_that_cannot_meet_the_deadline_is_rejected_at_once(clock: Clock) -> None:
    async def scenario(queue: Batcher, model: Sums) -> None:
        def slow(rows: np.ndarray) -> list[int]:
            clock.now_s += 0.1
            model.gate.wait(60)
            return [0] * len(rows)

        model.classify = slow  # type: ignore[method-assign]
        for _ in range(30):  # the pace is measured
            await queue.classify(b"\1", model)
        model.gate.clear()
        waiting = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(30)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="DEADLINE_MS"):
            admit(queue)
        model.gate.set()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario, deadline_ms=500, threads=1)


def test_one_slow_picture_rejects_no_other(clock: Clock) -> None:
    def classify_slowly(_: np.ndarray) -> list[int]:
        clock.now_s += 0.3
        return [0]

    async def scenario(queue: Batcher, model: Sums) -> None:
        model.gate.clear()  # so that all are queued together
        quick = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(64)]
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(*quick)
        slow = Sums()
        slow.classify = classify_slowly  # type: ignore[method-assign]
        await queue.classify(b"\1", slow)
        model.gate.clear()
        waiting = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(40)]
        await asyncio.sleep(0)
        admit(queue)
        model.gate.set()
        await asyncio.gather(*waiting)

    run(scenario)


def test_a_picture_s_wait_begins_with_its_job() -> None:
    async def make_job() -> Job:
        return Job(b"\1", Sums(), asyncio.get_running_loop().create_future())

    before = time.monotonic()
    assert before <= asyncio.run(make_job()).queued_at <= time.monotonic()


def test_a_stopped_queue_has_no_threads() -> None:
    async def scenario(queue: Batcher, model: Sums) -> tuple[Batcher, set[threading.Thread]]:
        await gather_results(*(queue.classify(b"\1", model) for _ in range(3)))
        return queue, {*threading.enumerate()} - before

    before = {*threading.enumerate()}
    _, threads = run(scenario, threads=2)
    assert threads
    assert not any(thread.is_alive() for thread in threads)
