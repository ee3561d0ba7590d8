"""What ranks wait for."""

from __future__ import annotations

from pathlib import Path

from rank_processes import run_on_ranks


def test_ranks_wait_for_what_the_first_one_makes(tmp_path: Path) -> None:
    run_on_ranks(str(Path(__file__).with_name("waiting_ranks.py")), 2, tmp_path, tmp_path)
