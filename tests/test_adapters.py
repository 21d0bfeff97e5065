"""Adapters and optimizers of every kind: held, or refused with a sentence whose remedy works."""

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from spf import NullSpace, SafetyCallback, UnsupportedModelError, UnsupportedSetupError
from tests.conftest import make_model, make_tokenizer
from tests.test_callback import arguments, make_trainer, safety_data, token_data
from tests.test_going_on import assert_unchanged, keep
from tests.test_optimizer import logits


def lora(**settings):
    return get_peft_model(make_model(width=64), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | settings)))


def effective(model):
    """W_0 + s B A of every layer with LoRA, by the test's own sum."""
    found = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            found[f"{name}.lora_A.default.weight"] = (module.base_layer.weight + delta).detach().clone()
    return found


def assert_answers_stay(model, start, subspace):
    now = effective(model)
    assert now.keys() <= subspace.right.keys()
    for name, W in now.items():
        assert ((W - start[name]) @ subspace.right[name]).norm() <= 1e-6 * W.norm(), name
        assert not torch.equal(W, start[name]), name


def train(directory, tokenizer, rows, model, anchors, optimizer=None, **changes):
    """A run after which the anchors' logits and every layer's answers to what is held are what they were."""
    callback = keep(rows)
    start, before = effective(model), logits(model, anchors[:1])
    trainer = Trainer(
        model,
        arguments(TrainingArguments, directory, **({"max_steps": 3} | changes)),
        train_dataset=token_data(),
        processing_class=tokenizer,
        callbacks=[callback],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert_answers_stay(model, start, callback.attachment.subspace)
    assert_unchanged(before, logits(model, anchors[:1]))
    return callback


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "orthogonal"}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}]
)
def test_starts_that_are_held(settings, tmp_path, tokenizer, rows, anchors):
    train(tmp_path, tokenizer, rows, lora(**settings), anchors)


def test_lora_plus_is_held(tmp_path, tokenizer, rows, anchors):
    model = lora()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=16)
    train(tmp_path, tokenizer, rows, model, anchors, optimizer)


@pytest.mark.parametrize("optimizer", ["of peft", "any"])
def test_lora_fa_is_held(optimizer, tmp_path, tokenizer, rows, anchors, caplog):
    """lora_A is frozen: it is projected once, and looked at again at the end."""
    model = lora()
    made = None
    if optimizer == "of peft":
        made = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=5e-3)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    callback = train(tmp_path, tokenizer, rows, model, anchors, made)
    assert sum(matrix.frozen for matrix in callback.attachment.matrices.values()) == 14
    assert "all 14 matrices answer the held inputs as before training" in caplog.text


