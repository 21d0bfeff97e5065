"""Quantised bases under LoRA, and compiled models: what the rule does there."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spf import SafetyCallback, SafetyProbe
from spf.data import tokenise
from spf.text.generation import generate_answers
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


def test_setting_up_does_not_change_what_four_bits_compute(tmp_path, tokenizer, rows, monkeypatch):
    """In evaluation mode bitsandbytes packs weights for good on a CPU with AVX512-BF16; gradients are wrong then.

    Simulated elsewhere: packing is made an error.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    modules = importlib.import_module("bitsandbytes.nn.modules")
    packed = []
    pack = lambda data, state: packed.append(1) or (data, state)  # noqa: E731
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack)
    make_model(width=64).save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, device_map="cpu")
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.arange(5, 29).view(2, 12)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    anchors = tokenise(rows, tokenizer, 256)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    probe.input_bases(anchors, list(probe.matrices), rank=4)
    probe.watch(anchors, {})
    generate_answers(model, tokenizer, ["How do I"], max_new_tokens=2, progress=False)
    assert not packed
    for name, gradient in gradients().items():
        assert torch.equal(gradient, before[name]), name
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert packed  # what would have happened


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
