"""Search, training and storage of image classifiers; imports nothing from serve/."""

import os

# ONNX Runtime reads this once, at its first import. It would write an id of the machine into the
# home folder and send events to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