def started(start, monkeypatch):
    """A model with a fresh adapter of this start, made as PEFT's documentation says."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    ids = torch.randint(5, 600, (8, 16), generator=torch.Generator().manual_seed(1))
    base = make_model(width=64)
    if start == "corda":
        # peft takes it from attrs, which nothing here needs
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
        preprocess_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
        config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), **settings)
        preprocess_corda(base, config, run_model=lambda: [base(input_ids=row[None]) for row in ids])
        return get_peft_model(base, config)
    if start == "loftq":  # quantises on a GPU only

        def quantised(weight, num_bits, reduced_rank, num_iter):
            A, B = torch.randn(reduced_rank, weight.shape[1]) / 10, torch.randn(weight.shape[0], reduced_rank) / 10
            return weight - B @ A, A, B

        monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", quantised)
        return get_peft_model(
            base, LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}, **settings)
        )
    if start == "eva":
        config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **settings)
        model = get_peft_model(base, config)
        batches = [{"input_ids": ids[i : i + 2], "attention_mask": torch.ones_like(ids[i : i + 2])} for i in (0, 2, 4)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return model
    return get_peft_model(base, LoraConfig(init_lora_weights=start, **settings))


def test_eva_is_held(tmp_path, tokenizer, rows, anchors, monkeypatch):
    train(tmp_path, tokenizer, rows, started("eva", monkeypatch), anchors)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", False])
def test_starts_that_are_refused_and_the_remedy(start, tmp_path, tokenizer, rows, anchors, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, keep(rows), started(start, monkeypatch))
    with pytest.raises(UnsupportedModelError, match=f"init_lora_weights={start!r} .* use init_lora_weights=True"):
        trainer.train()
    if start == "pissa":
        train(tmp_path, tokenizer, rows, started(True, monkeypatch), anchors)


def test_dora_is_refused_and_the_remedy(tmp_path, tokenizer, rows, anchors):
    with pytest.raises(UnsupportedModelError, match="use use_dora=False"):
        make_trainer(tmp_path, tokenizer, keep(rows), lora(use_dora=True)).train()
    train(tmp_path, tokenizer, rows, lora(use_dora=False), anchors)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: lora(use_dora=True), "use use_dora=False"),
        (lambda: get_peft_model(make_model("qwen"), LoraConfig(target_modules=["lm_head"])), "shares its weight with"),
        (lambda: make_model().to(torch.bfloat16), "are in bfloat16, which rounds away"),
    ],
)
def test_what_cannot_be_held_is_refused_before_the_model_is_asked(make, why, tmp_path, tokenizer, rows, monkeypatch):
    """The audit came first: minutes, and with conflicts in the data its error in place of this one."""
    trainer = make_trainer(tmp_path, tokenizer, keep(rows), make())
    monkeypatch.delattr("spf.training_data.TrainingData.prepare")
    with pytest.raises(UnsupportedModelError, match=why):
        trainer.train()


@pytest.mark.parametrize("init", ["batch_average", "batch_average_once"])
def test_velora_is_held_and_nothing_is_said_of_its_buffer(init, tmp_path, tokenizer, rows, anchors, caplog):
    """What its backward pass goes by, PEFT writes at a step; it was said that others had changed what layers answer."""
    from peft.tuners.lora.config import VeloraConfig

    train(tmp_path, tokenizer, rows, lora(velora_config=VeloraConfig(num_groups=4, init_type=init)), anchors)
    assert "answer the held inputs as before" in caplog.text
    assert "have been changed by others" not in caplog.text


class ByHand(nn.Module):
    """LoRA that is not PEFT's; a bare matrix is a parameter (m, n), else a linear layer."""

    def __init__(self, linear, bare=()):
        super().__init__()
        self.linear = linear
        m, n = linear.weight.shape
        self.lora_A, self.lora_B = nn.Linear(n, 4, bias=False), nn.Linear(4, m, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        for name in bare:
            weight = getattr(self, name).weight
            delattr(self, name)
            self.register_parameter(name, weight)

    def forward(self, x):
        y = self.linear(x)
        for part in (self.lora_A, self.lora_B):
            x = part(x) if isinstance(part, nn.Module) else x @ part.T
        return y + x


def by_hand(bare=(), kind="llama", head=False):
    model = make_model(kind, width=64).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = ByHand(layer.mlp.down_proj, bare)
    if head:
        model.lm_head = ByHand(model.lm_head)
    return model


def test_lora_made_by_hand_is_held(tmp_path, tokenizer, rows, anchors):
    """A bug once: looked for PEFT's base_layer, and ended in an AttributeError."""
    model = by_hand()
    before = logits(model, anchors[:1])
    callback = keep(rows)
    make_trainer(tmp_path, tokenizer, callback, model, max_steps=3).train()
    for layer in model.model.layers:
        adapted = layer.mlp.down_proj
        assert adapted.lora_B.weight.any()
        with torch.no_grad():  # merged
            adapted.linear.weight += adapted.lora_B.weight @ adapted.lora_A.weight
        layer.mlp.down_proj = adapted.linear
    assert len(callback.attachment.matrices) == 2
    assert_unchanged(before, logits(model, anchors[:1]))


def frozen_b():
    model = by_hand()
    for layer in model.model.layers:
        layer.mlp.down_proj.lora_B.weight.data.normal_()
        layer.mlp.down_proj.lora_B.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: by_hand(["lora_B"]), r"down_proj\.lora_B: of an adapter made by hand, and no linear .* nn\.Linear"),
        (
            lambda: by_hand(["lora_A", "lora_B"]),
            r"no trainable weight matrix, .*lora_B.*; train linear layers, or PEFT's",
        ),
        (lambda: by_hand(["lora_A"]), "lora_B.weight is trained but its lora_A is frozen or not there"),
        (frozen_b, r"lora_A\.weight is trained but model\..*lora_B\.weight is not, so A V = 0 might .*; train it, too"),
        (lambda: by_hand(kind="qwen", head=True), "lm_head shares its weight with another layer .*leave it out"),
    ],
)
def test_lora_made_by_hand_that_cannot_be_held(make, said, tmp_path, tokenizer, rows):
    with pytest.raises(UnsupportedModelError, match=said):
        make_trainer(tmp_path, tokenizer, keep(rows), make()).train()


