"""The server; imports only mnist.images, mnist.inference and mnist.registry."""

import os

# NumPy reads this when it is first imported. Its products here are small: a second thread that
# waits busily for the next one took 2 of the 8 ms that a request costs the processors.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
