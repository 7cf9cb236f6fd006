"""model.py: NF4 and unquantized loads against transformers' own, our dtype policy, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GEOMETRIES, chatml_tokenizer, make_checkpoint, phi3_tokenizer

from qlora_phi3 import adapters, phi3
from qlora_phi3.errors import ModelError, Problem
from qlora_phi3.model import (
    DTYPES,
    Base,
    ParameterCounts,
    check_dtypes,
    is_packed,
    load,
    load_tokenizer,
    logical_numel,
    packed_linears,
)
from qlora_phi3.recipe import Adapter, Data, Model, Recipe, Source
from qlora_phi3.weights import locate

CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12)
QUANTIZATIONS = ["nf4", "none"]


@pytest.fixture
def folder(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """A whole checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoints("gqa"), tmp_path / "base"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints whose linears are all a multiple of 64 wide, as every real Phi-3's are.

    bitsandbytes 0.50 on a CPU dequantizes others wrongly, and cannot pack them for inference.
    """
    made: dict[str, Path] = {}

    def get(geometry: str = "gqa") -> Path:
        from transformers import Phi3Config, Phi3ForCausalLM

        if geometry not in made:
            made[geometry] = make_checkpoint(tmp_path_factory.mktemp("wide") / geometry, geometry)
            sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
            config = Phi3Config.from_pretrained(made[geometry], **sizes)
            torch.manual_seed(0)
            Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(made[geometry])
        return made[geometry]

    return get


def load_base(folder: Path, quantization: str = "nf4", dtype: str = "bfloat16", **settings: Any) -> Base:
    chosen = Model(base=str(folder), quantization=quantization, compute_dtype=dtype, **settings)
    return load(locate(chosen), chosen, CPU)


def refusal(folder: Path, quantization: str = "nf4", dtype: str = "bfloat16") -> Problem:
    with pytest.raises(ModelError) as caught:
        load_base(folder, quantization, dtype)
    [problem] = caught.value.problems
    assert problem.remedy
    assert "\n" not in str(problem)
    return problem


def edit(path: Path, **keys: Any) -> None:
    """Add or replace keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


# --- what is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_policy(checkpoints: Any, geometry: str, quantization: str, dtype: str) -> None:
    base = load_base(checkpoints(geometry), quantization, dtype)
    parameters = dict(base.model.named_parameters())
    packed = {name for name, p in parameters.items() if is_packed(p)}
    linears = {n for n in parameters if n.removesuffix(".weight").rpartition(".")[2] in phi3.LINEARS}
    assert len(linears) == 2 * len(phi3.LINEARS)
    assert packed == (linears if quantization == "nf4" else set())
    assert {parameters[name].dtype for name in packed} <= {torch.uint8}
    assert {p.dtype for name, p in parameters.items() if name not in packed} == {DTYPES[dtype]}
    assert not any(p.requires_grad for p in parameters.values())
    assert base.compute_dtype == DTYPES[dtype]
    assert base.quantized == (quantization == "nf4")
    assert not base.model.config.use_cache
    assert type(base.model).__module__ == "transformers.models.phi3.modeling_phi3"


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_logical_parameters(checkpoints: Any, geometry: str, quantization: str) -> None:
    base = load_base(checkpoints(geometry), quantization)
    sizes = base.checkpoint.geometry
    quantized = sizes.num_linear_parameters if quantization == "nf4" else 0
    assert ParameterCounts.of(base.model) == ParameterCounts(sizes.num_parameters, quantized, trainable=0)


