"""Dynamic batching: waiting pictures are classified together, late pictures are rejected."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mnist.process import available_cores
from serve.admission import Admission, Busy
from serve.metrics import Metrics
from serve.settings import Settings

MAX_BATCH = 8  # pictures; larger batches are hardly faster, and all their answers come later
# While one thread decodes, which holds the GIL, the batch of the other one is in inference. With
# THREADS=1, for as many processes as cores, a second thread would only delay the other processes.
MAX_THREADS = 2
INLINE_PACE_S = 0.01  # a lone picture is answered on the event loop if the pace is below this
INITIAL_PACE_S = 0.002  # for a picture, until the first batch is measured
DECAY = 0.95  # weight of earlier measurements, with each batch: about the last 20 count


class Model(Protocol):
    """What the batcher needs of a model."""

    def is_small(self, data: bytes) -> bool: ...  # whether normalise() takes only some ms

    def normalise(self, data: bytes) -> np.ndarray: ...

    def classify(self, pictures: np.ndarray) -> Sequence[Any]: ...


@dataclass(eq=False)
class Job:
    """One picture; the future gets its normalised form and its row of model.classify()."""

    data: bytes
    model: Model
    future: asyncio.Future[tuple[np.ndarray, Any]]
    queued_at: float = field(default_factory=time.monotonic)


class Batcher:
    """The queue before the model, and the threads that take batches from it.

    With an idle thread, a picture is processed at once; while all `threads` are busy, pictures
    wait. A lone small picture is answered on the event loop: waking a thread, and being woken by
    it, takes a tenth of the time of an answer.

    Public methods run on the event loop.
    """

    def __init__(self, settings: Settings, metrics: Metrics, admission: Admission) -> None:
        self._settings, self._metrics, self._admission = settings, metrics, admission
        self.threads = min(MAX_THREADS, settings.threads or available_cores())
        self._executor = ThreadPoolExecutor(self.threads, "inference")
        self._loop = asyncio.get_running_loop()
        self._pictures = 0  # in progress; event loop only
        # Written under the lock, by the event loop and the batch threads. Read without the lock
        # where an old value does no harm.
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._busy_threads = 0
        # Written by the thread of each batch, without a lock: a lost update does no harm.
        self._recent_s, self._recent_pictures = MAX_BATCH * INITIAL_PACE_S, float(MAX_BATCH)

    def stop(self) -> None:
        self._executor.shutdown()

    @property
    def waiting(self) -> int:
        """Number of pictures in the queue."""
        return len(self._queue)

    @property
    def pace_s(self) -> float:
        """Seconds for a picture, averaged over recent pictures, so that a slow one counts once."""
        return self._recent_s / self._recent_pictures

    async def classify(self, data: bytes, model: Model) -> tuple[np.ndarray, Any]:
        """The picture's normalised form, and its row of model.classify().

        Raises Busy if it waited past the deadline, and what the model raises.
        """
        job = Job(data, model, self._loop.create_future())
        self._pictures += 1
        try:
            if self._can_run_inline():
                await asyncio.sleep(0)  # requests that came at the same time are admitted first
            if self._can_run_inline() and model.is_small(data):
                _deliver(self._process([job]))
            else:
                self._enqueue(job)
            return await job.future
        finally:
            self._pictures -= 1

    def _can_run_inline(self) -> bool:
        alone = self._admission.requests == self._pictures == 1 and not self._busy_threads
        return alone and self.pace_s < INLINE_PACE_S

    def _enqueue(self, job: Job) -> None:
        with self._lock:
            self._queue.append(job)
            self._metrics.waiting.set(len(self._queue))
            idle = self._busy_threads < self.threads
            self._busy_threads += idle
        if idle:
            self._executor.submit(self._run_batches)

    def slots(self) -> asyncio.Semaphore:
        """Fair queueing of the pictures of one request: besides those that are processed, one
        waits, so that no thread is idle. If all waited, the last ones would miss the deadline
        because of the others of this request.
        """
        return asyncio.Semaphore(self.threads + 1)

    # --- batch threads; _process also on the event loop, for a lone picture ---

    def _run_batches(self) -> None:
        """Process batch after batch until the queue is empty."""
        while jobs := self._next_batch():
            self._loop.call_soon_threadsafe(_deliver, self._process(jobs))

    def _next_batch(self) -> list[Job]:
        with self._lock:
            jobs = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
            self._busy_threads -= not jobs
        return jobs

    def _process(self, jobs: list[Job]) -> dict[Job, Any]:
        """The result of each job, which may be an exception; measures the pace."""
        start = time.monotonic()
        try:
            results = self._classify(jobs)
        except Exception as error:  # noqa: BLE001 - the thread continues with the next batch
            results = dict.fromkeys(jobs, error)
        processed = sum(not isinstance(result, Busy) for result in results.values())
        if processed:
            seconds = (time.monotonic() - start) / max(1, self._busy_threads)
            self._recent_s = DECAY * self._recent_s + seconds
            self._recent_pictures = DECAY * self._recent_pictures + processed
        return results

    def _classify(self, jobs: list[Job]) -> dict[Job, Any]:
        self._metrics.waiting.set(len(self._queue))
        results: dict[Job, Any] = {}
        batches: dict[Model, list[tuple[Job, np.ndarray]]] = {}
        for job in jobs:
            try:
                deadline_ms = self._settings.deadline_ms
                if time.monotonic() > job.queued_at + deadline_ms / 1000:
                    reason = f"the picture waited over {deadline_ms} ms (DEADLINE_MS)"
                    raise Busy("deadline", reason, self.waiting * self.pace_s)
                picture = job.model.normalise(job.data)
                batches.setdefault(job.model, []).append((job, picture))
            except Exception as error:  # noqa: BLE001 - raised where the future is awaited
                results[job] = error
        for model, batch in batches.items():
            self._metrics.batches.observe(len(batch))
            try:
                rows = model.classify(np.stack([picture for _, picture in batch]))
                results |= {
                    job: (picture, row) for (job, picture), row in zip(batch, rows, strict=True)
                }
            except Exception as error:  # noqa: BLE001 - raised where the futures are awaited
                results |= {job: error for job, _ in batch}
        return results


def _deliver(results: dict[Job, Any]) -> None:
    """Resolve the futures, on the event loop."""
    for job, result in results.items():
        if job.future.done():  # the client has disconnected
            continue
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
