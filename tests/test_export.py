"""The exported directory: loads without the package, gives the checkpoint's logits, and is replaced in one step."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from daramgpt import checkpoint, generate, model_card, recipe, student, tokenizer
from daramgpt import export as exporter
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, write_json

TEXTS = ["다람쥐가 도토리를 숲에 묻었다.", "오늘 아침에 비가 내렸다.", "도서관에서 책을 읽었다."] * 5


@dataclass(frozen=True)
class Saved:
    """What `checkpoint.newest` finds."""

    state: dict[str, Any]
    sha256: str
    tensors: dict[str, torch.Tensor]

    def weights(self) -> dict[str, torch.Tensor]:
        return self.tensors


@pytest.fixture
def small() -> Recipe:
    return recipe.load("quickstart", ["student.n_embd=16", "student.n_head=2", "student.n_layer=2"])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    tokenizer.train_tokenizer(iter(TEXTS), 400, run.shards / "tokenizer")
    return run


@pytest.fixture
def saved(small: Recipe, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Saved:
    vocab_size = len(AutoTokenizer.from_pretrained(run.shards / "tokenizer"))
    weights = student.build(small.student, vocab_size, 32, 0, seed=3).state_dict()
    del weights["lm_head.weight"]
    found = Saved({"step": 10, "num_steps": 10, "tokens": 1234}, "a" * 64, weights)
    monkeypatch.setattr(checkpoint, "newest", lambda *_: found)
    return found


def test_plain_transformers_load_the_checkpoint_s_logits(small: Recipe, run: RunDirectory, saved: Saved) -> None:
    out_dir = exporter.export(small, run, lambda _: None)
    assert out_dir == run.export
    model, words = AutoModelForCausalLM.from_pretrained(out_dir), AutoTokenizer.from_pretrained(out_dir)
    original = student.build(small.student, saved.tensors["transformer.wte.weight"].shape[0], 32, 0, seed=3).eval()
    ids = torch.tensor([words.encode(TEXTS[0], add_special_tokens=False)])[:, :30]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert words.decode(words.encode(TEXTS[0]), skip_special_tokens=True) == TEXTS[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert words.model_max_length == 32
    assert model.generation_config.eos_token_id == words.eos_token_id
    first, second = (
        "".join(generate.Writer.load(out_dir).stream("다람쥐", 5, generate.Sampling(seed=3))) for _ in range(2)
    )
    assert first == second


class Hub:
    """Stands for `huggingface_hub.HfApi`."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fault: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        if self.fault:
            raise self.fault
        left_out = options["ignore_patterns"]
        options["files"] = {path.name for path in folder_path.iterdir() if path.name not in left_out}
        self.calls.append((repo_id, options))


