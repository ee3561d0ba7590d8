"""The fused head against its plain reference: values, gradients, and what must not count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from daramgpt.engine import objective_of
from daramgpt.losses import (
    DIVERGENCES,
    DistillationHead,
    Objective,
    Workspace,
    compiled,
    distillation_loss,
    distillation_loss_reference,
    softmax,
    weight_gradient,
)
from daramgpt.losses import (
    fused as fused_module,
)
from daramgpt.losses.divergences import normal_exponential
from daramgpt.losses.objective import Divergence
from daramgpt.recipe import Loss

N, V, D, DT = 37, 211, 16, 24


@pytest.fixture
def case() -> dict[str, Tensor]:
    """Hidden states and heads of two widths in fp64, labels with ignored ones among them."""
    torch.manual_seed(0)
    labels = torch.randint(V, (N,))
    labels[[0, 5, 6, 36]] = -100
    return {
        "student_hidden": torch.randn(N, D, dtype=torch.float64),
        "student_weight": torch.randn(V, D, dtype=torch.float64) / 2,
        "teacher_hidden": torch.randn(N, DT, dtype=torch.float64),
        "teacher_weight": torch.randn(V, DT, dtype=torch.float64) / 2,
        "teacher_bias": torch.randn(V, dtype=torch.float64),
        "labels": labels,
    }


@pytest.fixture
def row_kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, and in blocks of three rows."""
    monkeypatch.setattr(softmax, "_has_row_kernels", lambda device: True)
    monkeypatch.setattr(softmax, "CPU_BLOCK_ELEMENTS", 3 * V)


def reference(case: dict[str, Tensor], objective: Objective, with_teacher: bool = True) -> list[Tensor]:
    """loss, kd, ce, gradient of the hidden states, gradient of the weight: plain, fp64."""
    hidden, weight = (case[name].double().clone().requires_grad_() for name in ("student_hidden", "student_weight"))
    teacher_logits = case["teacher_hidden"].double() @ case["teacher_weight"].double().T + case["teacher_bias"].double()
    kd, ce = distillation_loss_reference(
        hidden @ weight.T, teacher_logits if with_teacher else None, case["labels"], objective
    )
    loss = objective.kd_weight * kd + objective.ce_weight * ce
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), kd.detach(), ce.detach(), hidden.grad, weight.grad]


def fused(
    case: dict[str, Tensor],
    objective: Objective,
    with_teacher: bool = True,
    chunk_tokens: int = 8,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    is_compiled: bool = False,
) -> list[Tensor]:
    """The same by the fused head in `dtype`."""
    hidden, weight = (case[name].to(dtype).clone().requires_grad_() for name in ("student_hidden", "student_weight"))
    teacher = [case[f"teacher_{part}"].to(dtype) for part in ("hidden", "weight", "bias")] if with_teacher else []
    loss, kd, ce = distillation_loss(
        hidden,
        weight,
        case["labels"],
        *teacher,
        objective=objective,
        chunk_tokens=chunk_tokens,
        is_compiled=is_compiled,
    )
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), kd, ce, hidden.grad, weight.grad]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("loss", "kd", "ce", "grad hidden", "grad weight"), found, expected, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{name}: {error:.2e}"


