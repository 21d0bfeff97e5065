"""The other frameworks: Lightning itself on a tiny model, the others as they call what we give them."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from spf import NullSpace, SafetyCallback, UnsupportedSetupError
from spf.named import callback_from
from tests.conftest import make_model
from tests.test_callback import arguments, make_trainer, safety_data, token_data


@pytest.fixture
def refusals(tmp_path, rows):
    path = tmp_path / "refusals.jsonl"
    path.write_text("".join(json.dumps({"messages": r.messages, "refusal": r.refusal}) + "\n" for r in rows), "utf-8")
    return path


def module(monkeypatch, name, **names):
    """A stand-in for a module that is not installed here, with the packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if ".".join(parts[:i]) not in sys.modules:
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(names)


def test_a_block_of_settings_is_held_to_those_of_spf_train():
    callback = callback_from({"rule": "null-space", "rank": 3, "conflicts": "error", "monitor_steps": 0})
    assert (callback.rule, callback.settings.conflicts, callback.settings.monitor_steps) == (
        NullSpace(rank=3),
        "error",
        0,
    )
    assert callback_from({"rule": "none"}) is None
    for wrong, said in {
        "spf: rnk is not known": {"rnk": 3},
        "spf: rank must be at least 1, not 0": {"rank": 0},
        "spf: seed must be a whole number, not 'one'": {"seed": "one"},
        "spf: rule: no rule foo; there are none, null-space": {"rule": "foo"},
        "spf: rank: the rule mix has no rank": {"rule": "mix", "rank": 3},
        "spf: chat_template_kwargs: not JSON": {"chat_template_kwargs": "{"},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            callback_from(said)


def axolotl(monkeypatch):
    """axolotl 0.19's BasePlugin, as far as a plugin with callbacks meets it."""

    class BasePlugin:
        def get_input_args(self):
            return None

        def add_callbacks_pre_trainer(self, cfg, model):
            return []

        def add_callbacks_post_trainer(self, cfg, trainer):
            return []

    module(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    monkeypatch.delitem(sys.modules, "spf.integrations.axolotl", raising=False)
    return importlib.import_module("spf.integrations.axolotl")


def test_axolotl_asks_the_plugin_for_its_yaml_keys_and_callbacks(monkeypatch, refusals, tmp_path, tokenizer):
    """What axolotl 0.19 does: integrations/config.py merges the arguments, core/builders/base.py asks for callbacks."""
    ours = axolotl(monkeypatch)
    place, name = ["spf.integrations.axolotl", "SafetyPlugin"]
    plugin = getattr(importlib.import_module(place), name)()
    place, name = plugin.get_input_args().rsplit(".", 1)
    block = getattr(importlib.import_module(place), name)(spf={"data": str(refusals), "rank": 8})
    assert plugin.add_callbacks_post_trainer(block, None) == []
    [callback] = plugin.add_callbacks_pre_trainer(block, make_model())
    assert isinstance(callback, SafetyCallback)
    make_trainer(tmp_path, tokenizer, callback, max_steps=2).train()
    assert callback.attachment.corrected == 2
    assert plugin.add_callbacks_pre_trainer(ours.SafetyArgs(spf={"rule": "none"}), None) == []
    assert plugin.add_callbacks_pre_trainer(ours.SafetyArgs(), None)[0].rule == NullSpace()


def test_ms_swift_makes_the_callback_inside_its_trainer(monkeypatch, refusals, tmp_path, tokenizer):
    """As ms-swift 4.6 does where it makes the trainer (trainers/mixin.py): callbacks_map[name](args, trainer)."""
    known = {}
    module(monkeypatch, "swift.callbacks", callbacks_map=known)
    monkeypatch.delitem(sys.modules, "spf.integrations.ms_swift", raising=False)
    ours = importlib.import_module("spf.integrations.ms_swift")
    ours.register(data=str(refusals), rank=8)
    callback = known["spf"](arguments(TrainingArguments, tmp_path), SimpleNamespace())
    make_trainer(tmp_path, tokenizer, callback, max_steps=2).train()
    assert callback.attachment.corrected == 2
    with pytest.raises(ValueError, match="spf: rnk is not known"):
        ours.register(rnk=8)
    ours.register(rule="none")
    assert type(known["spf"](None, None)) is TrainerCallback


def test_llama_factory_is_given_its_yaml_without_the_block_and_the_callback(monkeypatch, refusals, tmp_path):
    """What LLaMA-Factory 0.9.5 has: read_args() of sys.argv, run_exp(args, callbacks=[...])."""
    from spf.integrations.llama_factory import main

    seen = {}
    config = tmp_path / "train.yaml"
    config.write_text(f"stage: sft\nspf: {{data: {refusals}, rank: 8}}\n", "utf-8")

    def read_args(args=None):
        seen["argv"] = sys.argv[1:]
        return {"stage": "sft", "spf": {}, "learning_rate": "1e-3"}

    module(monkeypatch, "llamafactory.hparams.parser", read_args=read_args)
    module(monkeypatch, "llamafactory.train.tuner", run_exp=lambda args=None, callbacks=None: seen.update(vars()))
    monkeypatch.setattr(sys, "argv", ["launcher"])
    main([str(config), "learning_rate=1e-3"])
    assert seen["argv"] == [str(config), "learning_rate=1e-3"]
    assert seen["args"] == {"stage": "sft", "learning_rate": "1e-3"}
    [callback] = seen["callbacks"]
    assert callback.rule == NullSpace(rank=8)
    config.write_text("spf: {rule: none}", "utf-8")
    main([str(config)])
    assert seen["callbacks"] == []
    for content, said in (("spf: 3", "spf must hold names and values"), ("spf: {rnk: 3}", "spf: rnk is not known")):
        config.write_text(content, "utf-8")
        with pytest.raises(ValueError, match=said):
            main([str(config)])
    with pytest.raises(ValueError, match="name a YAML file"):
        main(["--stage", "sft"])


lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer)}


def fit(callback, model, **options):
    loader = DataLoader(token_data().with_format("torch"), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_steps": 3, "enable_model_summary": False, "barebones": False}
    trainer = lightning.Trainer(callbacks=[callback], **quiet, **(settings | options))
    trainer.fit(Module(model), loader)
    return trainer


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}]
)
def test_lightning_holds_what_it_holds_elsewhere(tokenizer, rows, lora, options):
    from spf.integrations.lightning import SafetyLightning

    model = make_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyLightning(tokenizer, safety_data(rows), NullSpace(rank=8))
    trainer = fit(callback, model, **options)
    attachment = trainer.optimizers[0].attachment
    assert attachment.steps == attachment.corrected == 3
    assert "held inputs as before" in callback.proven
    assert callback.proven.startswith(("NOT KNOWN: ", "REFUSALS BEING LOST: "))
    for name, matrix in attachment.matrices.items():
        if name in attachment.subspace.right:
            V, target = attachment.subspace.right[name], attachment.subspace.target[name]
            weight = matrix.view(matrix.weight.detach())
            assert (weight @ V - target).norm() <= 1e-5 * weight.norm(), name
    assert not trainer.optimizers[0].optimizer._optimizer_step_post_hooks


def test_lightning_refuses_what_the_rule_could_not_act_on(tokenizer, rows):
    from spf.integrations.lightning import SafetyLightning

    class Two(Module):
        automatic_optimization = False

    callback = SafetyLightning(tokenizer, safety_data(rows), NullSpace(rank=8))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback]
    )
    with pytest.raises(UnsupportedSetupError, match="automatic optimization"):
        trainer.fit(Two(make_model()), DataLoader(token_data().with_format("torch"), batch_size=2))
