"""Fine-tuning on tasks: what is read, what the head sees, the scores, and what stands after a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import task_folder
import torch
from task_folder import byte_tokenizer

from daramgpt import cli, evaluation, pace, tasks, text_table
from daramgpt.cli import exit_codes
from daramgpt.errors import UserError
from daramgpt.recipe import FineTuning
from daramgpt.recipe_changes import settings_that_matter
from daramgpt.tasks import data, encoding, finetuning, metrics, quoted, table
from daramgpt.tasks.classifier import Classifier, padded

SHARED = Path(__file__).parents[2] / "shared" / "evaluation"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return task_folder.write(tmp_path / "tasks")


def quiet() -> pace.Pace:
    return pace.Pace(lambda _: None, "", 1)


def encode(examples: list[data.Example], max_tokens: int = 200) -> list[encoding.Encoded]:
    return encoding.encode(byte_tokenizer(), examples, max_tokens, quiet())


def text_of(ids: list[int]) -> str:
    assert ids[0] == 0
    return byte_tokenizer().decode(ids[1:])


@pytest.mark.parametrize(("num_true", "num_predicted"), [(2, 2), (4, 4), (4, 1), (1, 4), (1, 1), (3, 2)])
def test_metrics_are_those_of_scikit_learn(num_true: int, num_predicted: int) -> None:
    theirs = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = random.Random(num_true * 10 + num_predicted)
    for num_rows in (1, 2, 7, 300):
        # Labels from both ends, so that some occur on one side only.
        truth = [draw.randrange(num_true) for _ in range(num_rows)]
        predicted = [4 - draw.randrange(num_predicted) for _ in range(num_rows)]
        for form in (list, numpy.array):
            assert metrics.accuracy(form(truth), form(predicted)) == pytest.approx(
                theirs.accuracy_score(truth, predicted), abs=1e-12
            )
            assert metrics.macro_f1(form(truth), form(predicted)) == pytest.approx(
                theirs.f1_score(truth, predicted, average="macro"), abs=1e-12
            )


def test_every_row_is_read_the_empty_and_the_quoted_too(folder: Path) -> None:
    for name in data.TASKS:
        found = data.read(folder, name)
        assert {split: len(rows) for split, rows in found.rows.items()} == (
            {"train": 12, "test": 8} if name == "nsmc" else {"train": 12, "validation": 8, "test": 8}
        )
        assert len(found.sha256) == len(found.rows)
    reviews = [row["document"] for row in data.read(folder, "nsmc").rows["test"]]
    assert reviews[1] == "" and reviews[-1] == '"최고" 라더니'


def test_marks_that_other_tools_take_for_a_lines_end_stay_within_a_text(folder: Path) -> None:
    path = folder / "kobest" / "sentineg_train.jsonl"
    path.write_text('{"sentence": "가\u2028나\x85다", "label": 1}\n', encoding="utf-8")
    assert data.read(folder, "sentineg").rows["train"] == [{"sentence": "가\u2028나\x85다", "label": 1}]


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        ("kobest/wic_test.jsonl", 3, "{broken", r"wic_test\.jsonl:3: that is no JSON"),
        ("kobest/wic_test.jsonl", 2, "[1]", r"wic_test\.jsonl:2: that is no JSON object"),
        ("kobest/wic_test.jsonl", 2, '{"word": "굴", "label": 0}', r':2: there is no text "context_1"'),
        ("kobest/sentineg_train.jsonl", 1, '{"sentence": "가", "label": 2}', r":1: label 2 is out of range; .* 0 to 1"),
        ("kobest/sentineg_train.jsonl", 1, '{"sentence": "가", "label": true}', r":1: label True is out of range"),
        (
            "kobest/copa_train.jsonl",
            1,
            '{"premise": "가", "question": "왜", "alternative_1": "나", "alternative_2": "다", "label": 0}',
            r":1: question '왜' is unknown",
        ),
        ("nsmc/ratings_test.txt", 4, "9\t가\t2", r"ratings_test\.txt:4: label '2' is out of range"),
        ("nsmc/ratings_test.txt", 4, "9\t가", r"ratings_test\.txt:4: 2 columns instead of 3"),
        ("nsmc/ratings_test.txt", 1, "9\t가\t1", r"ratings_test\.txt:1: the columns are not id"),
        ("nsmc/ratings_test.txt", 8, '9\t"가\t1', r"ratings_test\.txt:\d+: "),
        ("nsmc/ratings_test.txt", 4, "9\t\udcff\t1", r"ratings_test\.txt:4: it is not UTF-8"),
    ],
)
def test_a_broken_line_is_named(folder: Path, file: str, line: int, text: str, message: str) -> None:
    path = folder / file
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        data.read(folder, "nsmc" if "nsmc" in file else path.name.split("_")[0])


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "kobest" / "copa_test.jsonl").unlink()
    with pytest.raises(UserError, match=r"copa_test\.jsonl cannot be read .* leave copa out"):
        tasks.read(task_folder.recipe(), folder)
    with pytest.raises(UserError, match="--tasks: there is no folder"):
        tasks.read(task_folder.recipe(), tmp_path / "nowhere")
    (folder / "kobest" / "copa_test.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no rows"):
        data.read(folder, "copa")


def test_a_recipe_that_names_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.finetuning\.tasks\.0.*boolq"):
        task_folder.recipe('evaluation.finetuning.tasks=["bool"]')
    with pytest.raises(UserError, match=r"evaluation\.finetuning\.seeds.*twice"):
        task_folder.recipe("evaluation.finetuning.seeds=[1, 1]")


def test_settings_of_the_tasks_change_nothing_of_a_training() -> None:
    assert settings_that_matter(task_folder.recipe()) == settings_that_matter(
        task_folder.recipe("evaluation.finetuning.epochs=9", "evaluation.zero_shot=true")
    )


def test_a_text_that_is_too_long_loses_what_it_can_spare() -> None:
    long = "가나다라마바사 " * 30
    boolq = data.TASKS["boolq"].example({"paragraph": f"처음 {long}", "question": "그런가?", "label": 1})
    found = text_of(encode([boolq], 60)[0].ids[0])
    assert found.startswith("처음 가나다") and found.endswith(" 그런가?")
    row = {"context": f"{long}끝말.", **{f"ending_{n}": f"{n}번 끝." for n in range(1, 5)}, "label": 0}
    hellaswag = encode([data.TASKS["hellaswag"].example(row)], 60)[0]
    for number, ids in enumerate(hellaswag.ids, 1):
        assert len(ids) == 60 and text_of(ids).endswith(f" 끝말. {number}번 끝.")
    wic = data.TASKS["wic"].example(
        {"word": "굴", "context_1": f"{long}[굴]이다. {long}", "context_2": f"{long}[굴]을 {long}", "label": 0}
    )
    found = text_of(encode([wic], 40)[0].ids[0])
    assert found.count("[굴]") == 2 and found.endswith(" 굴")
    for example, room in ((boolq, 60), (wic, 40), (data.TASKS["nsmc"].example({"document": long, "label": 0}), 33)):
        assert len(encode([example], room)[0].ids[0]) == room
    assert (
        encode([data.TASKS["boolq"].example({"paragraph": "", "question": long, "label": 0})], 30)[0].num_tokens == 30
    )


def test_an_empty_text_is_the_token_that_ends_one() -> None:
    assert encode([data.TASKS["nsmc"].example({"document": "", "label": 1})])[0].ids == ([0],)


def test_the_head_reads_the_last_real_token_whatever_stands_beside_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(task_folder.model(), 3, dropout=0.5).eval()
    # The token that pads also begins, ends and stands within texts.
    texts = [[0], [0, 5, 6, 7, 8, 9, 10], [0, 5, 0, 0], [0, 0], [0, 9, 8]]
    with torch.inference_mode():
        together = model(*padded(texts, 0, CPU))
        for place, text in enumerate(texts):
            alone = model(*padded([text], 0, CPU))[0]
            torch.testing.assert_close(together[place], alone, atol=1e-5, rtol=0)
    assert (together - together[0]).abs().amax(-1)[1:].min() > 1e-4


def test_predictions_keep_the_order_of_the_rows() -> None:
    draw = random.Random(0)
    task = data.TASKS["copa"]
    texts = [[[0, *draw.choices(range(1, 200), k=draw.randrange(30))] for _ in range(2)] for _ in range(24)]
    rows = [encoding.Encoded((first, second), 0) for first, second in texts]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Classifier(task_folder.model(), 1, dropout=0.0)
    alone = [finetuning.predict(model, task, [row], 1, 0, CPU)[0] for row in rows]
    assert finetuning.predict(model, task, rows, 5, 0, CPU) == alone
    assert set(alone) == {0, 1}


def finetuned(folder: Path, name: str, seed: int, **settings: Any) -> dict[str, Any]:
    chosen = FineTuning(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, **settings})
    found = data.read(folder, name)
    splits = finetuning.encode_splits(found, byte_tokenizer(), chosen, 256, 0, lambda _: None)
    result = finetuning.finetune(task_folder.model(), found.task, splits, chosen, seed, 0, CPU, lambda _: None)
    return {key: value for key, value in result.items() if "second" not in key}


@pytest.mark.parametrize("name", ["hellaswag", "nsmc"])
def test_a_seed_gives_the_same_scores_on_a_cpu(folder: Path, name: str) -> None:
    before = torch.random.get_rng_state()
    first = finetuned(folder, name, 1)
    assert first == finetuned(folder, name, 1)
    assert first["epochs"] != finetuned(folder, name, 2)["epochs"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fine_tuning_learns_what_can_be_learnt(folder: Path) -> None:
    # The label hangs on the last word of the text.
    result = finetuned(folder, "sentineg", 0, epochs=12, learning_rate=1e-2, dropout=0.0)
    assert result["epochs"][-1]["loss"] < result["epochs"][0]["loss"] / 4
    assert result["best_test"]["accuracy"] == 1.0


def test_both_ways_to_choose_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Validation and test after each of four epochs; the best are reached twice.
    given = iter([0.5, 0.6, 0.7, 0.9, 0.7, 0.8, 0.6, 0.9])
    monkeypatch.setattr(metrics, "scores", lambda *_: dict.fromkeys(("accuracy", "macro_f1"), next(given)))
    result = finetuned(folder, "wic", 0, epochs=4)
    assert result["best_test"] == {"epoch": 2, "accuracy": 0.9, "macro_f1": 0.9}
    assert result["chosen_on_validation"] == {"epoch": 2, "accuracy": 0.9, "macro_f1": 0.9}
    given = iter([0.5, 0.6, 0.6, 0.9, 0.7, 0.8, 0.7, 0.7])
    result = finetuned(folder, "wic", 0, epochs=4)
    assert (result["best_test"]["epoch"], result["chosen_on_validation"]["epoch"]) == (2, 3)
    assert result["chosen_on_validation"]["accuracy"] == 0.8


def test_rows_to_validate_on_are_held_out_of_the_training_rows(folder: Path) -> None:
    found = data.read(folder, "nsmc")

    def split(**settings: Any) -> dict[str, list[Any]]:
        chosen = FineTuning(**settings)
        return finetuning.encode_splits(found, byte_tokenizer(), chosen, 256, 5, lambda _: None)  # type: ignore[return-value]

    splits = split()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 2, "test": 8}
    whole = encode([found.task.example(row) for row in found.rows["train"]])
    assert sorted(row.ids for row in splits["train"] + splits["validation"]) == sorted(row.ids for row in whole)
    fewer = split(most_training_rows=4, validation_rows=1)
    assert {name: len(rows) for name, rows in fewer.items()} == {"train": 4, "validation": 1, "test": 8}
    assert [row.ids for row in split(most_training_rows=4)["train"]] == [
        row.ids for row in split(most_training_rows=4)["train"]
    ]


def measured(folder: Path, run: Any, *settings: str) -> tuple[dict[str, Any], list[str]]:
    recipe = task_folder.recipe('evaluation.finetuning.tasks=["copa", "nsmc"]', *settings)
    lines: list[str] = []
    results = tasks.measure(recipe, run, folder, tasks.read(recipe, folder), lines.append)
    return results, lines


def killed_after(num_rows: int) -> Callable[..., Any]:
    """A fine-tuning that is killed when so many were done."""
    left = iter(range(num_rows))
    real = finetuning.finetune

    def finetune(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    return finetune


def test_a_killed_evaluation_goes_on_with_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = task_folder.run(tmp_path / "run", monkeypatch)
    seeds = "evaluation.finetuning.seeds=[0, 4]"
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "finetune", killed_after(3))
        with pytest.raises(KeyboardInterrupt):
            measured(folder, run, seeds)
    kept = json.loads(run.tasks.read_text(encoding="utf-8"))
    assert [(row["task"], row["seed"]) for row in kept["finetuning"]] == [("copa", 0), ("copa", 4), ("nsmc", 0)]
    results, lines = measured(folder, run, seeds)
    assert any("1 to measure" in line for line in lines)
    assert results["finetuning"][:3] == kept["finetuning"]
    assert results == json.loads(run.tasks.read_text(encoding="utf-8"))
    parameters = sum(one.numel() for one in task_folder.model().parameters())
    described = {"name": "student", "parameters": parameters, "bytes": 4 * parameters, "step": 7, "tokens": 700}
    assert results["model"] == described
    for way in ("best_test", "chosen_on_validation"):
        scores = [row[way]["accuracy"] for row in results["finetuning"] if row["task"] == "nsmc"]
        summed = next(line for line in results["summary"] if line["task"] == "nsmc")[way]["accuracy"]
        assert summed["mean"] == pytest.approx(numpy.mean(scores))
        assert summed["std"] == pytest.approx(numpy.std(scores, ddof=1))
    monkeypatch.setattr(finetuning, "finetune", killed_after(0))
    # What stands is told by the rows, whatever has become of the rest.
    run.tasks.write_text(json.dumps({**results, "model": None, "summary": [{}]}), encoding="utf-8")
    again, lines = measured(folder, run, seeds)
    assert again == results and any("all measured already" in line for line in lines)


@pytest.mark.parametrize("changed", ["student", "file", "settings", "damage"])
def test_what_was_made_from_something_else_is_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    run = task_folder.run(tmp_path / "run", monkeypatch)
    first, _ = measured(folder, run)
    settings = []
    if changed == "student":
        task_folder.run(tmp_path / "run", monkeypatch, sha256="another")
    elif changed == "file":
        with (folder / "nsmc" / "ratings_train.txt").open("a", encoding="utf-8") as file:
            file.write("100\t좋다\t1\n")
    elif changed == "settings":
        settings = ["evaluation.finetuning.epochs=1"]
    else:
        text = run.tasks.read_text(encoding="utf-8")
        run.tasks.write_text(text.replace('"seed": 0', '"seed": 3', 1), encoding="utf-8")
    made: list[str] = []
    real = finetuning.finetune
    monkeypatch.setattr(finetuning, "finetune", lambda *args: made.append(args[1].name) or real(*args))
    second, _ = measured(folder, run, *settings)
    assert made == {"file": ["nsmc"], "damage": ["copa"]}.get(changed, ["copa", "nsmc"])
    assert len(second["finetuning"]) == len(first["finetuning"])


def test_rows_of_tasks_and_seeds_that_are_not_wanted_now_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = task_folder.run(tmp_path / "run", monkeypatch)
    for names, seeds in (("copa", "0"), ("nsmc", "1"), ("nsmc", "0")):
        settings = [f'evaluation.finetuning.tasks=["{names}"]', f"evaluation.finetuning.seeds=[{seeds}]"]
        results, _ = measured(folder, run, *settings)
    assert [(row["task"], row["seed"]) for row in results["finetuning"]] == [("copa", 0), ("nsmc", 1), ("nsmc", 0)]
    assert [(line["task"], line["seeds"]) for line in results["summary"]] == [("copa", [0]), ("nsmc", [0, 1])]


def test_a_file_that_holds_anything_else_is_written_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = task_folder.run(tmp_path / "run", monkeypatch)
    for content in (
        b"\xff\xfe",
        b"[]",
        b'{"finetuning": 3, "zero_shot": [7]}',
        b'{"finetuning": [{"measured_from": []}]}',
    ):
        run.tasks.write_bytes(content)
        results, _ = measured(folder, run, 'evaluation.finetuning.tasks=["copa"]', "evaluation.finetuning.epochs=1")
        assert len(results["finetuning"]) == 1


def test_without_a_checkpoint_the_command_to_train_is_named(folder: Path, tmp_path: Path) -> None:
    from daramgpt.run_directory import RunDirectory

    with pytest.raises(UserError, match=r"holds no checkpoint; train first"):
        measured(folder, RunDirectory(tmp_path / "run"))


def results_of(num_seeds: int) -> dict[str, Any]:
    def scores(seed: int) -> dict[str, Any]:
        return {"epoch": 3, "accuracy": 0.5 + seed / 100, "macro_f1": 0.25}

    rows = [
        {
            "task": name,
            "seed": seed,
            "epochs": [{}] * 20,
            "best_test": scores(seed),
            "chosen_on_validation": scores(seed),
            "rows": {"train": 140_000, "validation": 10_000, "test": 50_000},
            "seconds": 98765.4,
            "training_rows_per_second": 12345.6,
            "test_rows_per_second": 123456.7,
        }
        for name in data.TASKS
        for seed in range(num_seeds)
    ]
    zero = {"accuracy": 0.5, "macro_f1": 0.123456, "accuracy_normalised": 1.0}
    return {
        "model": {"name": "student", "parameters": 68_461_056, "bytes": 273_844_224, "step": 123_456},
        "finetuning": rows,
        "summary": tasks.summary(rows),
        "zero_shot": [{"task": name, "rows": 1404, "scores": zero} for name in data.KOBEST],
    }


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_table_keeps_to_its_width_and_names_what_is_quoted(num_seeds: int) -> None:
    lines = table.format_tasks(results_of(num_seeds)).splitlines()
    assert max(map(text_table.width_of, lines)) <= 100
    wic = next(line for line in lines if line.startswith("wic"))
    assert "25.00" in wic and "65.60" in wic and "66.01" in wic and "78.73" in wic
    nsmc = next(line for line in lines if line.startswith("nsmc"))
    assert ("51.00 ± 1.00" if num_seeds == 3 else "50.00  ") in nsmc and "86.50" in nsmc
    assert "quoted, not measured here:" in lines
    for name in quoted.SOURCES:
        assert any(line.startswith(f"  {name} = ") for line in lines)


def test_a_long_job_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    job = pace.Pace(lines.append, "wic", 100)
    for _ in range(100):
        now[0] += 0.5
        job.advance(1, "epoch 1 of 2")
    assert lines == [
        "wic: epoch 1 of 2, 4%, 48 s left",
        "wic: epoch 1 of 2, 44%, 28 s left",
        "wic: epoch 1 of 2, 84%, 8 s left",
    ]
    lines.clear()
    short = pace.Pace(lines.append, "wic", 10)
    for _ in range(10):
        now[0] += 0.19
        short.advance(1)
    assert not lines


def test_the_command_reads_the_tasks_before_it_measures_anything(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("daramgpt.progress._route_libraries", lambda log: None)
    done: list[str] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: done.append("held-out text"))
    monkeypatch.setattr(tasks, "measure", lambda recipe, run, where, found, say: done.append(f"{where} {len(found)}"))

    def call(where: Path) -> int:
        words = ["evaluate", "quickstart", "--run", str(tmp_path / "run"), "--tasks", str(where)]
        return exit_codes.guarded(lambda: cli.app(words, standalone_mode=False))

    assert call(tmp_path / "nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --tasks: there is no folder {tmp_path / 'nowhere'}; ") and error.count("\n") == 1
    assert not done
    assert call(folder) == 0
    assert done == ["held-out text", f"{folder} 6"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_the_published_files_are_read_whole() -> None:
    counts = {
        name: tuple(len(rows) for rows in data.read(SHARED, name).rows.values())
        for name in ("boolq", "copa", "wic", "hellaswag", "sentineg", "nsmc")
    }
    assert counts == {
        "boolq": (3665, 700, 1404),
        "copa": (3076, 500, 1000),
        "wic": (3318, 610, 1260),
        "hellaswag": (2029, 500, 500),
        "sentineg": (3649, 400, 397),
        "nsmc": (150_000, 50_000),
    }
