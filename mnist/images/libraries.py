"""Settings of OpenCV and Pillow that apply to the whole process."""

import functools
import warnings

import cv2


@functools.cache
def configure() -> None:
    """Silence both libraries, and keep OpenCV to one thread; only the first call has an effect."""
    # Operations here take microseconds; waking a second thread would cost 0.8 ms of CPU time.
    cv2.setNumThreads(1)
    # OpenCV would print a line on standard error for each file that it cannot read.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    # Pillow's warnings (odd metadata, many pixels) are of no use in serving or training.
    # They are filtered once, as catch_warnings() around each picture changes the process as well.
    warnings.filterwarnings("ignore", module=r"PIL\.")
