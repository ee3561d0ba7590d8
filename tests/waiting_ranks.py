"""Two ranks of which the first works alone for longer than ranks wait for one another in a step."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from daramgpt import launcher
from daramgpt.engine import import_deepspeed, leave_ranks, ranks

MEETING_SECONDS = 5


def main() -> None:
    folder = Path(sys.argv[1])
    log = folder / "log.txt"
    import_deepspeed(log)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # How long each takes to come so far is not what this is about.
    (folder / f"here-{rank}").touch()
    while not all((folder / f"here-{other}").exists() for other in range(world_size)):
        time.sleep(0.01)
    ranks.MEETING_TIME = timedelta(seconds=MEETING_SECONDS)
    launcher.check_agreement({"the beginning": "same"}, log)
    with launcher.waiting_for_all():
        if rank == 0:
            time.sleep(1.5 * MEETING_SECONDS)
            (folder / "made").touch()
    assert (folder / "made").exists()
    launcher.check_agreement({"the end": "same"}, log)
    leave_ranks()


if __name__ == "__main__":
    main()
