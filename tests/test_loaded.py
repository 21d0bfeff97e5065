"""Weights that are in no file, adapters for other layers, NaN: libraries load them, and figures come of it."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spf.cli import main
from spf.evaluation import ClassifierJudge
from spf.loaded import refuse_not_finite
from spf.models import load_model
from tests.conftest import make_model
from tests.test_cli import make_workspace

SUITES = ["--harmful", "suite.jsonl", "--benign", "suite.jsonl", "--max_new_tokens", "1"]


@pytest.fixture
def saved(tmp_path, tokenizer, monkeypatch):
    """A model, and an adapter above it."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model")
    get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).save_pretrained(
        "adapter"
    )
    for name in ("model", "adapter"):
        tokenizer.save_pretrained(name)
    (tmp_path / "suite.jsonl").write_text(json.dumps({"prompt": "How do I"}))
    return tmp_path


def rewrite(path, change):
    tensors = load_file(path)
    save_file({new: tensor for name, tensor in tensors.items() if (new := change(name))}, path, {"format": "pt"})


CHANGES = {
    "all": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "half": lambda name: None if "layers.1" in name else name,
    "more": lambda name: name,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_does_not_fit_is_refused(saved, change, capsys):
    """Nothing, or half of it, was merged, and the figures were those of the model below."""
    load_model("adapter")
    path = saved / "adapter" / "adapter_model.safetensors"
    if change == "more":  # the settings name fewer layers than the file has
        settings = json.loads((saved / "adapter" / "adapter_config.json").read_text())
        settings["target_modules"] = r".*layers\.0\.self_attn\.q_proj"
        (saved / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    rewrite(path, CHANGES[change])
    assert main(["eval", "adapter", *SUITES]) == 2
    assert "the adapter adapter does not fit the model that it stands on: " in capsys.readouterr().err


def test_weights_that_are_in_no_file_are_refused(saved, tokenizer, capsys):
    """They were made up, and the model measured, trained, or asked for verdicts."""
    with pytest.raises(ValueError, match=r"model: 1 of its weights .* score\.weight among them, and would be random"):
        ClassifierJudge("model", "LABEL_1")
    rewrite(saved / "model" / "model.safetensors", lambda name: None if "layers.1" in name else name)
    assert main(["eval", "model", *SUITES]) == 2
    assert "model: 9 of its weights are in none of its files, model.layers.1." in capsys.readouterr().err


def test_spf_train_refuses_weights_that_are_in_no_file(tmp_path, tokenizer, rows, capsys):
    workspace = make_workspace(tmp_path, tokenizer, rows)
    rewrite(workspace / "model" / "model.safetensors", lambda name: f"_orig_mod.{name}")
    assert main(["train", str(workspace / "config.yaml")]) == 2
    assert "of its weights are in none of its files" in capsys.readouterr().err


def test_a_model_that_went_wrong_is_not_measured(saved, capsys):
    """Each of its answers was the first token of all: ASR 100 %, over-refusal 0."""
    tensors = load_file(saved / "model" / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, saved / "model" / "model.safetensors", {"format": "pt"})
    assert main(["eval", "model", *SUITES, "--output", "figures.json"]) == 2
    assert "model: model.norm.weight holds NaN or inf" in capsys.readouterr().err
    assert not (saved / "figures.json").exists()


def test_what_is_whole_is_loaded(saved):
    model, tokenizer = load_model("model")
    assert torch.equal(model.lm_head.weight, make_model().lm_head.weight)
    for kind in ("qwen", "gemma"):  # tied weights are in the file once
        make_model(kind).save_pretrained(kind)
        tokenizer.save_pretrained(kind)
        model, _ = load_model(kind)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    AutoModelForSequenceClassification.from_pretrained("model").save_pretrained("classifier")
    tokenizer.save_pretrained("classifier")
    ClassifierJudge("classifier", "LABEL_1")


def test_learned_prompts_are_named(saved):
    get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        "soft"
    )
    settings = json.loads((saved / "soft" / "adapter_config.json").read_text())
    (saved / "soft" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "model"}))
    with pytest.raises(ValueError, match="the adapter soft is learned prompts, which cannot be merged"):
        load_model("soft")


def test_a_bank_that_layers_share_is_loaded(saved):
    """PEFT names each layer's reference to it as missing."""
    base = AutoModelForCausalLM.from_pretrained("model")
    kind = VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj"], init_logits_std=1.0)
    model = get_peft_model(base, kind)
    model.save_pretrained("bank")
    assert torch.equal(load_model("bank")[0].lm_head.weight, make_model().lm_head.weight)


def test_weights_of_a_byte_are_not_asked_whether_they_are_finite():
    model = torch.nn.Linear(4, 4)
    model.weight = torch.nn.Parameter(model.weight.to(torch.float8_e4m3fn), requires_grad=False)
    refuse_not_finite(model, "model")
