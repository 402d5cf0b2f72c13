"""serve/batches.py: what waits together is answered together, what cannot be in time is refused."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from serve import batches
from serve.batches import Batches, Busy
from serve.metrics import Metrics
from serve.settings import Settings
from tests.conftest import Clock


@pytest.fixture(autouse=True)
def clock(queue_clock: Clock) -> Clock:
    return queue_clock


class Sums:
    """A model that answers with the sum of a picture's bytes, once it may."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.begun = 0
        self.may = threading.Event()
        self.may.set()

    def is_small(self, data: bytes) -> bool:
        return data != b"large"

    def normalise(self, data: bytes) -> np.ndarray:
        if data == b"bad":
            raise ValueError("bad")
        return np.frombuffer(data, np.uint8)

    def classify(self, pictures: np.ndarray) -> list[int]:
        self.begun += 1
        self.may.wait(60)
        self.sizes.append(len(pictures))
        return [int(row.sum()) for row in pictures]


def within(scenario: Any, **settings: Any) -> Any:
    """The result of scenario(queue, model) with these settings."""

    async def run() -> Any:
        model, queue = Sums(), Batches(Settings(**settings), Metrics())
        try:
            return await scenario(queue, model)
        finally:
            model.may.set()
            queue.stop()

    return asyncio.run(run())


async def asked(queue: Batches, model: Sums, n: int) -> list[asyncio.Task[Any]]:
    """n pictures, one after the other: each thread has begun with one of them, the others wait."""
    tasks = []
    for i in range(n):
        tasks.append(asyncio.create_task(queue.classify(b"\1", model)))
        await asyncio.sleep(0)
        while model.begun < min(i + 1, queue.threads):
            await asyncio.sleep(0.001)
    return tasks


async def all_of(*waiting: Coroutine[Any, Any, Any]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def test_each_gets_its_own_answer_and_those_that_wait_share_a_batch() -> None:
    async def scenario(queue: Batches, model: Sums) -> list[int]:
        model.may.clear()
        pictures = [bytes([i, 1]) for i in range(30)]
        answers = [asyncio.create_task(queue.classify(each, model)) for each in pictures]
        await asyncio.sleep(0)
        model.may.set()
        found = await asyncio.gather(*answers)
        assert [answer for _, answer in found] == [i + 1 for i in range(30)]
        assert found[3][0].tolist() == [3, 1]
        return model.sizes

    sizes = within(scenario)
    assert sum(sizes) == 30
    assert max(sizes) == batches.LARGEST
    assert len(sizes) < 10


def test_a_bad_picture_spoils_no_other() -> None:
    async def scenario(queue: Batches, model: Sums) -> list[Any]:
        return await all_of(*(queue.classify(each, model) for each in (b"bad", b"\1", b"bad")))

    first, second, third = within(scenario)
    assert (str(first), str(third)) == ("bad", "bad")
    assert second[1] == 1


def test_a_model_that_fails_tells_all_who_asked_it_and_the_next_is_answered() -> None:
    async def scenario(queue: Batches, model: Sums) -> list[Any]:
        broken = Sums()
        broken.classify = lambda _: [][1]  # type: ignore[method-assign]
        return await all_of(queue.classify(b"\1", broken), queue.classify(b"\2", model))

    failed, answered = within(scenario)
    assert isinstance(failed, IndexError)
    assert answered[1] == 2


def test_a_full_queue_turns_away_and_takes_again_when_it_has_room() -> None:
    async def scenario(queue: Batches, model: Sums) -> None:
        for _ in range(3):  # of which none has sent its picture yet
            queue.admit()
        with pytest.raises(Busy, match="MAX_QUEUE") as busy:
            queue.admit()
        assert busy.value.retry_after_s >= 1
        queue.leave()
        queue.admit()

    within(scenario, max_queue=3)


def test_one_that_is_alone_and_small_is_answered_without_a_thread() -> None:
    async def scenario(queue: Batches, model: Sums) -> list[str]:
        threads: list[str] = []
        classify = model.classify

        def noted(rows: np.ndarray) -> list[int]:
            threads.append(threading.current_thread().name.rpartition("_")[0])
            return classify(rows)

        model.classify = noted  # type: ignore[method-assign]

        async def asked(data: bytes) -> Any:
            queue.admit()
            try:
                return await queue.classify(data, model)
            finally:
                queue.leave()

        assert (await asked(b"\2"))[1] == 2
        await asked(b"large")
        with pytest.raises(ValueError, match="bad"):
            await asked(b"bad")
        await asyncio.gather(asked(b"\1"), asked(b"\1"))  # not alone
        queue.admit()  # one request with two pictures
        await asyncio.gather(*(queue.classify(b"\1", model) for _ in range(2)))
        queue.leave()
        for pace_s in (0.5, 0.0001):
            while queue._active:  # a thread has yet to see that nothing is left
                await asyncio.sleep(0.001)
            queue._took_s, queue._answered = pace_s, 1.0
            await asked(b"\1")
        return threads

    alone, *queued, quick = within(scenario, threads=1)
    assert alone == quick == ""
    assert set(queued) == {"inference"}


def test_as_many_batches_at_a_time_as_there_are_threads_for() -> None:
    async def scenario(queue: Batches, model: Sums) -> list[int]:
        model.may.clear()
        answers = await asked(queue, model, 4)
        model.may.set()
        await asyncio.gather(*answers)
        return model.sizes

    assert sorted(within(scenario, threads=1)) == [1, 3]
    assert sorted(within(scenario, threads=8)) == [1, 1, 2]


def test_who_waited_past_the_deadline_is_turned_away_rather_than_answered(clock: Clock) -> None:
    async def scenario(queue: Batches, model: Sums) -> list[Any]:
        model.may.clear()
        answers = await asked(queue, model, batches.MOST_THREADS + 2)
        clock.now_s += 0.2
        model.may.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    *first, late, last = within(scenario, deadline_ms=100, threads=2)
    assert all(answer[1] == 1 for answer in first)  # they were begun in time
    assert isinstance(late, Busy)
    assert isinstance(last, Busy)


def test_who_cannot_be_in_time_is_turned_away_at_once(clock: Clock) -> None:
    async def scenario(queue: Batches, model: Sums) -> None:
        def slow(rows: np.ndarray) -> list[int]:
            clock.now_s += 0.1
            model.may.wait(60)
            return [0] * len(rows)

        model.classify = slow  # type: ignore[method-assign]
        for _ in range(30):  # it learns the pace
            await queue.classify(b"\1", model)
        model.may.clear()
        waiting = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(30)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="DEADLINE_MS"):
            queue.admit()
        model.may.set()
        await asyncio.gather(*waiting, return_exceptions=True)

    within(scenario, deadline_ms=500, threads=1)


def test_one_slow_picture_turns_no_other_away(clock: Clock) -> None:
    def once(_: np.ndarray) -> list[int]:
        clock.now_s += 0.3
        return [0]

    async def scenario(queue: Batches, model: Sums) -> None:
        model.may.clear()  # so that they wait together
        quick = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(64)]
        await asyncio.sleep(0)
        model.may.set()
        await asyncio.gather(*quick)
        slow = Sums()
        slow.classify = once  # type: ignore[method-assign]
        await queue.classify(b"\1", slow)
        model.may.clear()
        waiting = [asyncio.create_task(queue.classify(b"\1", model)) for _ in range(40)]
        await asyncio.sleep(0)
        queue.admit()
        model.may.set()
        await asyncio.gather(*waiting)

    within(scenario)