def test_lora_on_embeddings_is_held_on_the_anchors_tokens(tmp_path, tokenizer, rows, anchors):
    names = ["embed_tokens", "q_proj", "v_proj", "down_proj"]
    model = lora(target_modules=names)
    callback = train(tmp_path, tokenizer, rows, model, anchors)
    (A,) = (p.detach() for name, p in model.named_parameters() if "lora_embedding_A" in name)
    used = sorted({t for a in anchors[:1] for t in (*a.prompt_ids, *a.refusal_ids)})
    assert not A[:, used].any()
    assert A.any()
    assert callback.attachment.corrected == 3
    # a second run goes on; one whose anchors are changed already is refused
    with torch.no_grad():
        A[:, used[0]] += 1
    with pytest.raises(UnsupportedModelError, match="changes tokens of the held prompts already"):
        make_trainer(tmp_path, tokenizer, callback, model).train()
    train(tmp_path, tokenizer, rows, lora(target_modules=names[1:]), anchors)


def test_trainable_tokens_learn_where_they_are_new(tmp_path, rows, anchors):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    new = tokenizer.convert_tokens_to_ids(["<new>", "<newer>"])
    used = anchors[0].prompt_ids[2]

    def made(tokens):
        return lora(target_modules=["q_proj", "v_proj"], trainable_token_indices=tokens)

    def trainer(model):
        callback = keep(rows)
        made = make_trainer(tmp_path, tokenizer, callback, model, max_steps=3)
        made.train_dataset = token_data().map(lambda row: {"input_ids": new + row["input_ids"][2:]})
        return made

    model = made([used, *new])
    (start,) = (p.detach().clone() for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    before = logits(model, anchors[:1])
    trainer(model).train()
    (now,) = (p.detach() for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert torch.equal(now[0], start[0])
    assert (now[1:] != start[1:]).any(1).all()
    assert_unchanged(before, logits(model, anchors[:1]))
    with pytest.raises(UnsupportedModelError, match="name new tokens in trainable_token_indices"):
        trainer(made([used])).train()


def assert_weights_answer(model, start, callback):
    weights = dict(model.named_parameters())
    for name, V in callback.attachment.subspace.right.items():
        W = weights[name].detach()
        assert ((W - start[name]) @ V).norm() <= 1e-6 * W.norm(), name
        assert not torch.equal(W, start[name]), name


class Lisa(TrainerCallback):
    """Trains one layer at a time, another one every step."""

    def choose(self, model, step):
        for i, layer in enumerate(model.model.layers):
            layer.requires_grad_(i == step % 2)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.choose(model, state.global_step)


def test_layers_that_take_turns_are_held(tmp_path, tokenizer, rows):
    """LISA; the message says: leave all trainable until the first step."""
    model, callback = make_model(), SafetyCallback(safety_data(rows), NullSpace(rank=8))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, tokenizer, callback, model)
    trainer.add_callback(Lisa())
    trainer.train()
    assert_weights_answer(model, start, callback)


def test_layerwise_optimizers_are_refused_and_the_remedy(tmp_path, tokenizer, rows, monkeypatch):
    """GaLore is not installed here; AdamW stands in for it, and transformers' own hooks step it layer by layer."""
    classes = dict.fromkeys(("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"), torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**classes))
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)

    def trainer(optim):
        settings = {"optim": optim, "optim_target_modules": ["q_proj", "up_proj"]}
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        return make_trainer(tmp_path, tokenizer, callback, make_model(), **settings), callback

    with pytest.raises(UnsupportedSetupError, match='the same optim without "_layerwise"'):
        trainer("galore_adamw_layerwise")[0].train()
    held, callback = trainer("galore_adamw")
    start = {name: p.detach().clone() for name, p in held.model.named_parameters()}
    held.train()
    assert_weights_answer(held.model, start, callback)