def test_a_packed_weight_counts_what_it_stands_for(checkpoints: Any) -> None:
    weight = load_base(checkpoints("gqa")).model.model.layers[0].mlp.gate_up_proj.weight
    assert (logical_numel(weight), weight.numel()) == (256 * 64, 256 * 64 // 2)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_unquantized_is_what_transformers_loads(checkpoints: Any, geometry: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(checkpoints(geometry), dtype=DTYPES[dtype])
    assert torch.equal(logits(load_base(checkpoints(geometry), "none", dtype).model), logits(stock))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nf4_is_close_to_unquantized(wide: Callable[[str], Path], geometry: str) -> None:
    full, nf4 = (logits(load_base(wide(geometry), q, "float32").model) for q in ("none", "nf4"))
    error = (full - nf4).norm() / full.norm()
    assert 0.01 < error < 0.35  # measured 0.23 to 0.27; two unrelated models are 1.4 apart


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_computes_with_its_dequantized_weights(wide: Callable[..., Path], double_quant: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    nf4 = load_base(wide(), "nf4", "float32", double_quant=double_quant)
    full = load_base(wide(), "none", "float32")
    for name, module in nf4.model.named_modules():
        if hasattr(module, "weight") and is_packed(module.weight):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested) == ("nf4", double_quant)
            original, rounded = full.model.get_submodule(name).weight, dequantize_4bit(module.weight, state)
            largest = original.view(-1, 64).abs().amax(1, keepdim=True)
            error = (original - rounded).view(-1, 64).abs() / largest
            assert error.max() < 0.17  # half of NF4's widest gap is 0.152, and the scale is rounded too
            original.data.copy_(rounded)
    torch.testing.assert_close(logits(nf4.model), logits(full.model), rtol=1e-4, atol=1e-4)


def test_packed_linears(checkpoints: Any) -> None:
    assert len(list(packed_linears(load_base(checkpoints("gqa"), "nf4").model))) == 8
    assert list(packed_linears(load_base(checkpoints("gqa"), "none").model)) == []


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_stored_dtype_does_not_matter(folder: Path, stored: torch.dtype) -> None:
    edit_weights(folder, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    assert {p.dtype for p in load_base(folder, "none").model.parameters()} == {torch.bfloat16}


def test_attention_is_ours_to_choose(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="evil/kernel")
    assert load_base(folder).model.config._attn_implementation == "sdpa"


# --- what is refused ---------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_missing_weight(folder: Path, quantization: str, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(name))
    problem = refusal(folder, quantization)
    assert problem.place == str(folder)
    assert problem.reason.startswith(f"1 weights are missing, {name} the first")


def test_missing_layer(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)
    assert refusal(folder).reason.startswith("6 weights are missing, model.layers.2.")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    "name", ["model.extra.weight", "model.layers.2.mlp.down_proj.weight", DOWN + "_scale"]
)
def test_surplus_weight(folder: Path, quantization: str, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    problem = refusal(folder, quantization)
    assert problem.place == str(folder)
    assert problem.reason.startswith(f"1 weights fit nowhere in Phi-3, {name} the first")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (DOWN, (64, 95), (64, 128)),
        (DOWN, (128, 64), (64, 128)),
        ("model.norm.weight", (63,), (64,)),
        ("lm_head.weight", (300, 64), (261, 64)),
    ],
)
def test_wrong_shape(
    folder: Path, quantization: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(shape, dtype=torch.bfloat16)}))
    problem = refusal(folder, quantization)
    assert problem.place == str(folder)
    assert f"{name} is {list(shape)}" in problem.reason
    assert str(list(expected)) in problem.reason


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_another_number_of_kv_heads(folder: Path, quantization: str) -> None:
    edit(folder / "config.json", num_key_value_heads=4)
    problem = refusal(folder, quantization)
    assert "qkv_proj.weight is [128, 64]" in problem.reason
    assert "[192, 64]" in problem.reason


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_head_of_its_own_where_the_config_says_tied(
    checkpoints: Any, tmp_path: Path, quantization: str
) -> None:
    """transformers keeps both matrices then; memory, counts and exports would take them for one."""
    folder = Path(shutil.copytree(checkpoints("tied"), tmp_path / "base"))
    head = {"lm_head.weight": torch.ones(261, 64, dtype=torch.bfloat16)}
    edit_weights(folder, lambda tensors: tensors.update(head))
    assert "tie_word_embeddings" in refusal(folder, quantization).reason


def test_copy_of_the_embedding_as_tied_head(checkpoints: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("tied"), tmp_path / "base"))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    base = load_base(folder)
    assert ParameterCounts.of(base.model).total == base.checkpoint.geometry.num_parameters


