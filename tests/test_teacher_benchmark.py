"""The teacher measurement: its rows and figures against a plain computation, its text, and what it refuses."""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import teacher, teacher_agreement, teacher_sides, teacher_tokens
from benchmarks.teacher_sides import Configuration, Loaded
from daramgpt import corpora, quickstart
from daramgpt import teacher as teachers
from daramgpt.corpora import ReadReport
from daramgpt.errors import UserError
from daramgpt.shards.encode import Encoder
from daramgpt.tokenizer import train_tokenizer

ROW_TOKENS = 64
NUM_TOKENS = 5 * ROW_TOKENS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher-benchmark") / "corpora"
    quickstart.write_corpus(folder, text_megabytes=0.3)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(corpus: Path) -> Path:
    folder = corpus.parent / "teacher"
    documents = corpora.read(corpora.find(corpus, "wiki", "wiki"), ReadReport())
    train_tokenizer((" ".join(pieces) for document in documents for pieces in document.paragraphs), 400, folder)
    save_model(folder, Encoder(folder).vocab_size)
    return folder


def save_model(folder: Path, vocab_size: int) -> None:
    torch.manual_seed(0)
    # Wide weights: the rows of a model that knows nothing would agree whatever is done to it.
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=ROW_TOKENS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


class SideHere:
    """A side in this process: no process takes its seconds to start, and no memory is watched."""

    def __init__(self, configuration: Configuration, teacher_dir: Path, tiny_dir: Path, log: Path) -> None:
        self.configuration, self.teacher_dir, self.tiny_dir = configuration, teacher_dir, tiny_dir

    def wait(self) -> None:
        teachers.load(self.tiny_dir, self.configuration.precision)

    def load(self) -> Loaded:
        self.teacher = teachers.load(self.teacher_dir, self.configuration.precision)
        return Loaded(self.teacher.num_parameters, self.teacher.weight_bytes, 0, None)

    def head(self) -> tuple[np.ndarray, None]:
        return self.teacher.head_weight.numpy(), None

    def run(self, input_ids: np.ndarray) -> teacher_sides.Output:
        return teacher_sides.Output(self.teacher.hidden_states(torch.from_numpy(input_ids)).numpy(), 1.0)

    def end(self) -> None:
        """There is no process to end."""


@pytest.fixture
def sides_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "Side", SideHere)