def test_an_export_is_pushed_without_what_is_only_of_this_machine(
    small: Recipe, run: RunDirectory, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call, options in (
        ("create_repo", {"repo_id", "private", "exist_ok"}),
        ("upload_folder", {"repo_id", "folder_path", "commit_message", "ignore_patterns"}),
    ):
        assert options <= inspect.signature(getattr(huggingface_hub.HfApi, call)).parameters.keys()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    exporter.export(small, run, lambda _: None)
    said: list[str] = []
    exporter.push(run, "me/daram", False, said.append)
    (made, made_with), (pushed, upload) = Hub.calls
    assert made == pushed == "me/daram" and made_with == {"private": True, "exist_ok": True}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= upload["files"]
    assert "export.json" not in upload["files"] and upload["commit_message"] == "step 10 of 10"
    assert "huggingface.co/me/daram" in said[0]
    monkeypatch.setattr(Hub, "fault", PermissionError("401 Client Error\nand more"))
    with pytest.raises(UserError, match=r"--push me/daram: PermissionError: 401 Client Error; log in"):
        exporter.push(run, "me/daram", True, said.append)
    assert Hub.calls[-1] == ("me/daram", {"private": False, "exist_ok": True})
    for name in ("daram", "a/b/c", "me/da ram", "../x"):
        with pytest.raises(UserError, match="give OWNER/NAME"):
            exporter.push(run, name, False, said.append)


def test_exporting_again_is_free_until_something_changed(small: Recipe, run: RunDirectory, saved: Saved) -> None:
    lines: list[str] = []
    weights = exporter.export(small, run, lines.append) / "model.safetensors"
    first = weights.stat().st_ino
    exporter.export(small, run, lines.append)
    assert weights.stat().st_ino == first and "already holds step 10" in lines[-1]
    write_json(run.evaluation, {"rows": []})
    exporter.export(small, run, lines.append)
    second = weights.stat().st_ino
    assert second != first
    weights.write_bytes(b"broken")
    exporter.export(small, run, lines.append)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads((run.export / "export.json").read_text())["model_sha256"] == digest
    assert sorted(path.name for path in run.path.iterdir()) == ["evaluation.json", "export", "shards"]


def test_a_failed_export_leaves_the_old_one(
    small: Recipe, run: RunDirectory, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.export(small, run, lambda _: None)
    before = sorted(path.name for path in run.export.iterdir())
    saved.state["step"] = 9

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_json", full)
    with pytest.raises(UserError, match="No space left"):
        exporter.export(small, run, lambda _: None)
    assert sorted(path.name for path in run.export.iterdir()) == before
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_without_a_checkpoint_it_says_to_train(small: Recipe, run: RunDirectory) -> None:
    with pytest.raises(UserError, match="no checkpoint; train first"):
        exporter.export(small, run, lambda _: None)


def test_card_tells_partial_runs_and_what_was_measured(small: Recipe, run: RunDirectory, saved: Saved) -> None:
    saved.state["num_steps"] = 20
    row = {
        "name": "student",
        "parameters": 1000,
        "bytes": 4000,
        "bits_per_byte": {"web-1": 1.25, "wiki": None, "all": 1.25},
        "kl_to_teacher": 0.5,
        "top1_agreement": 0.5,
        "tokens_per_second": 10.0,
    }
    write_json(run.evaluation, {"rows": [row], "step": 10})
    card = exporter.export(small, run, lambda _: None) / "README.md"
    text = card.read_text(encoding="utf-8")
    metadata = metadata_load(card)
    assert metadata["language"] == "ko" and metadata["pipeline_tag"] == "text-generation"
    assert "partial" in metadata["tags"] and "step 10 of 20" in text
    assert "1.2500" in text and "| student | 1.2500 | – |" in text
    assert str(run.path) not in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "apache-2.0"),
        (["corpus.dir=/corpora"], "other"),
        (["teacher.model=skt/ko-gpt-trinity-1.2B-v0.5"], "cc-by-nc-sa-4.0"),
        (["teacher.model=someone/unknown"], "other"),
    ],
)
def test_licence_follows_the_teacher(settings: list[str], expected: str) -> None:
    assert model_card.licence(recipe.load("quickstart", settings)) == expected


def test_licence_of_a_local_teacher_is_its_card_s(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# teacher\n", encoding="utf-8")
    assert model_card.licence(recipe.load("quickstart", [f"teacher.model={tmp_path}"])) == "mit"


def test_base_model_is_named_only_when_it_is_on_the_hub(tmp_path: Path) -> None:
    record = {"step": 1, "num_steps": 1, "tokens": 1}
    run = RunDirectory(tmp_path)
    hub = model_card.write(recipe.load("daramgpt"), run, record, 1000)
    local = model_card.write(recipe.load("daramgpt", ["teacher.model=/models/secret-place/mine"]), run, record, 1000)
    assert "base_model: skt/ko-gpt-trinity-1.2B-v0.5" in hub and "license: cc-by-nc-sa-4.0" in hub
    assert "base_model" not in local and "secret-place" not in local and "`mine`" in local
