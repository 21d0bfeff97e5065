"""Parameters in two places, parameters that are kept fixed, and rows of new tokens."""

import copy

import pytest
import torch
import torch.nn.utils as torch_utils
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from spf import NullSpace, SafetyCallback, SafetyOptimizer, SafetyProbe, UnsupportedModelError
from spf.data import collate
from spf.matrices import find_matrices
from spf.rules import Rank1
from tests.conftest import REFUSAL, make_model, make_tokenizer
from tests.test_callback import make_trainer, safety_data, token_data
from tests.test_optimizer import logits, train, utility_batch
from tests.test_probe import dense_gradients


def tied(kind, width=32):
    """A Llama with a weight, a layer or a feed-forward block in two places."""
    model = make_model(width=width)
    first, second = model.model.layers
    if kind == "weight":
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    elif kind == "module":
        second.self_attn.v_proj = first.self_attn.v_proj
    else:
        second.mlp = first.mlp
    return model


@pytest.mark.parametrize("kind", ["weight", "module", "block"])
def test_weights_in_two_places_are_held_at_every_use(kind, anchors):
    """A bug once: one use decided the basis, and anchors' logits moved by 10 to 60 %."""
    model = tied(kind, width=128)
    few = anchors[:1]
    before = logits(model, few)
    tokens = len(few[0].prompt_ids) + len(few[0].refusal_ids)
    probe = SafetyProbe(model, few, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), probe, NullSpace(rank=2 * tokens))
    ids = utility_batch(0)
    start = float(model(input_ids=ids, labels=ids).loss.detach())
    train(model, optimizer, 6)
    assert abs(float(model(input_ids=ids, labels=ids).loss.detach()) - start) > 1e-3
    for old, new in zip(before, logits(model, few), strict=True):
        assert torch.allclose(old, new, atol=1e-5), float((old - new).abs().max())
    optimizer.finish()


@pytest.mark.parametrize("kind", ["weight", "module", "block"])
def test_gradients_of_weights_in_two_places_are_autograds(kind, anchors):
    """A bug once: the safety gradient of a tied weight was off by 79 %."""
    model = tied(kind)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    result = probe.measure(anchors[:3])
    _, expected = dense_gradients(model, collate(anchors[:3], 1), list(probe.matrices))
    for name, factors in result.factors.items():
        assert (factors.dense() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_gradient_rule_on_a_tied_weight(anchors):
    model = tied("weight")
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), probe, Rank1())
    train(model, optimizer, 3)
    optimizer.finish()


def test_two_parameters_on_one_memory_are_refused():
    model = make_model()
    first, second = model.model.layers
    second.mlp.up_proj.weight = nn.Parameter(first.mlp.up_proj.weight.data)
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight and .*up_proj\.weight are two parameters on one"):
        find_matrices(model)


def with_new_tokens(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<tool>", "<call>"]}, replace_extra_special_tokens=False
    )
    return tokenizer, tokenizer.convert_tokens_to_ids(["<tool>", "<call>"])


@pytest.mark.parametrize("tuning", ["full", "modules_to_save"])
def test_rows_of_new_tokens_learn_and_no_others(tuning, tmp_path, rows, caplog):
    """They once stayed at what they were, to the bit, and nothing said so."""
    tokenizer, new = with_new_tokens(make_tokenizer())
    model = make_model()
    size = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 8)
    # ids of the tokenizer that the data use
    if tuning == "modules_to_save":
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
        model = get_peft_model(model, config)
    weight = next(p for n, p in model.named_parameters() if "embed_tokens" in n and p.requires_grad)
    before = weight.detach().clone()
    data = token_data().map(lambda row: {"input_ids": [new[0], new[1], *row["input_ids"][2:]]})
    data = data.map(lambda row: {"labels": row["input_ids"]})
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = make_trainer(tmp_path, tokenizer, callback, model, weight_decay=0.1)
    trainer.train_dataset = data
    trainer.train()
    moved = (weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == sorted(new)
    told = [r.getMessage() for r in caplog.records if "kept fixed" in r.getMessage()]
    assert "1 embedding" in told[0]
    assert "rows of tokens that were added to the vocabulary learn" in told[0]


def test_what_is_kept_fixed_is_named_and_counted_before_the_first_step(tmp_path, tokenizer, rows, caplog):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    make_trainer(tmp_path, tokenizer, callback, make_model("qwen")).train()
    (told,) = [r.getMessage() for r in caplog.records if "kept fixed" in r.getMessage()]
    assert "1 embedding (model.embed_tokens.weight)" in told
    assert "5 norms (model.layers.0.input_layernorm.weight, " in told
    assert "6 bias vectors (model.layers.0.self_attn.q_proj.bias, " in told


def test_vectors_that_an_adapter_learns_with_are_refused(anchors):
    model = get_peft_model(make_model(), VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    # something else is trained too, so that there is a matrix to hold
    next(p for n, p in model.named_parameters() if "down_proj" in n).requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="learns with this vector, which null-space would keep fixed"):
        SafetyOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            SafetyProbe(model, anchors, pad_token_id=1),
            NullSpace(rank=4),
        )


def test_biases_of_adapters_are_kept_fixed_and_named(tmp_path, tokenizer, rows, caplog):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows), NullSpace(rank=8)), model).train()
    assert any("2 bias vectors" in r.getMessage() for r in caplog.records)
    assert REFUSAL


def test_a_layer_saved_whole_beside_adapters_is_refused_in_bfloat16_with_a_remedy_that_works(
    tmp_path, tokenizer, rows, caplog, monkeypatch
):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make_model(dtype=torch.bfloat16), config)

    def run():
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        make_trainer(tmp_path, tokenizer, callback, model, bf16=True).train()

    with pytest.raises(
        UnsupportedModelError, match=r"lm_head\.modules_to_save.* p\.data = p\.data\.float\(\) for every p"
    ):
        run()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    run()
    assert "proven on the model's own parameters" in caplog.records[-1].getMessage()


def test_a_model_that_trains_no_matrix_is_refused():
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    with pytest.raises(UnsupportedModelError, match=r"no trainable weight matrix, only model\.layers\.0\.input_"):
        find_matrices(model)


def plain(layer):
    parametrize.remove_parametrizations(layer, "weight")


MADE = {
    "weight_norm": (parametrizations.weight_norm, plain),
    "spectral_norm": (parametrizations.spectral_norm, plain),
    "by hooks": (torch_utils.weight_norm, torch_utils.remove_weight_norm),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_made_from_others_is_refused_and_the_remedies(kind, anchors):
    """It ended in an AssertionError without a word."""
    make, take_off = MADE[kind]
    model = make_model(width=64)
    layer = model.model.layers[0].self_attn.q_proj
    make(layer)
    said = r"q_proj\.\S+: a layer's weight is made from this .* parametrize\.remove_.*, or freeze it"
    with pytest.raises(UnsupportedModelError, match=said):
        SafetyProbe(model, anchors, pad_token_id=1)
    layer.requires_grad_(False)
    assert len(find_matrices(model)[0]) == 14
    layer.requires_grad_(True)
    take_off(layer)
    before = logits(model, anchors[:1])
    probe = SafetyProbe(model, anchors[:1], pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), probe, NullSpace(rank=40))
    train(model, optimizer, 2)
    optimizer.finish()
    assert len(probe.matrices) == 15
    for old, new in zip(before, logits(model, anchors[:1]), strict=True):
        assert torch.allclose(old, new, atol=1e-5)
