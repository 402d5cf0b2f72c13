"""Settings that make the server start and answer faster; the first import of its two programs.

These are serve.app and serve.preflight_worker. The settings apply to the whole process, and have
to be made before other modules are imported. Only serve.metrics changes another one, which
prometheus_client reads at its import.
"""

import gc
import os
import sys

# The imports leave no garbage, but garbage collection took a tenth of the start.
gc.disable()

# NumPy reads this at its import. Its products here are small: a second thread, which spins while it
# waits for the next product, took 2 of the 8 ms of CPU time of a request.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# FastAPI imports all of pydantic.v1, which takes 1/30 of the start, only to reject its models.
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]


def collect_garbage() -> None:
    """Enable garbage collection after the imports; it never visits their objects."""
    gc.freeze()
    gc.enable()