@pytest.mark.parametrize(
    "keys",
    [
        {"rms_norm_eps": "small"},
        {"hidden_act": "no such activation"},
        {"dtype": "float99"},
        {"rope_parameters": {"rope_type": "weird", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_config_that_transformers_refuses(folder: Path, keys: dict[str, Any]) -> None:
    edit(folder / "config.json", **keys)
    assert refusal(folder).place.startswith(str(folder))


def test_keys_that_are_none_of_phi_3_s_change_nothing(folder: Path) -> None:
    """transformers makes an attribute of each, whatever it is called."""
    edit(folder / "config.json", to_dict="x", output_hidden_states="x", base_model_pp_plan=5, max_length="x")
    model = load_base(folder).model
    assert model.config.output_hidden_states is False and callable(model.config.to_dict)


def test_settings_of_answers_that_transformers_refuses(folder: Path) -> None:
    edit(folder / "generation_config.json", max_new_tokens=-1)
    problem = refusal(folder)
    assert problem.place == str(folder / "generation_config.json")
    assert problem.reason.startswith("transformers refuses it: `max_new_tokens` must be greater than 0")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (IndexError("list index out of range"), ModelError),
        (AssertionError("no such plan"), ModelError),
        (OSError(12, "Cannot allocate memory"), MemoryError),
        (MemoryError(), MemoryError),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            RuntimeError,
        ),
    ],
    ids=repr,
)
def test_whatever_a_load_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    """Too little memory goes on to those who know the plan; all else is a base that cannot be used."""
    from transformers import Phi3ForCausalLM

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Phi3ForCausalLM, "from_pretrained", fails)
    with pytest.raises(raised):
        load_base(folder)


def test_missing_shard(folder: Path) -> None:
    shards = {"weight_map": {DOWN: "model-1-of-2.safetensors", "lm_head.weight": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **shards}))
    (folder / "model.safetensors").rename(folder / "model-2-of-2.safetensors")
    assert "model-1-of-2.safetensors" in refusal(folder).reason


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_float16_needs_a_gpu(checkpoints: Any, quantization: str) -> None:
    problem = refusal(checkpoints("gqa"), quantization, "float16")
    assert problem.place == "model.compute_dtype"
    assert "bfloat16" in problem.remedy


def test_code_beside_the_weights_never_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, dynamic_module_utils

    ran = tmp_path / "ran"
    for module in ("configuration_phi3", "modeling_phi3", "tokenization_phi3"):
        (folder / f"{module}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    code = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    edit(folder / "config.json", auto_map=code, _name_or_path=str(folder))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "Xenova/gpt-4o"})
    base = load_base(folder)
    assert type(base.model).__module__ == "transformers.models.phi3.modeling_phi3"
    assert not hasattr(base.model.config, "auto_map")  # nor does a saved copy name the code
    assert not ran.exists()

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with contextlib.suppress(AttributeError):  # the bait defines no class
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists(), "the bait does not work, so this test proves nothing"


# --- tokenizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [phi3_tokenizer, chatml_tokenizer])
def test_tokenizer(tmp_path: Path, make: Callable[[], Any]) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", padding_side="left")
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.padding_side) == ("<|endoftext|>", "right")


def test_tokenizer_pads_with_its_own_pad(tmp_path: Path) -> None:
    tokenizer = phi3_tokenizer()
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|end|>"


def test_tokenizer_without_pad_pads_with_eos(tmp_path: Path) -> None:
    phi3_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == loaded.convert_tokens_to_ids("<|endoftext|>")


def no_pad_no_eos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None, eos_token=None)


def no_model_in_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "BPE"})