OBJECTIVES = [
    Objective(temperature, 0.7, 0.3, divergence, beta, alpha)
    for divergence in DIVERGENCES
    for temperature, beta, alpha in [(1.0, 0.5, 0.1), (2.0, 0.1, 0.5), (1.7, 0.9, 0.01)]
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.divergence}-{o.temperature}")
@pytest.mark.parametrize("chunk_tokens", [8, 1000])
def test_value_and_gradient_match_fp64(
    case: dict[str, Tensor], objective: Objective, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of a few rows, and a ragged one.
    monkeypatch.setattr(softmax, "CPU_BLOCK_ELEMENTS", 3 * V)
    assert_close(fused(case, objective, chunk_tokens=chunk_tokens), reference(case, objective), 1e-5)
    assert_close(
        fused(case, objective, chunk_tokens=chunk_tokens, dtype=torch.float64), reference(case, objective), 1e-12
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_row_kernels_match_fp64(
    case: dict[str, Tensor],
    temperature: float,
    weights: tuple[float, float],
    with_teacher: bool,
    row_kernels_everywhere: None,
) -> None:
    """What a GPU computes, in blocks of a few rows, and a ragged one."""
    objective = Objective(temperature, *weights)
    if not with_teacher:
        objective = Objective(temperature, 0.0, 1.0)
    expected = reference(case, objective, with_teacher)
    assert_close(fused(case, objective, with_teacher), expected, 1e-5)
    assert_close(fused(case, objective, with_teacher, dtype=torch.float64), expected, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
def test_row_kernels_bear_low_precision_and_underflow(
    case: dict[str, Tensor], temperature: float, row_kernels_everywhere: None
) -> None:
    objective = Objective(temperature)
    rounded = {n: tensor.bfloat16() if tensor.is_floating_point() else tensor for n, tensor in case.items()}
    assert_close(fused(case, objective, dtype=torch.bfloat16), reference(rounded, objective), 3e-2)
    apart = {**case, **{n: (40 * case[n]).float().double() for n in ("student_hidden", "teacher_hidden")}}
    assert_close(fused(apart, objective), reference(apart, objective), 3e-5)


@pytest.fixture
def formulas_of_the_compiled_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they stand, without a compiler, and in blocks of three rows."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(softmax, "COMPILED_BLOCK_ELEMENTS", 3 * V)
    caches = (compiled._kernel, weight_gradient._compiled)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.divergence}-{o.temperature}")
def test_formulas_of_the_compiled_form_match_fp64(
    case: dict[str, Tensor], objective: Objective, formulas_of_the_compiled_form: None
) -> None:
    expected = reference(case, objective)
    assert_close(fused(case, objective, is_compiled=True), expected, 1e-5)
    assert_close(fused(case, objective, dtype=torch.float64, is_compiled=True), expected, 1e-12)
    rounded = {n: tensor.bfloat16() if tensor.is_floating_point() else tensor for n, tensor in case.items()}
    found = fused(case, objective, dtype=torch.bfloat16, is_compiled=True)
    assert_close(found, reference(rounded, objective), 3e-2)
    alone = Objective(objective.temperature, 0.0, 1.0)
    assert_close(fused(case, alone, False, is_compiled=True), reference(case, alone, False), 1e-5)


@pytest.mark.skipif("DARAMGPT_COMPILE" not in os.environ, reason="compiles for a minute; set DARAMGPT_COMPILE=1")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_form_matches_fp64(
    case: dict[str, Tensor], divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows at a time, and a ragged block: two shapes of one kernel."""
    monkeypatch.setattr(softmax, "COMPILED_BLOCK_ELEMENTS", 3 * V)
    torch.compiler.reset()
    objective = Objective(divergence=divergence)
    assert_close(fused(case, objective, is_compiled=True), reference(case, objective), 1e-5)
    rounded = {n: tensor.bfloat16() if tensor.is_floating_point() else tensor for n, tensor in case.items()}
    found = fused(case, objective, dtype=torch.bfloat16, is_compiled=True)
    assert_close(found, reference(rounded, objective), 3e-2)
    # A part of the run may train without a teacher.
    alone = Objective(1.0, 0.0, 1.0)
    assert_close(fused(case, alone, False, is_compiled=True), reference(case, alone, False), 1e-5)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5])
def test_low_precision_gradient_of_the_weight_is_summed_in_fp32(num_chunks: int) -> None:
    """Whatever the number of chunks: from the third on the sum is kept the other way round."""
    torch.manual_seed(0)
    workspace, shape = Workspace(), torch.Size((V, D))
    total = weight_gradient.WeightGradient(shape, torch.bfloat16, torch.device("cpu"), num_chunks, workspace)
    expected = torch.zeros(shape, dtype=torch.float64)
    for _ in range(num_chunks):
        gradient, hidden = torch.randn(8, V).bfloat16(), torch.randn(8, D).bfloat16()
        total.add(gradient, hidden)
        # Each product is rounded once.
        expected += (gradient.float().T @ hidden.float()).bfloat16().double()
    found = total.scaled(torch.tensor(0.37))
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    torch.testing.assert_close(found, (0.37 * expected).bfloat16(), rtol=2**-7, atol=1e-6)
    assert (found.double() - 0.37 * expected).norm() / (0.37 * expected).norm() < 2e-3


def test_a_second_forward_before_the_first_backward_has_a_sum_of_its_own(case: dict[str, Tensor]) -> None:
    """The sum of a low-precision gradient is a buffer that calls share, one after the other."""
    weight = torch.nn.Parameter(case["student_weight"].bfloat16())
    head = DistillationHead(weight, objective=Objective(1.0, 0.0, 1.0), chunk_tokens=8)
    hidden, labels = case["student_hidden"].bfloat16(), case["labels"]

    def gradient(rows: slice) -> Tensor:
        weight.grad = None
        head(hidden[rows], labels[rows])[0].backward()
        assert weight.grad is not None
        return weight.grad

    parts = [slice(0, 20), slice(20, N)]
    expected = [gradient(rows) for rows in parts]
    held = head.workspace.num_bytes
    losses = [head(hidden[rows], labels[rows])[0] for rows in parts]
    for loss, value in zip(losses, expected, strict=True):
        weight.grad = None
        loss.backward()
        assert weight.grad is not None and torch.equal(weight.grad, value)
    assert head.workspace.num_bytes == held


def test_realistic_vocabulary_matches_fp64() -> None:
    """512 tokens of a large vocabulary: more rows than one block of the softmax arithmetic, a ragged last one."""
    torch.manual_seed(1)
    labels = torch.randint(20_000, (509,))
    labels[::17] = -100
    case = {
        "student_hidden": torch.randn(509, 32),
        "student_weight": torch.randn(20_000, 32) / 3,
        "teacher_hidden": torch.randn(509, 48),
        "teacher_weight": torch.randn(20_000, 48) / 3,
        "teacher_bias": torch.zeros(20_000),
        "labels": labels,
    }
    assert_close(fused(case, Objective(), chunk_tokens=200), reference(case, Objective()), 1e-5)


WEIGHTS = [(2.0, 0.0, 1.0), (2.0, 1.0, 0.0), (1.0, 1.0, 0.0)]


@pytest.mark.parametrize("objective", [Objective(*w, divergence=d) for w in WEIGHTS for d in DIVERGENCES], ids=str)
def test_a_weight_of_zero_leaves_its_term_out_of_the_loss_but_reports_it(
    case: dict[str, Tensor], objective: Objective
) -> None:
    found = fused(case, objective)
    assert_close(found, reference(case, objective), 1e-5)
    assert found[1] > 0 and found[2] > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_a_teacher_it_is_cross_entropy(case: dict[str, Tensor], temperature: float) -> None:
    objective = Objective(temperature, kd_weight=0.0, ce_weight=1.0)
    found = fused(case, objective, with_teacher=False)
    assert_close(found, reference(case, objective, with_teacher=False), 1e-5)
    plain = torch.nn.functional.cross_entropy(
        case["student_hidden"] @ case["student_weight"].T, case["labels"], reduction="sum"
    )
    torch.testing.assert_close(found[2].double(), plain, rtol=1e-6, atol=0)
    assert found[1] == 0


def test_ignored_tokens_change_nothing(case: dict[str, Tensor]) -> None:
    kept = case["labels"] != -100
    only = {
        name: tensor[kept] if name in ("student_hidden", "teacher_hidden", "labels") else tensor
        for name, tensor in case.items()
    }
    with_ignored, without = (fused(c, Objective(), dtype=torch.float64) for c in (case, only))
    assert not with_ignored[3][~kept].any()
    with_ignored[3] = with_ignored[3][kept]
    assert_close(with_ignored, without, 1e-12)


@pytest.mark.parametrize("num_tokens", [N, 0])
def test_no_targets_at_all_give_zeros(case: dict[str, Tensor], num_tokens: int) -> None:
    case["labels"] = torch.full((num_tokens,), -100)
    for name in ("student_hidden", "teacher_hidden"):
        case[name] = case[name][:num_tokens]
    assert not any(tensor.any() for tensor in fused(case, Objective()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_the_derivative_of_the_value(case: dict[str, Tensor], divergence: Divergence) -> None:
    """Central differences in fp64, coordinate by coordinate, on a tiny case."""
    objective = Objective(1.5, 1.0, 0.4, divergence)
    tiny = {
        name: tensor[:3] if name in ("student_hidden", "teacher_hidden", "labels") else tensor[:7]
        for name, tensor in case.items()
    }
    tiny["labels"] = torch.tensor([4, -100, 6])
    _, _, _, *gradients = fused(tiny, objective, chunk_tokens=2, dtype=torch.float64)
    value: Callable[[], float] = lambda: fused(tiny, objective, chunk_tokens=2, dtype=torch.float64)[0].item()  # noqa: E731
    for name, gradient in zip(("student_hidden", "student_weight"), gradients, strict=True):
        numeric = torch.empty_like(gradient)
        for i in range(gradient.numel()):
            flat, original = tiny[name].view(-1), tiny[name].view(-1)[i].item()
            flat[i] = original + 1e-6
            above = value()
            flat[i] = original - 1e-6
            numeric.view(-1)[i] = (above - value()) / 2e-6
            flat[i] = original
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_is_zero_when_student_and_teacher_agree(case: dict[str, Tensor], divergence: Divergence) -> None:
    hidden, weight = case["student_hidden"].float().requires_grad_(), case["student_weight"].float()
    loss, kd, ce = distillation_loss(
        hidden, weight, case["labels"], hidden, weight, objective=Objective(2.0, 1.0, 0.0, divergence), chunk_tokens=8
    )
    loss.backward()
    assert abs(kd.item()) < 1e-4 * ce.item()
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-5


def test_divergences_are_those_of_their_papers() -> None:
    """Worked by hand for p = (1/2, 1/2), q = (1/4, 3/4)."""
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    def kd(divergence: Divergence, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
        eye = torch.eye(2, dtype=torch.float64)
        objective = Objective(1.0, 1.0, 0.0, divergence, beta, alpha)
        return distillation_loss(
            q.log().unsqueeze(0), eye, torch.tensor([0]), p.log().unsqueeze(0), eye, objective=objective
        )[1]

    expected = {
        kd("forward-kl"): kl(p, q),
        kd("reverse-kl"): kl(q, p),
        kd("jsd", beta=0.2): 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q),
        kd("skew-kl", alpha=0.3): kl(p, 0.3 * p + 0.7 * q),
        # The limits of GKD's convention.
        kd("jsd", beta=1e-6) / 1e-6: kl(p, q),
        kd("jsd", beta=1 - 1e-6) / 1e-6: kl(q, p),
    }
    for found, value in expected.items():
        torch.testing.assert_close(found, value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.divergence}-{o.temperature}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_underflow_do_no_harm(
    case: dict[str, Tensor], objective: Objective, dtype: torch.dtype
) -> None:
    """Logits hundreds apart, and of both models at different tokens: fp32 has no such probabilities."""
    case = {**case, **{n: (40 * case[n]).to(dtype).double() for n in ("student_hidden", "teacher_hidden")}}
    found = fused(case, objective, dtype=dtype)
    assert all(tensor.isfinite().all() for tensor in found)
    # bf16 rounds logits of hundreds to even numbers.
    if dtype == torch.float32:
        assert_close(found, reference(case, objective), 3e-5)


def test_logits_of_a_product_that_is_not_rounded(case: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product with an fp32 result gives bf16 hidden states: the error of their gradient's rounding alone."""
    product = torch.mm

    def wide_product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        result = product(a, b) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))
        return result if out is None else out.copy_(result)

    rounded = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in case.items()}
    expected = reference(rounded, Objective())
    narrow = fused(case, Objective(), dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "mm", wide_product)
    for module in (fused_module, weight_gradient):
        monkeypatch.setattr(module, "has_wide_products", lambda device_type, dtype: True)
    wide = fused(case, Objective(), dtype=torch.bfloat16)
    for found, value in zip(wide[:3], expected[:3], strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=0)
    assert_close(wide, expected, 5e-3)
    assert abs(narrow[0] - expected[0]) > 10 * abs(wide[0] - expected[0])


