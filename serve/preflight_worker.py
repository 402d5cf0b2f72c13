"""The process that checks new models for serve.preflight. `python -m serve.preflight_worker`

It reads the models to check from standard input, a line of JSON each, and writes the results to
standard output. Its start takes most of the first check, so it stays for the next one.
"""

import os

if __name__ == "__main__":
    # Lower priority than the server, also for the imports below; a busy machine still gets to it.
    os.nice(10)

from serve import startup

# isort: split
import json
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist import inference, registry

TIMEOUT_S = 150  # for one check; only reached if the server, which waits less long, is gone


def main() -> None:
    """Write a preflight.Result in JSON for each line of standard input."""
    startup.collect_garbage()
    with suppress(OSError):  # when memory runs out, this process ends, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    for line in sys.stdin:
        signal.alarm(TIMEOUT_S)
        result = check(*json.loads(line)) | {"torch": "torch" in sys.modules}
        print("\n" + json.dumps(result), flush=True)
        signal.alarm(0)


def check(folder: str, name: str, threads: int | None, engine: str) -> dict[str, Any]:
    """The `engine` and `skipped_engines` of inference.load, or why the model is `refused`."""
    try:
        classifier = inference.load(Path(folder), name, threads, engine)
    except registry.RegistryError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - the server gets every error as the reason
        traceback.print_exc()
        return {"refused": f"the model cannot be used: {error}"}
    return {"engine": classifier.engine, "skipped_engines": dict(classifier.skipped_engines)}


if __name__ == "__main__":
    main()