def unheard_of_model(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "unheard of", "vocab": {}})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_pad_no_eos, "the tokenizer has neither pad nor eos token."),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "the tokenizer has no chat template."),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read: it is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer: it has no model"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "is not a JSON object."),
        (no_model_in_tokenizer, "is no tokenizer: it has no model"),
        (unheard_of_model, "the tokenizer cannot be read: "),
    ],
    ids=["no pad, no eos", "no template", "no JSON", "empty", "a list", "no vocab", "unknown model"],
)
def test_tokenizers_that_are_refused(folder: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(folder)
    problem = refusal(folder)
    assert problem.place in (str(folder), str(folder / "tokenizer.json"))
    assert problem.reason.startswith(reason)


# --- bitsandbytes' packing for inference -------------------------------------------------------------------


def gradients(base: Base, *, evaluate_first: bool) -> dict[str, torch.Tensor]:
    """Gradients of a loss by the embedded input and by every adapter weight, B not at its initial zero."""
    recipe = Recipe(
        version=1,
        name="t",
        model=Model(base=str(base.checkpoint.folder)),
        adapter=Adapter(rank=4, alpha=8),
        data=Data(train=Source(path="unused.jsonl")),
    )
    torch.manual_seed(0)
    model = adapters.attach(base, recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if evaluate_first:
        logits(model)
    model.train()
    embedded = base.model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"input": embedded.grad, **found}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_evaluating_first_changes_no_gradient(
    wide: Callable[..., Path], quantization: str, dtype: str
) -> None:
    fresh = gradients(load_base(wide(), quantization, dtype), evaluate_first=False)
    evaluated = gradients(load_base(wide(), quantization, dtype), evaluate_first=True)
    assert len(fresh) == 1 + 2 * 14
    assert all(gradient.abs().max() > 0 for gradient in fresh.values())
    assert differing(fresh, evaluated) == []


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered")
def test_bitsandbytes_still_packs_weights_beyond_repair(wide: Callable[..., Path]) -> None:
    """When this fails, bitsandbytes is mended and `_keep_differentiable` can go."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs weights for inference on CPUs with AVX512-BF16 only")
    fresh, trapped = load_base(wide()), load_base(wide())
    for linear in packed_linears(trapped.model):
        linear.support_avx512bf16_for_cpu = True
    right, wrong = gradients(fresh, evaluate_first=False), gradients(trapped, evaluate_first=True)
    assert len(differing(right, wrong)) == len(right)
    assert wrong["input"].norm() < 0.25 * right["input"].norm()


# --- check_dtypes ------------------------------------------------------------------------------------------


def cast(name: str, dtype: torch.dtype) -> Callable[[torch.nn.Module], object]:
    def change(model: torch.nn.Module) -> None:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)

    return change


def train(name: str) -> Callable[[torch.nn.Module], object]:
    return lambda model: model.get_parameter(name).requires_grad_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast("model.norm.weight", torch.float32), "model.norm.weight is torch.float32"),
        (cast("lm_head.weight", torch.float16), "lm_head.weight is torch.float16"),
        (train("model.norm.weight"), "model.norm.weight is trained in torch.bfloat16"),
    ],
    ids=["norm in float32", "head in float16", "norm trained in bfloat16"],
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_one_parameter_against_the_policy(
    checkpoints: Any, quantization: str, change: Callable[[torch.nn.Module], object], message: str
) -> None:
    base = load_base(checkpoints("gqa"), quantization)
    check_dtypes(base.model, compute=torch.bfloat16, quantized=base.quantized)
    change(base.model)
    with pytest.raises(AssertionError, match=message):
        check_dtypes(base.model, compute=torch.bfloat16, quantized=base.quantized)


def test_float32_parameters_may_be_trained(checkpoints: Any) -> None:
    base = load_base(checkpoints("gqa"))
    cast("model.norm.weight", torch.float32)(base.model)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight is torch\.float32"):
        check_dtypes(base.model, compute=torch.bfloat16, quantized=True)
    train("model.norm.weight")(base.model)
    check_dtypes(base.model, compute=torch.bfloat16, quantized=True)


def test_packed_weights_in_an_unquantized_base(checkpoints: Any) -> None:
    base = load_base(checkpoints("gqa"), "nf4")
    with pytest.raises(AssertionError, match=r"_proj\.weight is packed"):
        check_dtypes(base.model, compute=torch.bfloat16, quantized=False)


def test_both_attentions_give_the_same_logits(checkpoints: Callable[[str], Path]) -> None:
    settings = Model(base=str(checkpoints("gqa")), quantization="none", compute_dtype="float32")
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    logits = []
    for attention in ("eager", "sdpa"):
        base = load(locate(settings), settings, torch.device("cpu"), attention)
        logits.append(base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits)
