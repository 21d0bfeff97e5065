"""Quantised bases under LoRA, and compiled models: what the rule does there."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spf import SafetyCallback
from tests.conftest import make_model
from tests.test_callback import assert_holds, make_trainer, safety_data


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_a_quantised_base(bits, tmp_path, tokenizer, rows):
    make_model(width=64).save_pretrained(tmp_path / "model")
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, device_map="cpu")
    kinds = {type(module).__name__ for module in base.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyCallback(safety_data(rows))
    make_trainer(tmp_path, tokenizer, callback, model).train()
    assert len(callback.attachment.matrices) == 14
    assert callback.attachment.corrected == 4
    assert_holds(callback.attachment)
    trained = [m.weight for name, m in callback.attachment.probe.matrices.items() if m.is_lora_b]
    assert all(bool(B.any()) for B in trained)


def test_a_compiled_model_is_corrected_and_equals_the_eager_one(tmp_path, tokenizer, rows):
    found = {}
    for compiled in (False, True):
        callback = SafetyCallback(safety_data(rows))
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = make_trainer(tmp_path, tokenizer, callback, make_model(), optim="sgd", **settings)
        trainer.train()
        assert callback.attachment.corrected == 4
        assert_holds(callback.attachment)
        found[compiled] = {name: p.detach().clone() for name, p in callback.attachment.probe.model.named_parameters()}
    for name, weight in found[False].items():
        assert torch.allclose(found[True][name], weight, atol=1e-6), name
