"""Pictures that wait together are classified together; who would wait too long is turned away."""

import asyncio
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serve.metrics import Metrics
from serve.settings import Settings

LARGEST = 8  # pictures in a batch: larger ones are hardly faster, and answer all of theirs later
# While one thread decodes, which takes Python's lock, the other one has its batch inferred. With
# THREADS=1, for as many processes as cores, a second one only gets in the way of the others.
MOST_THREADS = 2
QUICK_S = 0.01  # a picture that takes no longer is answered without a thread, if it is alone
MARGIN = 0.5  # of the deadline may be spent waiting; the rest is for the answer itself
START_PACE_S = 0.002  # for a picture, until it was measured
FADE = 0.95  # of what was measured before, with each batch: about the last 20 count


class Busy(Exception):
    """The queue is full or the deadline cannot be met; try again after `retry_after_s` seconds."""

    def __init__(self, why: str, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.why, self.retry_after_s = why, retry_after_s


class Model(Protocol):
    """What turns pictures' bytes into model input, and that into what is known of them."""

    def is_small(self, data: bytes) -> bool: ...  # to normalise it takes some ms

    def normalise(self, data: bytes) -> np.ndarray: ...

    def classify(self, pictures: np.ndarray) -> Sequence[Any]: ...


@dataclass(eq=False)
class Job:
    """One picture; `answer` becomes its normalised form and its row of classify()."""

    data: bytes
    model: Model
    answer: asyncio.Future[tuple[np.ndarray, Any]]
    since: float = field(default_factory=time.monotonic)


class Batches:
    """The queue before the model, the threads that empty it, and who may join it.

    A picture that finds an idle thread starts at once; while all are busy, others gather. One that
    is alone and small needs no thread: to wake one, and to be woken by it, takes a tenth of an
    answer's time. There are so many `threads`.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self.threads = min(MOST_THREADS, settings.threads or os.cpu_count() or 1)
        self._active = self._under_way = self._asked = 0
        self._took_s, self._answered = LARGEST * START_PACE_S, float(LARGEST)  # lately
        self._threads = ThreadPoolExecutor(self.threads, "inference")
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        self._threads.shutdown()

    def admit(self) -> None:
        """One more request is under way, until leave(): before its body is read, so that what
        all of them take is bounded.

        Raises Busy where it would find no room, or could not be in time.
        """
        waiting, settings = len(self._jobs), self._settings
        if max(waiting, self._under_way) >= settings.max_queue:
            raise self._busy("queue", f"{settings.max_queue} requests are waiting (MAX_QUEUE)")
        if waiting * self._pace_s > MARGIN * settings.deadline_ms / 1000:
            raise self._busy(
                "deadline", f"no answer within {settings.deadline_ms} ms (DEADLINE_MS)"
            )
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1

    @property
    def _pace_s(self) -> float:
        """Seconds for a picture: of all lately, so that one slow picture does not count as many."""
        return self._took_s / self._answered

    async def classify(self, data: bytes, model: Model) -> tuple[np.ndarray, Any]:
        """The picture's normalised form, and its row of model.classify().

        Raises Busy where it waited too long, and what model.normalise() raises.
        """
        job = Job(data, model, self._loop.create_future())
        self._asked += 1
        try:
            if self._is_alone():
                await asyncio.sleep(0)  # who came at the same time is let in
            if self._is_alone() and model.is_small(data):
                _deliver(self._answers([job]))
            else:
                self._put(job)
            return await job.answer
        finally:
            self._asked -= 1

    def _is_alone(self) -> bool:
        return self._under_way == self._asked == 1 and not self._active and self._pace_s < QUICK_S

    def _put(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
            self._metrics.waiting.set(len(self._jobs))
            idle = self._active < self.threads
            self._active += idle
        if idle:
            self._threads.submit(self._work)

    def _busy(self, why: str, reason: str) -> Busy:
        after = max(1, math.ceil(len(self._jobs) * self._pace_s))
        return Busy(why, f"the server is busy: {reason}; try again in {after} s", after)

    def _work(self) -> None:
        """One thread: batch after batch, until none is left."""
        while jobs := self._take():
            self._loop.call_soon_threadsafe(_deliver, self._answers(jobs))

    def _take(self) -> list[Job]:
        with self._lock:
            jobs = [self._jobs.popleft() for _ in range(min(LARGEST, len(self._jobs)))]
            self._active -= not jobs
        return jobs

    def _answers(self, jobs: list[Job]) -> dict[Job, Any]:
        """For each job its answer, or the exception that it gets instead; learns the pace."""
        start = time.monotonic()
        try:
            answers = self._carry_out(jobs)
        except Exception as error:  # noqa: BLE001 - the thread goes on, with others
            answers = dict.fromkeys(jobs, error)
        done = sum(not isinstance(answer, Busy) for answer in answers.values())
        if done:
            seconds = (time.monotonic() - start) / max(1, self._active)
            self._took_s = FADE * self._took_s + seconds
            self._answered = FADE * self._answered + done
        return answers

    def _carry_out(self, jobs: list[Job]) -> dict[Job, Any]:
        self._metrics.waiting.set(len(self._jobs))
        answers: dict[Job, Any] = {}
        ready: dict[Model, list[tuple[Job, np.ndarray]]] = {}
        for job in jobs:
            try:
                if time.monotonic() > job.since + self._settings.deadline_ms / 1000:
                    raise self._busy("deadline", "too slow")
                picture = job.model.normalise(job.data)
                ready.setdefault(job.model, []).append((job, picture))
            except Exception as error:  # noqa: BLE001 - it is raised where the job is awaited
                answers[job] = error
        for model, pairs in ready.items():
            self._metrics.batches.observe(len(pairs))
            try:
                rows = model.classify(np.stack([picture for _, picture in pairs]))
                answers |= {
                    job: (picture, row) for (job, picture), row in zip(pairs, rows, strict=True)
                }
            except Exception as error:  # noqa: BLE001
                answers |= {job: error for job, _ in pairs}
        return answers


def _deliver(answers: dict[Job, Any]) -> None:
    """On the event loop."""
    for job, answer in answers.items():
        if job.answer.done():  # who asked has gone
            continue
        if isinstance(answer, Exception):
            job.answer.set_exception(answer)
        else:
            job.answer.set_result(answer)
