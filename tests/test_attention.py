"""Attention within documents against separate passes over each of them, and attention across them left as it was."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from daramgpt import commands, evaluation, recipe, student, teacher
from daramgpt.attention import Documents, document_mask, document_numbers, document_positions
from daramgpt.checkpoint import newest
from daramgpt.errors import UserError
from daramgpt.evaluation import held_out
from daramgpt.ledger import sessions
from daramgpt.progress import Console
from daramgpt.recipe import Shape
from daramgpt.recipe_changes import differences
from daramgpt.run_directory import RunDirectory

EOS, VOCAB, CONTEXT = 0, 97, 24


def rows(context: int = CONTEXT) -> torch.Tensor:
    """Rows as a stream of documents gives them, and the odd ones among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (7, context), generator=generator)
    starts: list[list[int]] = [
        [0],  # one document from end to end: the one before and the one after lie in other rows
        [],  # the middle of one that is longer than the row
        [5, 6, 15],  # the rest of one, an empty one, two more
        [context - 1],  # the mark of one whose text is in the next row
        [0, 9, context - 2],
        list(range(0, context, 2)),
        list(range(7, context)),  # what a padded row ends with
    ]
    for row, places in zip(ids, starts, strict=True):
        row[places] = EOS
    return ids


def pieces(row: torch.Tensor) -> list[torch.Tensor]:
    """The documents of a row, one by one."""
    found: list[list[int]] = []
    for place, token in enumerate(row.tolist()):
        if place == 0 or token == EOS:
            found.append([])
        found[-1].append(token)
    return [torch.tensor(one) for one in found]


def apart(hidden_states: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, T, D] of every document passed through on its own."""
    return torch.stack([torch.cat([hidden_states(one[None])[0] for one in pieces(row)]) for row in ids])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_numbers_positions_and_mask_follow_the_documents(tokens: list[int]) -> None:
    row = torch.tensor(tokens)
    lengths = [len(one) for one in pieces(row)]
    first = 1 if tokens[0] == EOS else 0
    ids = row[None].expand(2, -1)
    numbers, positions = document_numbers(ids, EOS), document_positions(ids, EOS)
    assert positions.dtype == numbers.dtype == torch.int64
    for found in (0, 1):
        assert numbers[found].tolist() == [first + n for n, length in enumerate(lengths) for _ in range(length)]
        assert positions[found].tolist() == [place for length in lengths for place in range(length)]
    blocks = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    for dtype in (torch.float32, torch.float16):
        mask = document_mask(numbers, dtype)
        assert mask.shape == (2, 1, len(tokens), len(tokens)) and mask.dtype == dtype
        assert torch.equal(mask[1, 0] == 0, blocks)
        assert (mask[1, 0][~blocks] == torch.finfo(dtype).min).all()


def test_a_row_that_begins_within_a_document_begins_at_position_0() -> None:
    ids = torch.tensor([[4, 4, EOS, 4, EOS], [EOS, EOS, 4, 4, 4]])
    assert document_numbers(ids, EOS).tolist() == [[0, 0, 1, 1, 2], [1, 2, 2, 2, 2]]
    assert document_positions(ids, EOS).tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 3]]


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_head=2, n_layer=2, initializer_range=0.2)
    )


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**small(), rotary_pct=0.5))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**small(), num_key_value_heads=1))


def small() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }


@pytest.fixture(scope="module", params=[gpt2, gpt_neox, llama], ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save_pretrained(path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_teacher_sees_each_document_as_if_it_were_alone(folder: Path, precision: str) -> None:
    loaded, ids = teacher.load(folder, precision), rows()
    together = loaded.hidden_states(ids, Documents(ids, EOS))
    expected = apart(loaded.hidden_states, ids)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    # Rows of one document are all that it makes no difference to.
    differs = (loaded.hidden_states(ids) - expected).abs().amax(dim=(1, 2)) > 1e-2
    assert differs.tolist() == [False, False, True, True, True, True, True]


def test_rows_longer_than_the_blocks_of_a_kernel() -> None:
    context = 1100
    model = student.build(Shape(n_embd=16, n_head=2, n_layer=1), VOCAB, context, EOS, seed=0).eval()
    measured, ids = held_out.CausalModel(model), rows(context)[:5]
    with torch.no_grad():
        together, expected = measured.hidden_states(ids, Documents(ids, EOS)), apart(measured.hidden_states, ids)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor | None, bool]]:
    """Mask and causal flag of every call of torch's attention, but those by which a loaded teacher is tried."""
    monkeypatch.setattr(teacher.Teacher, "check_finite", lambda self: None)
    calls: list[tuple[torch.Tensor | None, bool]] = []
    kernel = F.scaled_dot_product_attention

    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        # The plan times the kernel as well, and does not speak of masks.
        if "attn_mask" in options:
            calls.append((options["attn_mask"], options["is_causal"]))
        return kernel(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def test_attention_across_documents_needs_no_mask(folder: Path, attended: list[Any]) -> None:
    loaded, ids = teacher.load(folder, "fp32"), rows()
    hidden = loaded.hidden_states(ids)
    assert attended == [(None, True)] * 2
    with torch.no_grad():
        assert torch.equal(hidden, loaded.model.base_model(ids, use_cache=False).last_hidden_state)
        assert torch.equal(hidden, held_out.CausalModel(loaded.model).hidden_states(ids))


def test_one_mask_serves_all_blocks_and_models(folder: Path, attended: list[Any]) -> None:
    loaded, ids = teacher.load(folder, "fp32"), rows()
    documents = Documents(ids, EOS)
    loaded.hidden_states(ids, documents)
    with torch.no_grad():
        held_out.CausalModel(loaded.model).hidden_states(ids, documents)
    assert len(attended) == 4
    assert all(mask is documents.mask(torch.float32) and not is_causal for mask, is_causal in attended)


def test_a_teacher_with_a_window_is_refused_where_the_window_matters(tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**small(), num_key_value_heads=1, sliding_window=8)).save_pretrained(tmp_path)
    loaded = teacher.load(tmp_path, "fp32")
    loaded.check_documents(8)
    with pytest.raises(UserError, match=r"curriculum\.attention.* 8 tokens"):
        loaded.check_documents(9)


