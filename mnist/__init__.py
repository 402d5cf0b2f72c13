"""Search, training and storage of image classifiers; imports nothing from serve/."""

import os

# ONNX Runtime reads this variable once, at its first import. With telemetry, it would write an id
# of the machine into the home folder and send events to Microsoft.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
