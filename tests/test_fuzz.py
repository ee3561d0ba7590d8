"""Damaged files of a run: every command ends well or with one line, in time, and writes nowhere but in the run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from fuzzing import KEPT, Watch, command, contents, damages, put
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from daramgpt import checkpoint, ds_config, export, hardware, planner, planning, recipe, student
from daramgpt.cli import exit_codes
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger, sessions
from daramgpt.run_directory import RunDirectory, write_json
from daramgpt.shards import Feed, Shards

# Times as many examples as by default.
FACTOR = float(os.environ.get("FUZZ_FACTOR", "0.4"))
RECIPE = """
name = "tiny"
[corpus]
dir = "{texts}/corpora"
workers = 1
[curriculum]
context_tokens = 16
heldout_fraction = 0.1
[[curriculum.stages]]
name = "web"
corpus = "web"
take = "6KB"
unit = "sentence"
[teacher]
model = "{texts}/teacher"
precision = "fp32"
[student]
n_embd = 16
n_head = 2
n_layer = 1
[optimizer]
batch_tokens = 192
[engine]
ds_config = "{texts}/zero.json"
micro_batch_rows = 4
[budget]
session_hours = 1
weekly_hours = 30
[evaluation]
heldout_tokens = 200
prompts = ["오늘"]
sample_tokens = 2
"""
SAVED_STEP, STEPS = 6, 11


class EngineError(Exception):
    """Raised where a training would build its engine: all files have been read by then."""


@dataclass(frozen=True)
class Place:
    """A folder with a run, what the run was made from, and what nobody may touch.

    Attributes:
        path: of all.
        texts: corpora, teacher, recipe and ds_config.
        outside: nobody's business.
        whole: the run as it was made.
        run: the run that is damaged.
    """

    path: Path

    @property
    def texts(self) -> Path:
        return self.path / "texts"

    @property
    def outside(self) -> Path:
        return self.path / "outside"

    @property
    def whole(self) -> Path:
        return self.path / "whole"

    @property
    def begun(self) -> Path:
        """A run whose prepare was killed."""
        return self.path / "begun"

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.path / "runs" / "tiny")

    @property
    def recipe(self) -> Path:
        return self.texts / "tiny.toml"

    def command(self, name: str, *options: str) -> tuple[int, str]:
        return command(name, str(self.recipe), "--run", str(self.run.path), *options)

    def restore(self, run: Path | None = None) -> None:
        """The run as it was made, or another one, in its place."""
        shutil.rmtree(self.run.path, ignore_errors=True)
        shutil.copytree(run or self.whole, self.run.path)

    def check(self, run: Callable[[], Any]) -> Any:
        """Call a function in the damaged run; it may end well, or as `UserError`, in time, and write only there."""
        outside = contents(self.outside)
        scratch = self.path / "scratch"
        with Watch([self.run.path, scratch], self.outside) as watch:
            try:
                return run()
            except (UserError, EngineError):
                return None
            finally:
                assert watch.escapes == [], watch.escapes
                assert contents(self.outside) == outside, "written outside"


def _save(place: Place, step: int) -> None:
    """A checkpoint as a training writes it."""
    run, shape = place.run, recipe.load(str(place.recipe)).student
    model = student.build(shape, Shards(run.shards).vocab_size, tiny_training.CONTEXT, 0, seed=step)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}

    class Engine:
        rank = 0

        def gather(self) -> dict[str, dict[str, Any]]:
            import torch

            return {group: weights for group in ("weights", "exp_avg", "exp_avg_sq")} | {
                "rng": {"cpu": torch.zeros(8, dtype=torch.uint8)}
            }

        def any_rank(self, flag: bool) -> bool:
            return flag

        def loss_scaler(self) -> dict[str, Any]:
            return {}

    state = {
        "step": step,
        "tokens": 192 * step,
        "num_steps": STEPS,
        "skipped_steps": 0,
        "horizon": {"end_step": STEPS, "from_step": 0, "from_factor": 1.0},
        "passed_over": [],
        "shards_sha256": Shards(run.shards).sha256,
        "settings": {"seed": 0},
    }
    assert checkpoint.save(run.checkpoints, Engine(), state, 2)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run that was prepared, planned, half trained, measured and exported by the program itself."""
    place = Place(tmp_path_factory.mktemp("fuzz").resolve())
    place.outside.mkdir()
    (place.outside / KEPT).write_text("nobody's")
    os.mkfifo(place.outside / "pipe")
    (place.path / "scratch").mkdir()
    tiny_training.make_texts(place.texts)
    teacher = student.build(tiny_training.TEACHER_SHAPE, 300, tiny_training.CONTEXT, 0, seed=2)
    export.save_model(teacher, place.texts / "tokenizer", place.texts / "teacher")
    shutil.copy(ds_config.DS_CONFIGS_DIR / "cpu.json", place.texts / "zero.json")
    place.recipe.write_text(RECIPE.format(texts=place.texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        # No plan of these tests needs to be true.
        patch.setattr(planning, "_rates", lambda *_: lambda step: planner.of_gpu("T4", step.dtype, False))
        patch.setattr(planner, "gemm_rate", lambda *_: 1e9)
        machine = hardware.detect()
        patch.setattr(hardware, "detect", lambda: machine)
        patch.setattr("daramgpt.train.build_distiller", _no_engine)
        patch.setattr("daramgpt.launcher.start_ranks", _no_engine)
        patch.setattr(exit_codes, "_folder_in_use", None)
        patch.setattr(tempfile, "tempdir", str(place.path / "scratch"))
        place.run.path.parent.mkdir()
        with pytest.MonkeyPatch.context() as killing:
            killing.setattr("daramgpt.shards.stages_writer._SECONDS_BETWEEN_SAVES", 0)
            killing.setattr("daramgpt.shards.stages_writer.write_json", _written_twice())
            with pytest.raises(EngineError):
                place.command("prepare")
        shutil.copytree(place.run.path, place.begun)
        assert [place.command(name)[0] for name in ("prepare", "plan")] == [0, 0]
        _save(place, SAVED_STEP - 1)
        _save(place, SAVED_STEP)
        ledger = Ledger(place.run.ledger)
        for first, last in ((0, SAVED_STEP - 1), (SAVED_STEP - 1, SAVED_STEP)):
            ledger.start("student", "a machine", first, 192 * first)
            ledger.beat(last, 192 * last, 30.0, 0.5)
            ledger.end(last, 192 * last, 40.0, "deadline")
        lines = (
            {"step": step, "tokens": 192 * step, "stage": "web", "loss": 5.0, "kd": 4.0, "ce": 5.5}
            for step in range(1, SAVED_STEP + 1)
        )
        place.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("evaluate", "export", "report"):
            assert place.command(name)[0] == 0
        shutil.copytree(place.run.path, place.whole)
        with pytest.raises(EngineError):
            place.command("train")
        yield place


def _no_engine(*_: Any) -> Any:
    raise EngineError


def _written_twice() -> Callable[[Path, Any], None]:
    """Writes JSON two times, and then no more."""
    left = [2]

    def write(path: Path, data: Any) -> None:
        if not left[0]:
            raise EngineError
        left[0] -= 1
        write_json(path, data)

    return write


def fuzzed(num_examples: int) -> Callable[[Any], Any]:
    """Settings of a test with so many examples."""
    return settings(
        max_examples=max(1, round(FACTOR * num_examples)),
        deadline=None,
        derandomize="FUZZ_FACTOR" not in os.environ,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


COMMANDS = ("status", "report", "plan", "train", "evaluate", "export", "prepare", "status --json")
CHECKPOINT = f"checkpoints/step-{SAVED_STEP:08d}"
FILES = {
    "recipe": "recipe.toml",
    "plan": "plan.json",
    "ledger": "ledger.jsonl",
    "manifest": f"{CHECKPOINT}/manifest.json",
    "state": f"{CHECKPOINT}/state.json",
    "weights": f"{CHECKPOINT}/weights.safetensors",
    "latest": "checkpoints/latest",
    "index": "shards/index.json",
    "tokens": "shards/01-web.bin",
    "lock": ".lock",
}
# What only displays read.
SHOWN = {"metrics": "metrics.jsonl", "evaluation": "evaluation.json", "export": "export/export.json"}


@pytest.mark.parametrize("kind", [*FILES, *SHOWN])
@fuzzed(8)
@given(data=st.data())
def test_no_command_fails_on_a_damaged_file(place: Place, kind: str, data: st.DataObject) -> None:
    name = {**FILES, **SHOWN}[kind]
    commands = COMMANDS if kind in FILES else ("status", "report", "plan", "prepare")
    damage = data.draw(damages(place.whole / name))
    line = data.draw(st.sampled_from(commands))
    place.restore()
    put(place.run.path / name, damage, place.outside)
    place.check(lambda: place.command(*line.split()))


@fuzzed(15)
@given(data=st.data())
def test_no_checkpoint_verifies_that_holds_anything_else(place: Place, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest", "state", "weights", "latest"]))
    damage = data.draw(damages(place.whole / FILES[name]))
    place.restore()
    whole = checkpoint.newest(place.run.checkpoints)
    assert whole is not None and whole.state["step"] == SAVED_STEP
    put(place.run.path / FILES[name], damage, place.outside)
    saved = place.check(lambda: checkpoint.newest(place.run.checkpoints, lambda line: None))
    assert saved is not None
    if saved.path.name == whole.path.name:
        assert (saved.state, saved.sha256) == (whole.state, whole.sha256)
    else:
        assert saved.state["step"] == SAVED_STEP - 1


def _seal(path: Path) -> None:
    """Let a checkpoint verify, whatever it holds."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != "manifest.json" and file.is_file()
    }
    _sign(path, manifest)


def _sign(path: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@fuzzed(8)
@given(data=st.data())
def test_a_forged_checkpoint_is_displayed_or_passed_over(place: Place, data: st.DataObject) -> None:
    place.restore()
    path = place.run.path / CHECKPOINT
    put(path / "state.json", data.draw(damages(place.whole / FILES["state"])), place.outside)
    if (path / "state.json").is_file() and not (path / "state.json").is_symlink():
        _seal(path)
    saved = place.check(lambda: checkpoint.newest(place.run.checkpoints, lambda line: None))
    assert saved is not None and saved.state["step"] == int(saved.path.name[5:])
    line = data.draw(st.sampled_from(["status", "status --json", "report"]))
    place.check(lambda: place.command(*line.split()))


@pytest.mark.parametrize("name", ["../../../outside/kept.txt", "/etc/hostname", "..", "a/b", "\ud800", ""])
def test_names_in_a_manifest_lead_nowhere(place: Place, name: str) -> None:
    place.restore()
    path = place.run.path / CHECKPOINT
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = manifest["files"]["state.json"]
    _sign(path, manifest)
    for line in COMMANDS:
        place.check(lambda: place.command(*line.split()))  # noqa: B023


@pytest.mark.parametrize("kind", ["recipe", "ds_config"])
@fuzzed(15)
@given(data=st.data())
def test_no_command_fails_on_what_a_user_wrote(place: Place, kind: str, data: st.DataObject) -> None:
    path = {"recipe": place.recipe, "ds_config": place.texts / "zero.json"}[kind]
    good = path.read_bytes()
    damage = data.draw(damages(path))
    line = data.draw(st.sampled_from(["status", "plan", "train", "evaluate", "prepare"]))
    place.restore()
    if data.draw(st.booleans()):
        # A run that has to be planned anew, or that nothing was prepared for.
        place.run.plan.unlink()
        shutil.rmtree(place.run.checkpoints)
        if line == "prepare":
            shutil.rmtree(place.run.path)
    try:
        put(path, damage, place.outside)
        place.check(lambda: place.command(*line.split()))
    finally:
        put(path, good, place.outside)


@fuzzed(15)
@given(data=st.data())
def test_a_recipe_is_read_whole_or_refused(place: Place, data: st.DataObject) -> None:
    good = place.texts / "tiny.toml"
    path = place.run.path / "mine.toml"
    damage = data.draw(damages(good))
    place.restore()
    put(path, damage, place.outside)
    found = place.check(lambda: recipe.load(str(path)))
    if found is not None:
        path.unlink()
        path.write_text(recipe.dump(found), encoding="utf-8")
        assert recipe.load(str(path)) == found


@fuzzed(15)
@given(data=st.data())
def test_a_ds_config_is_usable_or_refused(place: Place, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ds_config.names()))
    path = place.run.path / "mine.json"
    damage = data.draw(damages(ds_config.DS_CONFIGS_DIR / f"{name}.json"))
    place.restore()
    put(path, damage, place.outside)

    def use() -> None:
        config = ds_config.load(str(path))
        assert ds_config.dtype(config) in ("fp32", "fp16", "bf16")
        ds_config.for_one_rank(config)
        assert [ds_config.offloads(config, what) in (True, False) for what in ("optimizer", "param")]
        shape = planner.recipe_shape(tiny_training.STUDENT_SHAPE, 300, 16)
        step = planner.Step(
            *(shape, None, "fp32", ds_config.dtype(config), 16, 4, 3, 64, "adamw"),
            ds_config=config,
            world_size=2,
            device="cuda",
            is_by_document=False,
            recomputes=False,
        )
        assert planner.needed_memory(step).device_bytes > 0

    place.check(use)


@fuzzed(15)
@given(data=st.data())
def test_an_index_gives_rows_or_is_refused(place: Place, data: st.DataObject) -> None:
    damage = data.draw(damages(place.whole / FILES["index"]))
    place.restore()
    whole = Shards(place.run.shards)
    put(place.run.path / FILES["index"], damage, place.outside)

    def use() -> Shards:
        shards = Shards(place.run.shards)
        feed = Feed(shards, 12, 4, 0, 1, 1, 0)
        for step in (0, feed.num_steps - 1):
            feed.batch(step, 0), feed.num_targets(step), feed.text_bytes(step), feed.stage(step)
        for stage in shards.stages:
            list(shards.heldout(stage.name))
        return shards

    shards = place.check(use)
    assert shards is None or [stage.num_rows for stage in shards.stages] == [stage.num_rows for stage in whole.stages]


@fuzzed(15)
@given(data=st.data())
def test_a_ledger_gives_sessions_or_is_refused(place: Place, data: st.DataObject) -> None:
    damage = data.draw(damages(place.whole / FILES["ledger"]))
    place.restore()
    put(place.run.ledger, damage, place.outside)

    def use() -> None:
        before = len(sessions(place.run.ledger))
        Ledger(place.run.ledger).start("student", "here", 7, 1344)
        found = sessions(place.run.ledger)
        assert len(found) == before + 1 and found[-1].step == 7
        assert all(0 <= one.seconds < float("inf") for one in found)

    place.check(use)


def _cut(data: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, len(data)).map(lambda end: data[:end])


@fuzzed(8)
@given(data=st.data())
def test_prepare_goes_on_from_what_it_wrote_or_begins_again(place: Place, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["progress.json", "progress.json", "fingerprint.json", "01-web.bin"]))
    file = place.begun / "shards.partial" / name
    damage = data.draw(damages(file) if name != "01-web.bin" else _cut(file.read_bytes()))
    place.restore(place.begun)
    put(place.run.path / "shards.partial" / name, damage, place.outside)
    place.check(lambda: place.command("status"))
    answer = place.check(lambda: place.command("prepare"))
    if answer[0] == 0:
        files = [path for path in (place.whole / "shards").rglob("*") if path.is_file()]
        assert all(
            (place.run.shards / path.relative_to(place.whole / "shards")).read_bytes() == path.read_bytes()
            for path in files
        )
    else:
        assert name == "01-web.bin" and "is shorter than it was" in answer[1]


def _with(text: str, key: str, value: Any) -> str:
    """A JSON text with another value at a dotted path."""
    root = json.loads(text)
    *sections, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    table = root
    for section in sections:
        table = table[section]
    table[last] = value
    return json.dumps(root)


# Each was a traceback, a wait without an end, or was believed: file, key, value, command, exit code, what is said.
FOUND: list[tuple[str, str, Any, str, int, str]] = [
    ("plan", "world_size", None, "train", 2, "plan.json: world_size"),
    ("plan", "batch_rows", 0, "train", 2, "plan.json: batch_rows"),
    ("plan", "batch_rows", 13, "train", 2, "batch_rows 13 is no multiple of 4 rows on 1 ranks"),
    ("plan", "num_threads", -1, "train", 2, "plan.json: num_threads"),
    ("plan", "dtype", "fp8", "train", 2, "plan.json: dtype"),
    ("plan", "schedule", [], "train", 2, "plan.json: schedule"),
    ("plan", "reasons", [], "plan", 2, "plan.json: reasons"),
    ("plan", "reasons", {}, "plan", 0, "dtype: fp32"),
    ("plan", "predicted", {}, "plan", 2, "plan.json: predicted.memory_bytes"),
    ("plan", "predicted.tokens_per_second", 1e-320, "status", 0, "step 6 of 11"),
    ("plan", "num_steps", 10**400, "status", 0, "step 6"),
    ("plan", "learning_rate", float("nan"), "train", 2, "plan.json: learning_rate"),
    ("plan", "dtype", "\ud800", "train", 2, "plan.json"),
    ("plan", "micro_batch_rows", {}, "report", 0, "report"),
    ("index", "stages.0.name", "../../../outside/kept", "train", 2, "index.json is broken: stages.0.name"),
    ("index", "stages.0.name", "\ud800", "status", 0, "step 6"),
    ("index", "stages.0.rows", 121, "train", 2, "index.json is broken"),
    ("index", "stages.0", None, "status", 0, "step 6"),
    ("index", "stages", 3, "report", 0, "report"),
    ("index", "stages.0.heldout_rows", [], "evaluate", 0, ""),
    ("index", "files", {"../../../outside/kept.txt": {"bytes": 8}}, "train", 2, "index.json is broken"),
    ("index", "eos_token_id", 300, "train", 2, "index.json is broken: token 300"),
    ("index", "vocab_size", 70_000, "train", 2, "index.json is broken"),
    ("index", "context_tokens", 8, "train", 2, "index.json is broken"),
    ("index", "fingerprint", [], "prepare", 2, "index.json is broken: fingerprint"),
    ("state", "step", 10**400, "status", 0, "step 0"),
    ("evaluation", "rows", {"name": 3}, "report", 0, "report"),
    ("evaluation", "rows.0.bits_per_byte", {}, "report", 0, "report"),
]


@pytest.mark.parametrize(("kind", "key", "value", "line", "code", "said"), FOUND, ids=lambda one: str(one)[:40])
def test_what_was_found(place: Place, kind: str, key: str, value: Any, line: str, code: int, said: str) -> None:
    place.restore()
    path = place.run.path / {**FILES, **SHOWN}[kind]
    path.write_text(_with(path.read_text(), key, value))
    answer = place.check(lambda: place.command(line))
    assert answer[0] == code and said in answer[1]


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link to nothing"])
@pytest.mark.parametrize("kind", FILES)
def test_what_stands_in_the_place_of_a_file(place: Place, kind: str, what: str) -> None:
    place.restore()
    put(place.run.path / FILES[kind], what, place.outside)
    for line in ("status", "train", "export", "evaluate", "report"):
        place.check(lambda: place.command(line))  # noqa: B023


@pytest.mark.parametrize("kind", FILES)
def test_no_text_is_taken_for_granted(place: Place, kind: str) -> None:
    place.restore()
    file = place.run.path / FILES[kind]
    file.write_bytes(b"\xfb" + file.read_bytes()[1:])
    for line in COMMANDS:
        place.check(lambda: place.command(*line.split()))  # noqa: B023


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = " + "9" * 5000, "mine.toml"),
        ("seed = 0x" + "f" * 5000, "seed"),
        ("seed = -1", "seed"),
        ("a = " + "[" * 100_000, "mine.toml"),
        ("[corpus.datasets.x]\npath = 'p'\nspilt = 'train'", 'did you mean "split"'),
        ("[corpus]\ndir = '~nobody-is-called-that/c'", "corpus.dir"),
        ('[corpus]\ndir = "a\\u0000"', "corpus.dir"),
        (f"[engine]\nds_config = '{'a' * 300}.json'", "engine.ds_config"),
        ("[optimizer]\nbatch_tokens = 1000000000000", "optimizer.batch_tokens"),
        ("[budget]\nsession_hours = 5e-324", "budget.session_hours"),
        ("[corpus]\nworkers = 1000000", "corpus.workers"),
        (f"name = '{'a' * 300}'", "name"),
        (f"[[curriculum.stages]]\nname = 'a'\ncorpus = 'a'\nunit = 'sentence'\ntake = '{'9' * 10**6}0GB'", "take"),
    ],
    ids=lambda text: text[:30],
)
def test_recipes_that_were_a_traceback(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    stage = '[[curriculum.stages]]\nname = "a"\ncorpus = "a"\nunit = "sentence"\ntake = 1'
    path.write_text(text if "curriculum" in text else f"{text}\n{stage}")
    with pytest.raises(UserError) as caught:
        recipe.load(str(path))
    assert said in str(caught.value)


WRONG_DS_CONFIGS = (
    '{"zero_optimization": null}',
    '{"zero_optimization": {"reduce_bucket_size": "many"}}',
    '{"zero_optimization": {"stage": ' + "9" * 5000 + "}}",
    '{"fp16": null}',
)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, *WRONG_DS_CONFIGS])
def test_ds_configs_that_were_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    for name in (str(tmp_path / "mine.json"), "a\0b", "~nobody-is-called-that/a.json", "a" * 300):
        with pytest.raises(UserError, match="ds_config"):
            ds_config.load(name)


@pytest.mark.parametrize(
    "damage",
    [
        *({"time": 1e12}, {"time": -1}, {"seconds": 1e300}, {"seconds": float("nan")}, {"step": -1}),
        *({"tokens": 10**400}, {"save_seconds": float("inf")}, {"training": "\ud800"}, {"step": 1e308}),
    ],
    ids=str,
)
def test_numbers_of_a_ledger_that_are_none_are_passed_over(place: Place, damage: dict[str, Any]) -> None:
    place.restore()
    before = sessions(place.run.ledger)
    line = {"event": "start", "session": "x", "time": 1, "training": "a", "machine": "b"}
    with place.run.ledger.open("a") as file:
        file.write(json.dumps({**line, "step": 1, "tokens": 1, "seconds": 1, **damage}) + "\n")
    assert sessions(place.run.ledger) == before
    assert place.check(lambda: place.command("status"))[0] == 0


def test_an_older_checkpoint_does_not_pass_for_a_newer_one(place: Place) -> None:
    place.restore()
    checkpoints, lines = place.run.checkpoints, list[str]()
    shutil.copytree(checkpoints / f"step-{SAVED_STEP - 1:08d}", checkpoints / "step-00000009")
    saved = checkpoint.newest(checkpoints, lines.append)
    assert saved is not None and saved.state["step"] == SAVED_STEP
    assert lines == [f"checkpoint passed over: {checkpoints / 'step-00000009'}: it is of step {SAVED_STEP - 1}"]


def test_a_token_that_no_tokenizer_has_is_refused(place: Place) -> None:
    place.restore()
    file = place.run.path / FILES["tokens"]
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    feed = Feed(Shards(place.run.shards), 12, 4, 0, 1, 1, 0)
    with pytest.raises(UserError, match=r"01-web\.bin: row 121 holds token 65535 of 300"):
        [feed.batch(feed.num_steps - 1, micro) for micro in range(3)]


def test_a_report_names_what_is_damaged(place: Place) -> None:
    place.restore()
    for name in ("plan.json", "evaluation.json"):
        data = json.loads((place.run.path / name).read_text())
        data["rows"] = data["context_tokens"] = 3
        (place.run.path / name).write_text(json.dumps({**data, "dtype": {}, "versions": 3}))
    assert place.command("report")[0] == 0
    assert "Damaged, so not in this report: evaluation.json" in place.run.report.read_text()
    place.restore()
    assert place.command("report")[0] == 0 and "Damaged" not in place.run.report.read_text()
