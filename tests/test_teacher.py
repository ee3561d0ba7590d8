"""The teacher: bitsandbytes' own 8-bit layers, close to full precision, and faults that name the folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from daramgpt import teacher
from daramgpt.errors import UserError

VOCAB = 300
# Nats a token between 8-bit blocks and fp32 on the random models below: measured 2e-4 and 5e-4, while scales that are
# wrong by 5 % give 6e-3 and 9e-3.
KL_BOUND = 1e-3


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=64, n_head=2, n_layer=2, initializer_range=0.15)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["gpt2", "llama"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    model = request.param().eval()
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpt2().save_pretrained(tmp_path)
    return tmp_path


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not name.endswith("lm_head"):
            yield name, module


def log_probabilities(loaded: teacher.Teacher, ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(F.linear(loaded.hidden_states(ids), loaded.head_weight, loaded.head_bias), -1)


@pytest.mark.parametrize("precision", teacher.EIGHT_BIT)
def test_the_blocks_are_bitsandbytes_own_8_bit_layers(saved: tuple[Path, PreTrainedModel], precision: str) -> None:
    folder, original = saved
    loaded = teacher.load(folder, precision)
    layers = dict(loaded.model.named_modules())
    expected = list(linears(original))
    assert len(expected) >= 8
    for name, module in expected:
        layer = layers[name]
        assert isinstance(layer, bnb.nn.Linear8bitLt)
        assert isinstance(layer.weight, bnb.nn.Int8Params)
        assert layer.weight.dtype == torch.int8
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert layer.weight.shape == weight.shape == (layer.out_features, layer.in_features)
        assert layer.weight.SCB.dtype == torch.float32
        dequantised = layer.weight.data * layer.weight.SCB[:, None] / 127
        # Half a step of each row, and the rounding to fp16 that bitsandbytes does first: 127 / 2^11 of a step.
        steps = (dequantised - weight.detach()).abs() * 127 / layer.weight.SCB[:, None]
        assert float(steps.max()) <= 0.5 + 127 / 2**11
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("precision", teacher.EIGHT_BIT)
def test_the_head_the_embeddings_and_the_norms_are_not_quantised(
    saved: tuple[Path, PreTrainedModel], precision: str
) -> None:
    folder, original = saved
    loaded = teacher.load(folder, precision)
    assert torch.equal(loaded.head_weight, original.get_output_embeddings().weight)
    assert torch.equal(loaded.model.get_input_embeddings().weight.data, original.get_input_embeddings().weight.data)
    held = {parameter.dtype for name, parameter in loaded.model.named_parameters() if "norm" in name or "ln_" in name}
    assert held == {torch.float32}


@pytest.mark.parametrize("precision", teacher.EIGHT_BIT)
def test_hidden_states_stay_close_to_full_precision(saved: tuple[Path, PreTrainedModel], precision: str) -> None:
    folder, original = saved
    ids = torch.randint(VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    full = teacher.load(folder, "fp32")
    exact = log_probabilities(full, ids)
    torch.testing.assert_close(exact, F.log_softmax(original(ids).logits, -1).detach(), atol=1e-4, rtol=1e-4)
    # The model is far from uniform, else any teacher would be close.
    assert math.log(VOCAB) + float((exact.exp() * exact).sum(-1).mean()) > 0.3
    close = log_probabilities(teacher.load(folder, precision), ids)
    kl = float((exact.exp() * (exact - close)).sum(-1).mean())
    assert 0 < kl < KL_BOUND


def test_what_it_weighs(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, original = saved
    full, small = teacher.load(folder, "fp32"), teacher.load(folder, "int8")
    assert full.num_parameters == small.num_parameters == original.num_parameters()
    assert full.weight_bytes == 4 * original.num_parameters()
    weights = [module.weight for _, module in linears(original)]
    rows = sum(layer.out_features for layer in small.model.modules() if isinstance(layer, bnb.nn.Linear8bitLt))
    assert small.weight_bytes == full.weight_bytes - 3 * sum(weight.numel() for weight in weights) + 4 * rows
    assert full.max_positions == teacher.max_positions(folder) == 32


def test_hidden_states_have_no_graph(folder: Path) -> None:
    hidden = teacher.load(folder, "int8").hidden_states(torch.zeros(2, 5, dtype=torch.long))
    assert hidden.shape == (2, 5, 64) and not hidden.requires_grad


def test_a_precision_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.precision: int7"):
        teacher.load(folder, "int7")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        teacher.load(folder, "fp32")
    assert str(folder) in caught.value.fault
    return caught.value.fault


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    for find in (lambda: teacher.resolve(str(tmp_path)), lambda: teacher.max_positions(tmp_path)):
        with pytest.raises(UserError, match=r"config\.json"):
            find()
    refused(tmp_path)


def test_a_local_folder_is_its_own_and_a_missing_one_is_refused(folder: Path) -> None:
    assert teacher.resolve(str(folder)) == folder
    for missing in ("./missing", "/no/where", "plainname", "a/b/c"):
        with pytest.raises(UserError, match=f'no folder "{missing}"'):
            teacher.resolve(missing)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "transformer.h.0.mlp.c_fc.weight"
    # transformers would start it at random.
    save_file({key: value for key, value in whole.items() if key != name}, file, metadata={"format": "pt"})
    assert name in refused(folder)
    save_file({**whole, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    refused(folder)
    save_file(whole, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder)
    file.write_bytes(b"")
    refused(folder)
    file.unlink()
    assert "model.safetensors" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    refused(folder)
    (folder / "config.json").write_text("{}")
    refused(folder)
