"""Metrics reach the services that are asked for, and a service that fails stops nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from daramgpt import recipe, trackers
from daramgpt.doctor import needs
from daramgpt.errors import UserError
from daramgpt.trackers import Trackers, require

ENTRY = {
    "step": 7,
    "loss": 1.5,
    "stage": "wiki",
    "skipped_steps": 0,
    "plateau": True,
    "bits_per_byte": {"wiki": 1.25, "written": None, "all": 1.5},
}
SENT = {"loss": 1.5, "skipped_steps": 0, "bits_per_byte/wiki": 1.25, "bits_per_byte/all": 1.5}


class Service:
    """Stands for the modules `wandb` and `trackio`, and for the run that they begin."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.is_finished = self.fails = False

    def init(self, **options: Any) -> Service:
        self.begun.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to host\nand more")
        self.logged.append((values, step))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    found = {name: Service() for name in ("wandb", "trackio")}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    return found


def begin(names: list[str], folder: Path, said: list[str], first_step: int = 0) -> Trackers:
    return Trackers(names, folder, "long-run-12ab", first_step, {"loss.temperature": 2.0, "stages": [1]}, said.append)


def test_each_gets_the_numbers_of_a_step_under_the_name_of_the_run(
    services: dict[str, Service], tmp_path: Path
) -> None:
    said: list[str] = []
    trackers = begin(["wandb", "trackio"], tmp_path / "there", said)
    trackers.log(ENTRY)
    trackers.close()
    for service in services.values():
        [options] = service.begun
        # A later session goes on with the same curves.
        assert options["project"] == "daramgpt" and options["name"] == "long-run-12ab" and options["resume"] == "allow"
        assert service.logged == [(SENT, 7)] and service.is_finished
        assert options["config"] == {"loss.temperature": 2.0}
    assert services["wandb"].begun[0]["id"] == "long-run-12ab" and said == []


def test_one_that_fails_is_left_out_and_said_once(services: dict[str, Service], tmp_path: Path) -> None:
    said: list[str] = []
    trackers = begin(["wandb", "trackio"], tmp_path, said)
    services["wandb"].fails = True
    for _ in range(3):
        trackers.log(ENTRY)
    trackers.close()
    assert len(services["trackio"].logged) == 3
    assert len(said) == 1 and "wandb failed" in said[0] and "no route to host)" in said[0]


def test_one_that_cannot_begin_stops_nothing(services: dict[str, Service], tmp_path: Path) -> None:
    said: list[str] = []
    services["trackio"].init = None  # type: ignore[method-assign, assignment]
    trackers = begin(["trackio"], tmp_path, said)
    trackers.log(ENTRY)
    trackers.close()
    assert len(said) == 1 and "trackio failed" in said[0]


def test_tensorboard_keeps_its_files_with_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = begin(["tensorboard"], tmp_path, said, first_step)
        for step in steps:
            trackers.log({**ENTRY, "step": step, "loss": 10.0 * first_step + step})
        trackers.close()
    assert said == []
    found = EventAccumulator(str(tmp_path / "tensorboard" / "long-run-12ab"))
    found.Reload()
    # The step that a second session trained again is there once.
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert "bits_per_byte/wiki" in found.Tags()["scalars"]


def test_what_is_not_installed_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="no_such_tracker is not installed; pip install no_such_tracker"):
        require(["no_such_tracker"])
    require([])


def test_doctor_names_the_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    [check] = needs.reporting(recipe.load("quickstart", ["report_to=['trackio']"]))
    assert check.blocks and (check.name, check.text[:24]) == ("report_to", "trackio is not installed")