def test_figures_are_those_of_a_plain_computation(
    corpus: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher_agreement, "CHUNK_TOKENS", 50)
    # Two batches, and chunks that divide neither.
    monkeypatch.setattr(teacher_tokens, "BATCH_TOKENS", 3 * ROW_TOKENS)
    arguments = ["--teacher", str(teacher_dir), "--corpus", str(corpus), "--tokens", str(NUM_TOKENS)]
    file = tmp_path / "result.json"
    assert teacher.main([*arguments, "--rows", "int8,fp16", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["hardware"] and "torch" in result["versions"]
    assert result["batch_tokens"] == 3 * ROW_TOKENS
    rows = {row["name"]: row for row in result["rows"]}
    reference, int8 = rows["fp32"], rows["int8"]
    assert reference["kl_to_fp32"] == 0 and reference["top1_agreement"] == 1
    assert reference["weight_bytes"] == result["checkpoint_bytes"]
    assert int8["weight_bytes"] < reference["weight_bytes"] / 2
    batches = torch.from_numpy(teacher_tokens.given_text(teacher_dir, corpus, NUM_TOKENS))
    assert batches.shape == (2, 3, ROW_TOKENS)
    plain, quantised = (
        (loaded.hidden_states(batches.flatten(0, 1)).double() @ loaded.head_weight.double().T)
        .log_softmax(-1)
        .flatten(0, 1)
        for loaded in (teachers.load(teacher_dir, "fp32"), teachers.load(teacher_dir, "int8", torch.bfloat16))
    )
    kl = kl_div(quantised, plain, log_target=True, reduction="batchmean")
    assert kl > 1e-6
    assert int8["kl_to_fp32"] == pytest.approx(float(kl), rel=1e-3)
    agreement = (quantised.argmax(-1) == plain.argmax(-1)).double().mean()
    assert int8["top1_agreement"] == pytest.approx(float(agreement), abs=1e-9)
    assert int8["tokens"] == 6 * ROW_TOKENS and int8["tokens_per_second"] > 0
    assert int8["load_peak_share"] == int8["load_peak_bytes"] / result["checkpoint_bytes"]
    table = {line.split()[0]: line.split() for line in output.splitlines() if line}
    assert table["int8"][1] == "bf16" and table["fp32"][1] == "fp32"
    if not torch.cuda.is_available():
        assert "fp16" in result["left_out"] and "left out: fp16" in output


def test_text_is_a_mix_of_all_corpora_in_whole_rows(corpus: Path, teacher_dir: Path) -> None:
    encoder = Encoder(teacher_dir)
    rows = teacher_tokens.text_rows(corpus, encoder, ROW_TOKENS, 8)
    assert rows.shape == (8, ROW_TOKENS)
    assert (rows[:4] == teacher_tokens.text_rows(corpus, encoder, ROW_TOKENS, 4)).all()
    texts = [encoder.tokenizer.decode(row.tolist()) for row in rows]
    for place, name in enumerate(("web", "unpublished", "wiki", "written")):
        first = next(corpora.read(corpora.find(corpus, name, name), ReadReport()))
        paragraph = " ".join(first.paragraphs[0])
        assert texts[place][: len(paragraph)] == paragraph[: len(texts[place])]
    with pytest.raises(UserError, match=r"holds [\d,]+ tokens in whole rows.*--tokens"):
        teacher_tokens.text_rows(corpus, encoder, ROW_TOKENS, 10**6)


def test_batches_hold_the_tokens_asked_for() -> None:
    assert teacher_tokens.batch_shape(100_000, 512) == (25, 8, 512)
    assert teacher_tokens.batch_shape(100_000, 2048) == (25, 4, 1024)
    assert teacher_tokens.batch_shape(300, 1024) == (1, 1, 300)
    assert teacher_tokens.batch_shape(5, 2) == (1, 3, 2)
    assert teacher_tokens.batch_shape(4097, 8192) == (2, 4, 1024)


def test_a_row_that_is_not_finite_has_no_figure() -> None:
    sums = teacher_agreement.Sums(seconds=[8.0, 2.0, 4.0])
    head = teacher_agreement.Head(torch.eye(3), None)
    hidden = torch.randn(30, 3)
    teacher_agreement.compare([hidden, hidden * math.nan], [head, head], [teacher_agreement.Sums(), sums])
    row = teacher.row_of(Configuration("int8", "int8", "bf16"), Loaded(100, 60, 80, None), sums)
    assert row["kl_to_fp32"] is None and row["top1_agreement"] is None
    # The first batch is a warm-up.
    assert row["slowest_and_fastest_repetition"] == [2.5, 5.0] and row["tokens_per_second"] == 3.75
    assert row["load_peak_share"] == 0.2


@pytest.mark.usefixtures("sides_here")
def test_a_slow_row_stops_and_an_unavailable_one_is_left_out(teacher_dir: Path, tmp_path: Path) -> None:
    rows = [*teacher_sides.configurations(["int8-fp32"]), Configuration("odd", "int3", "fp32")]
    batches = np.zeros((3, 1, ROW_TOKENS), dtype=np.int64)
    result = teacher.measure(teacher_dir, batches, rows, tmp_path, most_seconds=1e-9, say=lambda line: None)
    assert [row["tokens"] for row in result["rows"]] == [2 * ROW_TOKENS, ROW_TOKENS]
    assert "int3" in result["left_out"]["odd"]


@pytest.mark.usefixtures("sides_here")
def test_without_batches_only_loading_is_measured(teacher_dir: Path, tmp_path: Path) -> None:
    rows = teacher_sides.configurations(["fp32"])
    result = teacher.measure(teacher_dir, teacher_tokens.random_tokens(0), rows, tmp_path, say=lambda line: None)
    (row,) = result["rows"]
    assert row["kl_to_fp32"] is None and row["tokens_per_second"] is None and row["tokens"] == 0
    text = {"text": "random tokens", "batch_tokens": 0}
    assert "fp32" in teacher.format_result({**result, **text})


def test_anonymous_memory_is_seen_and_mapped_memory_is_not(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(30_000_000))
    before = teacher_sides.anonymous_bytes(os.getpid())
    mapped = np.memmap(tmp_path / "zeros", dtype=np.uint8, mode="r")
    assert mapped.sum() == 0
    assert teacher_sides.anonymous_bytes(os.getpid()) - before < 15_000_000
    # From the system, not from malloc, which may have kept what was freed before.
    with mmap.mmap(-1, 30_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held[::4096] = b"x" * len(held[::4096])
        assert teacher_sides.anonymous_bytes(os.getpid()) - before > 25_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--teacher": "absent"}, "absent"),
        ({"--corpus": "absent"}, "does not exist"),
        ({"--tokens": "0"}, "--tokens 0"),
        ({"--tokens": "100000000"}, "fewer with --tokens"),
        ({"--rows": "int8,int7"}, "no row int7"),
        ({"--teacher": None}, "--teacher and --corpus"),
        ({"--shape": "full", "--tokens": "-1"}, "--tokens -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    corpus: Path,
    teacher_dir: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str | None],
    message: str,
) -> None:
    given = {"--teacher": str(teacher_dir), "--corpus": str(corpus), "--tokens": str(NUM_TOKENS), **changes}
    assert teacher.main([word for key, value in given.items() if value for word in (key, value)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.usefixtures("sides_here")
def test_a_tokenizer_of_another_model_is_refused(
    corpus: Path, teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((teacher_dir / name).read_bytes())
    save_model(tmp_path, vocab_size=200)
    arguments = ["--teacher", str(tmp_path), "--corpus", str(corpus), "--tokens", "64", "--rows", "fp32"]
    assert teacher.main(arguments) == 2
    assert "whose tokenizer belongs to it" in capsys.readouterr().err.splitlines()[-1]


def test_the_full_teacher_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(teacher.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 5_000_000_000))
    with pytest.raises(UserError, match=r"5\.0 GB free, the full teacher takes 4\.6 GB"):
        teacher.save_full_teacher(tmp_path / "teacher")
