"""The process that tries new models, for `trials`.

python -m serve.trial

It reads from standard input what to try, a line of JSON for each model, and writes what it found.
Most of the first trial is the start of this process, so it stays for the next.
"""

import os

if __name__ == "__main__":
    # Who answers goes first, also before the imports below. On a busy machine, too, a model can be
    # replaced.
    os.nice(10)

import gc
import json
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist import inference, registry

LONGEST_S = 150  # should who asked, and waits less long, be gone


def main() -> None:
    """For each line of standard input, the engine, or why there is none; in JSON, with whether
    torch came into memory, to stay."""
    gc.enable()
    with suppress(OSError):  # where memory runs out, this process ends, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    for line in sys.stdin:
        signal.alarm(LONGEST_S)
        found = _tried(*json.loads(line)) | {"torch": "torch" in sys.modules}
        print("\n" + json.dumps(found), flush=True)
        signal.alarm(0)


def _tried(folder: str, name: str, threads: int | None, engine: str) -> dict[str, Any]:
    try:
        run = inference.load(Path(folder), name, threads, engine)
    except registry.RegistryError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked is told
        traceback.print_exc()
        return {"refused": f"the model cannot be used: {error!r}"}
    return {"engine": run.engine, "passed_over": dict(run.passed_over)}


if __name__ == "__main__":
    main()
