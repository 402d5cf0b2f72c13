"""The server; imports only mnist.images, mnist.inference and mnist.registry."""

import gc
import os
import sys

# What the imports make stays: to look through it for garbage took a tenth of the start. serve.app
# and serve.preflight_worker turn it on again.
gc.disable()

# NumPy reads this when it is first imported. Its products here are small: a second thread that
# waits busily for the next one took 2 of the 8 ms that a request costs the processors.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# FastAPI imports all of pydantic.v1, a thirtieth of the start, only to refuse its models.
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]
