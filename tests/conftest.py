"""Settings of every test process, made before any of them imports torch."""

from __future__ import annotations

import gc
import os

import pytest

# Several processes share the cores: OpenMP threads that wait in a loop would hold what another one needs, and two
# trainings beside each other would take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tables are as wide as the terminal: in every test process the same, which xdist would not see to.
os.environ["COLUMNS"] = "100"


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """DeepSpeed collects garbage at each beginning and end, which would go through all that is imported."""
    gc.freeze()


# Most of their time goes to starting ranks, each of which imports the libraries anew; the longest first.
LONG = (
    "test_another_machine",
    "test_run",
    "test_non_finite",
    "test_start_again",
    "test_ds_configs",
    "test_engine",
    "test_two_nodes",
    "test_out_of_memory",
    "test_checkpoint_benchmark",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the long files, so that no core waits for one of them at the end; leave out what takes minutes."""
    is_wanted = "slow" in config.option.markexpr or any("::" in one for one in config.args)
    for item in items:
        if item.get_closest_marker("slow") and not is_wanted:
            item.add_marker(pytest.mark.skip(reason="takes long: bash launch.sh test -m slow"))
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
