import pytest
import torch

from spf.lab.analysis.activations import capture, find_mlps, local_lipschitz
from spf.lab.analysis.inputs import Prompts
from tests.conftest import make_model


def make_prompts(count=5, longest=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest - i % 4 for i in range(count)]
    ids, mask = torch.ones(count, longest, dtype=torch.long), torch.zeros(count, longest, dtype=torch.long)
    for i, length in enumerate(lengths):
        ids[i, -length:] = torch.randint(5, 2048, (length,), generator=generator)
        mask[i, -length:] = 1
    return Prompts(ids, mask)


def alone(prompts, i):
    return Prompts(prompts.input_ids[i : i + 1], prompts.attention_mask[i : i + 1])[0:1]


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2"])
def test_capture_is_the_input_of_the_second_layer_whatever_the_padding(kind):
    model = make_model(kind)
    prompts = make_prompts()
    found = capture(model, prompts, positions=3, batch_size=2)
    assert not any(module._forward_pre_hooks for module in model.modules())
    # by hand, one prompt at a time, without pads
    records = {}

    def record(layer):
        return lambda module, args, output: records.__setitem__(layer, args[0])

    for layer, mlp in enumerate(find_mlps(model)):
        mlp.second[1].register_forward_hook(record(layer))
    for i in range(len(prompts)):
        with torch.no_grad():
            model.eval()(input_ids=alone(prompts, i).input_ids)
        for layer, hidden in enumerate(found.hidden):
            torch.testing.assert_close(hidden[i], records[layer][0, -3:].mean(0), atol=1e-5, rtol=1e-4)


def test_capture_keeps_every_neuron_and_reads_the_first_layers_input_at_the_last_token():
    # the released code kept 192 of 768 neurons
    model = make_model("llama")
    found = capture(model, make_prompts(), positions=2)
    mlp = find_mlps(model)[1]
    assert found.hidden[1].shape == (5, model.config.intermediate_size)
    prompts = alone(make_prompts(), 3)
    seen = []
    handle = mlp.first["up_proj"].register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model.eval()(input_ids=prompts.input_ids)
    handle.remove()
    torch.testing.assert_close(found.inputs[1][3], seen[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generated_positions_are_the_greedy_answer(kind):
    model = make_model(kind)
    prompts = make_prompts(3)
    found = capture(model, prompts, positions=4, generated=3)
    for i in range(3):
        ids = alone(prompts, i).input_ids
        with torch.no_grad():
            for _ in range(3):
                ids = torch.cat([ids, model.eval()(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        whole = capture(model, Prompts(ids, torch.ones_like(ids)), positions=4)
        torch.testing.assert_close(found.hidden[1][i], whole.hidden[1][0], atol=1e-5, rtol=1e-4)


def test_embeddings_in_place_of_tokens_give_the_same():
    model = make_model("llama")
    ids = torch.randint(5, 2048, (3, 6))
    tokens = Prompts(ids, torch.ones_like(ids))
    for a, b in (
        (
            capture(model, tokens, positions=3, generated=2),
            capture(model, tokens.embed(model), positions=3, generated=2),
        ),
    ):
        torch.testing.assert_close(a.hidden, b.hidden)
        torch.testing.assert_close(a.inputs, b.inputs)
    torch.testing.assert_close(local_lipschitz(model, tokens), local_lipschitz(model, tokens.embed(model)))


def test_lipschitz_agrees_with_finite_differences_and_ignores_pads_and_the_last_token():
    model = make_model("llama").eval()
    prompts = make_prompts(3)
    found = local_lipschitz(model, prompts, batch_size=2)
    for i in range(3):
        single = alone(prompts, i)
        embeds = single.embed(model)

        def top(x):
            with torch.no_grad():
                return float(model(inputs_embeds=x).logits[0, -1].max())

        squares, step = 0.0, 1e-2
        for position in range(embeds.shape[1] - 1):
            for d in range(embeds.shape[2]):
                moved = embeds.clone()
                moved[0, position, d] += step
                up = top(moved)
                moved[0, position, d] -= 2 * step
                squares += ((up - top(moved)) / (2 * step)) ** 2
        assert float(found[i]) == pytest.approx(squares**0.5, rel=5e-3)


class Linear(torch.nn.Module):
    """logits = W (sum of embeddings): local Lipschitzness has a closed form."""

    def __init__(self, W):
        super().__init__()
        self.W = torch.nn.Parameter(W)
        self.embedding = torch.nn.Embedding(7, W.shape[1])
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, **kwargs):
        return type("Output", (), {"logits": (inputs_embeds.sum(1) @ self.W.T)[:, None]})


def test_lipschitz_of_a_linear_model_is_the_norm_of_its_weights():
    torch.manual_seed(0)
    model = Linear(torch.randn(4, 3))
    ids = torch.randint(0, 7, (6, 5))
    found = local_lipschitz(model, Prompts(ids, torch.ones_like(ids)), batch_size=4)
    with torch.no_grad():
        top = (model.embedding(ids).sum(1) @ model.W.T).argmax(-1)
    # the same row w reaches each of the four tokens before the last: ||(w, w, w, w)|| = 2 ||w||
    torch.testing.assert_close(found, 2 * model.W[top].norm(dim=1).detach())


def test_nothing_is_left_in_the_model():
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model, make_prompts(), positions=3, generated=1)
    local_lipschitz(model, make_prompts())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_unusable_input_is_refused_in_a_sentence():
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="padded on the left"):
        Prompts(ids, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="no prompts"):
        Prompts(ids[:0], ids[:0])
    with pytest.raises(ValueError, match="must both be"):
        Prompts(ids, ids[:, 1:])
    model = make_model("llama")
    prompts = make_prompts(4, longest=5)  # the shortest has two tokens
    with pytest.raises(ValueError, match="takes 3 prompt tokens, and a prompt has only 2"):
        capture(model, prompts, positions=3)
    with pytest.raises(ValueError, match="at least one prompt token"):
        capture(model, prompts, positions=2, generated=2)
    with pytest.raises(ValueError, match="one token"):
        local_lipschitz(model, Prompts(ids[:, :1], ids[:, :1]))
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="2 MLPs of a known kind in 3 layers"):
        capture(model, prompts, positions=1)