def test_scaling_rounds_no_factor(case: dict[str, Tensor]) -> None:
    """bf16 takes 77.3 for 77.5: a bias that every gradient would share."""
    factor = 77.3
    one, scaled = (fused(case, Objective(), dtype=torch.bfloat16, scale=scale) for scale in (1.0, factor))
    for index in (3, 4):
        ratio = scaled[index].double().norm() / one[index].double().norm()
        assert abs(ratio / factor - 1) < 1e-3


@pytest.mark.parametrize(
    "setting", [{"jsd_beta": 0.0}, {"jsd_beta": 1.0}, {"skew_alpha": 1.5}, {"divergence": "kl"}, {"temperature": 0.0}]
)
def test_recipe_refuses_what_no_divergence_has(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        Loss.model_validate(setting)


def test_recipe_and_objective_know_the_same_divergences_and_defaults() -> None:
    for divergence in DIVERGENCES:
        assert objective_of(Loss(divergence=divergence)) == Objective(divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_improbable_tokens_give_no_number_below_the_normal_ones(
    case: dict[str, Tensor], divergence: Divergence
) -> None:
    """MKL takes twenty times as long for an exponential of -95 as for one of -80."""
    objective = Objective(1.0, 1.0, 0.0, divergence)
    assert normal_exponential(torch.tensor([-95.0, -1e6])).ge(torch.finfo(torch.float32).tiny).all()
    far = {**case, "student_hidden": 30 * case["student_hidden"]}
    logits = far["student_hidden"] @ far["student_weight"].T
    assert (logits.amax(1) - logits.amin(1)).max() > 95
    assert_close(fused(far, objective), reference(far, objective), 3e-5)


def test_temperature_squared_keeps_the_size_of_the_gradient(case: dict[str, Tensor]) -> None:
    """Without T² the gradient would shrink by about T² = 16 from T = 1 to T = 4."""
    norms = [fused(case, Objective(temperature, 1.0, 0.0))[3].norm() for temperature in (1.0, 4.0)]
    assert 1 / 3 < norms[1] / norms[0] < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_rounding(case: dict[str, Tensor], dtype: torch.dtype) -> None:
    found = fused(case, Objective(), dtype=dtype)
    assert found[0].dtype == torch.float32 and found[3].dtype == found[4].dtype == dtype
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in case.items()}
    assert_close(found, reference(rounded, Objective()), 3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_loss_scale_carries_gradients_that_fp16_alone_would_lose(case: dict[str, Tensor]) -> None:
    """Divided by a large number of tokens the gradient underflows fp16; under a loss scale nothing is lost."""
    num_tokens, loss_scale = 1e7, 2.0**16
    rounded = {n: tensor.half() if tensor.is_floating_point() else tensor for n, tensor in case.items()}
    expected = reference(rounded, Objective())
    lost = fused(case, Objective(), dtype=torch.float16, scale=1 / num_tokens)
    kept = fused(case, Objective(), dtype=torch.float16, scale=loss_scale / num_tokens)
    unscaled = kept[4].double() * (num_tokens / loss_scale)
    assert (unscaled - expected[4]).norm() / expected[4].norm() < 1e-2
    assert (lost[4].double() * num_tokens - expected[4]).norm() / expected[4].norm() > 0.1


def test_tied_weight_gets_both_gradients(case: dict[str, Tensor]) -> None:
    """Embedding and head are one parameter: its gradient is the sum of both uses, also on a second micro-batch."""
    ids = torch.arange(N) % V

    def gradient(use_fused: bool) -> Tensor:
        embedding = torch.nn.Embedding.from_pretrained(case["student_weight"].float().clone(), freeze=False)
        head = DistillationHead(embedding.weight, chunk_tokens=8)
        assert head.weight is embedding.weight
        for _ in range(2):
            hidden = embedding(ids).tanh()
            teacher = [case[f"teacher_{part}"].float() for part in ("hidden", "weight", "bias")]
            if use_fused:
                loss = head(hidden, case["labels"], *teacher)[0]
            else:
                logits = teacher[0] @ teacher[1].T + teacher[2]
                kd, ce = distillation_loss_reference(hidden @ embedding.weight.T, logits, case["labels"], 2.0)
                loss = kd + 0.1 * ce
            (loss / 33).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


def test_a_second_call_leaves_the_first_gradient_alone(case: dict[str, Tensor]) -> None:
    weight = torch.nn.Parameter(case["student_weight"].float())
    head = DistillationHead(weight, objective=Objective(1.0, 0.0, 1.0), chunk_tokens=8)
    hidden = case["student_hidden"].float()
    first = head(hidden, case["labels"])[0]
    head(hidden * 3, case["labels"])
    first.backward()
    assert weight.grad is not None
    expected = fused(case, Objective(1.0, 0.0, 1.0), with_teacher=False)[4]
    torch.testing.assert_close(weight.grad, expected)


def test_evaluation_gives_the_values_alone(case: dict[str, Tensor]) -> None:
    head = DistillationHead(torch.nn.Parameter(case["student_weight"].float()), chunk_tokens=8)
    arguments = [case[n].float() for n in ("teacher_hidden", "teacher_weight", "teacher_bias")]
    with torch.inference_mode():
        inferred = head(case["student_hidden"].float(), case["labels"], *arguments)
    trained = head(case["student_hidden"].float(), case["labels"], *arguments)
    assert not inferred[0].requires_grad and trained[0].requires_grad and not trained[1].requires_grad
    for a, b in zip(inferred, trained, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=0)


def test_a_second_backward_is_refused(case: dict[str, Tensor]) -> None:
    weight = case["student_weight"].requires_grad_()
    loss, _, _ = distillation_loss(case["student_hidden"], weight, case["labels"], objective=Objective(1.0, 0.0, 1.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_memory_does_not_grow_with_the_tokens(case: dict[str, Tensor]) -> None:
    workspace, held = Workspace(), []
    for repeats in (1, 10):
        distillation_loss(
            case["student_hidden"].repeat(repeats, 1),
            case["student_weight"],
            case["labels"].repeat(repeats),
            case["teacher_hidden"].repeat(repeats, 1),
            case["teacher_weight"],
            objective=Objective(),
            chunk_tokens=16,
            workspace=workspace,
        )
        held.append(workspace.num_bytes)
    # Both models' logits of a chunk, and a block.
    assert held[0] == held[1] <= 3 * 16 * V * 8


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_student_and_teacher_may_compute_in_different_dtypes(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(33, 8, generator=generator)
    teacher_hidden, teacher_weight = torch.randn(9, 12, generator=generator), torch.randn(33, 12, generator=generator)
    labels = torch.randint(33, (9,), generator=generator)
    student = [tensor.to(student_dtype).requires_grad_() for tensor in (hidden, weight)]
    teacher = [tensor.to(teacher_dtype) for tensor in (teacher_hidden, teacher_weight)]
    loss, _, _ = distillation_loss(*student, labels, *teacher, objective=Objective(), chunk_tokens=4)
    loss.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    wide_teacher = [tensor.double() for tensor in teacher]
    kd, ce = distillation_loss_reference(
        exact[0] @ exact[1].T, wide_teacher[0] @ wide_teacher[1].T, labels, Objective().temperature
    )
    (kd + Objective().ce_weight * ce).backward()
    assert loss.item() == pytest.approx((kd + Objective().ce_weight * ce).item(), rel=1e-2)
    for given, wanted in zip(student, exact, strict=True):
        assert given.grad is not None and wanted.grad is not None
        assert (given.grad.double() - wanted.grad).norm() < 2e-2 * wanted.grad.norm()
