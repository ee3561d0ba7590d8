"""Recipes: faults are named with the nearest key, overrides are TOML, and what is written is read back equal."""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daramgpt import recipe
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe

SHORT = """
[[curriculum.stages]]
name = "wiki"
corpus = "wiki"
take = "1MB"
unit = "sentence"

[teacher]
model = "somewhere"
"""


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(source, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_of_the_package_loads(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert [stage.name for stage in loaded.curriculum.stages] == ["web-1", "unpublished", "web-2", "wiki", "written"]


def test_the_full_recipe_is_the_reference_run() -> None:
    full = recipe.load("daramgpt")
    assert sum(stage.take for stage in full.curriculum.stages) == 8_120_000_000
    assert (full.student.n_embd, full.student.n_head, full.student.n_layer) == (768, 8, 4)
    assert full.loss.kd_weight / full.loss.ce_weight == 10.0
    assert [stage.unit for stage in full.curriculum.stages] == ["sentence"] * 4 + ["paragraph"]


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("student.n_embed=64", "student.n_embed", "n_embd"),
        ("studnet.n_embd=64", "studnet", "student"),
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "learning_rate"),
        ("teacher.train.vocabsize=5000", "teacher.train.vocabsize", "vocab_size"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(override: str, key: str, near: str) -> None:
    text = refused("quickstart", override)
    assert f'unknown key "{key}"; did you mean "{near}"?' in text


def test_a_misspelt_key_of_a_stage_is_named_with_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SHORT.replace("unit =", "units ="), encoding="utf-8")
    text = refused(str(file))
    assert str(file) in text and 'unknown key "curriculum.stages.0.units"; did you mean "unit"?' in text


def test_a_key_like_no_other_is_refused_with_all_that_exist() -> None:
    assert "clip_norm" in refused("quickstart", "optimizer.zzzzz=1")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("student.n_embd=wide", "student.n_embd"),
        ("student.n_embd=100.5", "student.n_embd"),
        ("student.n_head=7", "student"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate"),
        ("budget.budget_hours=nan", "budget.budget_hours"),
        ("teacher.precision=int7", "teacher.precision"),
        ("teacher=5", "teacher"),
        ("curriculum.stages=[]", "curriculum.stages"),
        ("checkpoint.keep=1", "checkpoint.keep"),
        ("name=a/b", "name"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(override: str, key: str) -> None:
    assert f": {key}: " in refused("quickstart", override)


@pytest.mark.parametrize("size", ["600 XB", "MB", "-3MB", "1e3MB", "0.1B"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SHORT.replace("1MB", size), encoding="utf-8")
    assert "curriculum.stages.0.take" in refused(str(file))


@pytest.mark.parametrize(
    ("size", "number"),
    [("600MB", 600_000_000), ("1.5 kb", 1_500), ("8.12GB", 8_120_000_000), ("0.29GB", 290_000_000), (12, 12)],
)
def test_sizes(size: Any, number: int) -> None:
    assert recipe.parse_bytes(size) == number


def test_an_unknown_recipe_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    assert "daramgpt, quickstart" in refused("quickstrat")
    missing = str(tmp_path / "none.toml")
    assert missing in refused(missing)


def test_broken_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SHORT + "\nseed = = 3\n", encoding="utf-8")
    text = refused(str(file))
    assert str(file) in text and "line 11" in text
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refused(str(file))


def test_faults_across_keys_are_refused() -> None:
    assert "teacher" in refused("daramgpt", "teacher.train.vocab_size=500", "teacher.train.n_embd=64")
    stage = '{name="a", corpus="web", take=5, unit="sentence"}'
    assert "one name: a, a" in refused("quickstart", f"curriculum.stages=[{stage}, {stage}]")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("student.n_embd = 64", ("student", "n_embd"), 64),
        ("corpus.dir=../corpora", ("corpus", "dir"), "../corpora"),
        ('corpus.dir="a = b"', ("corpus", "dir"), "a = b"),
        ("corpus.dir=a=b", ("corpus", "dir"), "a=b"),
        ("corpus.strict=true", ("corpus", "strict"), True),
        ("optimizer.learning_rate=1e-3", ("optimizer", "learning_rate"), 1e-3),
        ('evaluation.prompts=["가", "나"]', ("evaluation", "prompts"), ("가", "나")),
        ("corpus.formats.my=wiki", ("corpus", "formats"), {"my": "wiki"}),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], value: Any) -> None:
    found: Any = recipe.load("quickstart", [override])
    for name in path:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("override", ["seed", "=3", "name.deep=3", "curriculum.stages.name=x"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    assert override.split("=")[0] in refused("quickstart", override)


def test_naming_a_teacher_replaces_the_one_the_recipe_would_train() -> None:
    teacher = recipe.load("quickstart", ["teacher.model=./mine"]).teacher
    assert teacher is not None and teacher.model == "./mine" and teacher.train is None


def test_the_parts_are_plain_cross_entropy_with_the_same_schedule() -> None:
    whole = recipe.load("quickstart", ["teacher.train.passes=3"])
    teacher, baseline = whole.teacher_part(), whole.baseline_part()
    assert whole.teacher is not None and whole.teacher.train is not None
    for part in (teacher, baseline):
        assert part.teacher is None and part.loss.kd_weight == 0 and part.loss.ce_weight == 1
        assert part.schedule == whole.schedule and part.seed == whole.seed
    assert baseline.student == whole.student
    assert baseline.optimizer == whole.optimizer and baseline.curriculum == whole.curriculum
    assert teacher.student.n_embd == whole.teacher.train.n_embd
    assert teacher.curriculum.passes == 3
    assert teacher.optimizer.learning_rate == whole.teacher.train.learning_rate


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PATH = TEXT.filter(lambda text: "\0" not in text and not text.startswith("~"))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    names = draw(
        st.lists(st.from_regex(r"[a-z0-9][a-z0-9-]{0,5}", fullmatch=True), min_size=1, max_size=3, unique=True)
    )
    number = st.floats(1e-9, 1e9)
    heads = draw(st.integers(1, 16))
    data: dict[str, Any] = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "corpus": {"dir": draw(st.none() | PATH), "formats": draw(st.dictionaries(TEXT, TEXT, max_size=3))},
        "curriculum": {
            "scale": draw(number),
            "stages": [
                {"name": name, "corpus": "web", "take": draw(st.integers(1, 10**12)), "unit": "sentence"}
                for name in names
            ],
        },
        "teacher": draw(
            st.one_of(
                st.fixed_dictionaries({"model": PATH}, optional={"revision": TEXT}),
                st.just({"train": {"vocab_size": 1000, "n_embd": 64, "n_head": 4}}),
            )
        ),
        "student": {"n_head": heads, "n_embd": heads * draw(st.integers(8, 64))},
        "optimizer": {"learning_rate": draw(number), "epsilon": draw(number)},
        "evaluation": {"prompts": draw(st.lists(TEXT, max_size=3)), "baseline": draw(st.booleans())},
    }
    return recipe.validate(data, "here")


@settings(max_examples=30, deadline=None)
@given(recipes())
def test_what_is_written_is_read_back_equal(original: Recipe) -> None:
    text = recipe.dump(original)
    tomllib.loads(text)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        again = recipe.load(str(file))
    assert again == original
    assert recipe.dump(again) == text


@settings(max_examples=30, deadline=None)
@given(TEXT)
def test_no_override_gives_a_traceback(override: str) -> None:
    for text in (override, f"{override}=1", f"student.{override}", f"seed={override}", f"corpus.dir={override}"):
        with contextlib.suppress(UserError):
            recipe.load("quickstart", [text])


def test_the_kinds_of_optimizer() -> None:
    for kind in ("adamw", "adamw-8bit", "deepspeed-cpu-adam"):
        assert recipe.load("quickstart", [f"optimizer.kind={kind}"]).optimizer.kind == kind
    with pytest.raises(UserError, match=r"optimizer\.kind.*adamw-8bit"):
        recipe.load("quickstart", ["optimizer.kind=adam-8bit"])


def test_the_loss_is_named_for_people() -> None:
    formulas = [recipe.Loss(divergence=kind).formula for kind in ("forward-kl", "reverse-kl", "jsd", "skew-kl")]
    assert formulas == [
        f"1 · T² · {divergence} at T = 2, + 0.1 · cross-entropy"
        for divergence in (
            "KL(teacher ‖ student)",
            "KL(student ‖ teacher)",
            "JSD(teacher, student; β = 0.5)",
            "KL(teacher ‖ 0.1 · teacher + 0.9 · student)",
        )
    ]
