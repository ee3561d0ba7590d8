"""The teacher: bitsandbytes' own 8-bit layers, close to full precision, and faults that name the folder."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from daramgpt import teacher
from daramgpt.attention import Documents
from daramgpt.errors import UserError
from daramgpt.teacher.quantised import four_bit_linear

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


SHAPE: dict[str, float] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))


ARCHITECTURES = {"gpt2": gpt2, "llama": llama, "gpt-neox": gpt_neox}


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
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
        if isinstance(module, (nn.Linear, Conv1D)) and not name.endswith(("lm_head", "embed_out")):
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
        # The first LLM.int8 product moves the scales to the layer's state.
        scales = layer.weight.SCB if precision == "int8" else layer.state.SCB
        assert scales.dtype == torch.float32
        dequantised = layer.weight.data * scales[:, None] / 127
        # Half a step of each row, and the rounding to fp16 that bitsandbytes does first: 127 / 2^11 of a step.
        steps = (dequantised - weight.detach()).abs() * 127 / scales[:, None]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_model_that_transformers_loads(
    tmp_path: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    model = ARCHITECTURES[architecture]()
    # A head of its own, or the embedding, whatever the architecture has by default.
    model.config.tie_word_embeddings = tied
    type(model)(model.config).to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa").eval()
    if architecture == "gpt2":
        for block in expected.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    loaded = teacher.load(tmp_path, "fp32")
    ids = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded.hidden_states(ids), expected.base_model(ids).last_hidden_state)
    assert torch.equal(loaded.head_weight, expected.get_output_embeddings().weight)
    is_shared = loaded.head_weight.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    assert is_shared == tied
    small = teacher.load(tmp_path, "int8")
    assert small.num_parameters == loaded.num_parameters
    assert (small.head_weight.data_ptr() == small.model.get_input_embeddings().weight.data_ptr()) == tied


def test_a_file_without_the_prefix_and_with_old_buffers_loads(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    old = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    ids = torch.arange(16).reshape(2, 8)
    for precision in ("fp32", "int8", "nf4"):
        save_file(whole, file, metadata={"format": "pt"})
        expected = teacher.load(folder, precision).hidden_states(ids)
        save_file(old, file, metadata={"format": "pt"})
        assert torch.equal(teacher.load(folder, precision).hidden_states(ids), expected)


@pytest.mark.parametrize("precision", teacher.QUANTISED)
def test_what_is_not_quantised_has_the_compute_dtype_and_norms_keep_fp32(
    saved: tuple[Path, PreTrainedModel], precision: str
) -> None:
    loaded = teacher.load(saved[0], precision, torch.float16)
    for module in loaded.model.modules():
        is_norm = "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, (bnb.nn.Int8Params, bnb.nn.Params4bit)):
                assert parameter.dtype == (torch.float32 if is_norm else torch.float16)
    frequencies = [buffer for name, buffer in loaded.model.named_buffers() if name.endswith("inv_freq")]
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say which files are mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_teacher_does_not_keep_its_file_mapped(folder: Path, dtype: torch.dtype) -> None:
    loaded = teacher.load(folder, "int8", dtype)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert loaded.weight_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", teacher.QUANTISED)
def test_the_residual_stream_is_fp32_and_products_are_not(
    saved: tuple[Path, PreTrainedModel], precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = teacher.load(saved[0], precision, dtype)
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "product": set(), "attention": set()}

    def note(kind: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, arguments: seen[kind].add(arguments[0].dtype)

    for module in loaded.model.base_model.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(note("stream"))
        elif isinstance(module, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)):
            module.register_forward_pre_hook(note("product"))
    attend = F.scaled_dot_product_attention

    def noting_attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen["attention"].update(tensor.dtype for tensor in tensors)
        return attend(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting_attend)
    ids = torch.arange(32).reshape(2, 16)
    for documents in (None, Documents(ids, 5)):
        assert loaded.hidden_states(ids, documents).dtype == dtype
    assert seen == {"stream": {torch.float32}, "product": {dtype}, "attention": {dtype}}


def test_a_residual_stream_beyond_fp16_is_no_fault_of_a_quantised_teacher(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    for number in range(2):
        # Each product's result is within fp16's range, their sum is not.
        whole[f"transformer.h.{number}.mlp.c_proj.bias"][3] = 5e4
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        teacher.load(folder, "fp16")
    ids = torch.arange(16).reshape(2, 8)
    exact = teacher.load(folder, "fp32").hidden_states(ids)
    for precision in teacher.EIGHT_BIT:
        torch.testing.assert_close(
            teacher.load(folder, precision, torch.float16).hidden_states(ids).float(), exact, rtol=0, atol=0.02
        )


def test_nf4_blocks_are_bitsandbytes_own_4_bit_layers(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, original = saved
    loaded = teacher.load(folder, "nf4")
    layers = dict(loaded.model.named_modules())
    for name, _ in linears(original):
        assert isinstance(layers[name], bnb.nn.Linear4bit)
        assert isinstance(layers[name].weight, bnb.nn.Params4bit)
        assert layers[name].weight.quant_state.quant_type == "nf4"
    assert torch.equal(loaded.head_weight, original.get_output_embeddings().weight)
    assert loaded.num_parameters == original.num_parameters()
    ids = torch.arange(32).reshape(2, 16)
    exact, close = log_probabilities(teacher.load(folder, "fp32"), ids), log_probabilities(loaded, ids)
    # Rows of 16 levels are coarse; other weights than these would be far beyond.
    assert 0 < float((exact.exp() * (exact - close)).sum(-1).mean()) < 0.3


@pytest.mark.parametrize("precision", ["fp32", *teacher.QUANTISED])
def test_weights_that_are_not_finite_are_refused(folder: Path, precision: str) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    whole[name][3, 5] = math.nan
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        teacher.load(folder, precision)
    assert name in caught.value.fault and precision in caught.value.fault and "fp32" in caught.value.fault


def test_activations_beyond_fp16_are_refused_with_another_dtype_as_mend(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    for name in whole:
        if "mlp" in name and name.endswith("weight"):
            whole[name] *= 1000
    save_file(whole, file, metadata={"format": "pt"})
    teacher.load(folder, "fp32")
    for precision in ("fp16", "int8"):
        with pytest.raises(UserError) as caught:
            teacher.load(folder, precision, torch.float16)
        assert "computed in fp16" in caught.value.fault and "precision=fp32" in caught.value.mend
        assert "weight" not in caught.value.fault


def as_pickles(folder: Path, num_files: int) -> None:
    """Replace the safetensors of a model by pickles, the tied head in them too."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    whole["lm_head.weight"] = whole["transformer.wte.weight"]
    if num_files == 1:
        torch.save(whole, folder / "pytorch_model.bin")
        return
    names, file_of = sorted(whole), {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        torch.save({name: whole[name] for name in names[number::num_files]}, folder / file)
        file_of |= dict.fromkeys(names[number::num_files], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.mark.parametrize("num_files", [1, 3])
def test_pickles_are_converted_once_beside_the_run(folder: Path, tmp_path: Path, num_files: int) -> None:
    ids = torch.arange(16).reshape(2, 8)
    expected = teacher.load(folder, "fp32").hidden_states(ids)
    as_pickles(folder, num_files)
    before = sorted(folder.iterdir())
    cache = tmp_path / "cache"
    assert torch.equal(teacher.load(folder, "fp32", cache_dir=cache).hidden_states(ids), expected)
    made = teacher.converted(folder, cache)
    assert made.parent == cache and not list(cache.glob("*.partial")) and not list(made.glob("*.bin"))
    inode = made.stat().st_ino
    assert teacher.converted(folder, cache).stat().st_ino == inode
    assert [path for path in sorted(folder.iterdir()) if path != cache] == before
    # Another source is another conversion.
    os.utime(next(folder.glob("*.bin")), ns=(1, 1))
    assert teacher.converted(folder, cache) != made


def test_one_of_several_converts(folder: Path, tmp_path: Path) -> None:
    as_pickles(folder, 1)
    cache = tmp_path / "cache"
    cache.mkdir()
    # Each opens the lock file anew, so the lock holds between threads as between processes, and no fork is needed.
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(teacher.converted, [folder] * 4, [cache] * 4))
    assert len(set(made)) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        write({"weight": Malicious(marker)}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model\.bin") as caught:
            teacher.load(folder, "fp32", cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value) and not marker.exists()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ""]


@pytest.mark.parametrize("weight_map", [{"a": "../../pytorch_model.bin"}, {"a": 3}, {}, []], ids=str)
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, tmp_path: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json"):
        teacher.load(folder, "fp32", cache_dir=tmp_path / "cache")


def test_llm_int8_says_nothing_at_its_products(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = teacher.load(folder, "llm-int8", torch.bfloat16)
    loaded.hidden_states(torch.arange(16).reshape(2, 8))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_4_bit_product_is_right(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    layer = four_bit_linear(weight, None, dtype, torch.device("cpu"))
    inputs = torch.randn(8, 128, generator=generator)
    error = layer.eval()(inputs.to(dtype)).float() - inputs @ weight.T
    # Rounding to NF4 is off by 9 %, scales of the wrong blocks by 25 %.
    assert error.norm() < 0.12 * (inputs @ weight.T).norm()


def test_nf4_with_rows_that_end_within_a_block_is_refused(tmp_path: Path) -> None:
    GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE | {"intermediate_size": 96})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nf4 does not work on a CPU for rows of 96 weights.*use int8"):
        teacher.load(tmp_path, "nf4")