def test_the_recipe_key_decides_the_result_and_its_parts_have_it_too() -> None:
    causal = recipe.load("quickstart")
    document = recipe.load("quickstart", ["curriculum.attention=document"])
    assert causal.curriculum.attention == "causal"
    assert [change.key for change in differences(causal, document)] == ["curriculum.attention"]
    assert document.teacher_part().curriculum.attention == "document"
    assert document.baseline_part().curriculum.attention == "document"
    with pytest.raises(UserError, match=r"curriculum\.attention"):
        recipe.load("quickstart", ["curriculum.attention=sentence"])


RECIPE = """
[corpus]
made_megabytes = 0.1
[curriculum]
context_tokens = 48
heldout_fraction = 0.05
attention = "document"
[[curriculum.stages]]
name = "web"
corpus = "web"
take = "6KB"
unit = "sentence"
[teacher]
precision = "int8"
[teacher.train]
n_embd = 32
n_head = 2
n_layer = 1
vocab_size = 400
[student]
n_embd = 16
n_head = 2
n_layer = 1
[optimizer]
batch_tokens = 192
[engine]
ds_config = "cpu"
micro_batch_rows = 2
[evaluation]
points = 1
point_tokens = 256
heldout_tokens = 500
"""


class Run:
    """A tiny run, gone through in this process."""

    def __init__(self, folder: Path) -> None:
        self.recipe, self.directory = folder / "tiny.toml", RunDirectory(folder / "run")
        self.console = Console(silent=True)

    def resolve(self, *settings: str) -> recipe.Recipe:
        return commands.resolve(str(self.recipe), run_path=self.directory.path, settings=list(settings))[0]

    def train(self, hours: float | None = None) -> dict[str, torch.Tensor]:
        made = self.resolve()
        commands.prepare(made, self.directory, self.console)
        commands.plan(made, self.directory, self.console)
        commands.train(made, self.directory, self.console, hours)
        saved = newest(self.directory.checkpoints)
        assert saved is not None
        return saved.weights()

    def untrained(self, folder: Path) -> Run:
        """A copy from before the student was trained."""
        shutil.copytree(self.recipe.parent, folder)
        run = Run(folder)
        shutil.rmtree(run.directory.checkpoints)
        run.directory.ledger.unlink()
        return run


@pytest.fixture
def _signals() -> Iterator[None]:
    """A run in this process listens to signals; afterwards listens what did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_a_run_keeps_to_documents_through_training_restart_and_evaluation(tmp_path: Path, attended: list[Any]) -> None:
    def all_masked() -> bool:
        """Whether every call since the last question had a mask."""
        masked = {mask is not None and not is_causal for mask, is_causal in attended}
        attended.clear()
        assert len(masked) == 1, "some with, some without, or none at all"
        return masked.pop()

    (tmp_path / "whole").mkdir()
    run = Run(tmp_path / "whole")
    run.recipe.write_text(RECIPE, encoding="utf-8")
    weights = run.train()
    assert all_masked()
    with pytest.raises(UserError, match=r"curriculum\.attention: document → causal"):
        run.resolve("curriculum.attention=causal")

    stopped = run.untrained(tmp_path / "stopped")
    stopped.train(hours=1e-6)
    resumed = stopped.train()
    assert [session.reason for session in sessions(stopped.directory.ledger)] == ["deadline", "done"]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert all_masked()

    evaluation.evaluate(run.resolve(), run.directory, run.console)
    assert all_masked()

    across = run.untrained(tmp_path / "across")
    text = across.directory.recipe.read_text(encoding="utf-8")
    across.directory.recipe.write_text(text.replace('"document"', '"causal"'), encoding="utf-8")
    assert not all(torch.equal(value, weights[name]) for name, value in across.train().items())
    assert not all_masked()
    evaluation.evaluate(across.resolve(), across.directory, across.console)
    assert not all_masked()
