"""Over-refusals: refused prompts that look harmless to the model itself are told from what data attack."""

import itertools
import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import spf.audit
import spf.over_refusal
from spf import SPF, NullSpace, SafetyCallback
from spf.announce import audit_lines
from spf.audit import audit_data
from spf.cli import main
from spf.conflicts import Audit, Conflict
from spf.data import SafetyRow, packaged_prompts
from spf.leaving_out import without
from spf.over_refusal import clearly_harmless, common_ending, harmfulness, middle_states
from tests.conftest import make_model, make_tokenizer
from tests.support_matrix import FAMILIES
from tests.test_audit import COMPLIES, REFUSAL, chat_ids, data_with

TASKS = packaged_prompts("harmless_tasks")
HARMFUL = packaged_prompts("harmful_anchors")
ROWS = [SafetyRow([{"role": "user", "content": p}], "No.", f"row {i}") for i, p in enumerate(HARMFUL[:8])]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def asked(tokenizer, prompts):
    return [tuple(chat_ids(tokenizer, [{"role": "user", "content": prompt}], True)) for prompt in prompts]


def test_the_probe_is_the_library_s_logistic_regression_on_standardised_states():
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(40, 90, generator=generator) * torch.rand(90, generator=generator), torch.arange(40) % 4 == 0
    X[y] += 0.3
    asked = torch.randn(7, 90, generator=generator)
    library = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", tol=1e-10))
    wanted = library.fit(X.numpy(), y.numpy()).predict_proba(asked.numpy())[:, 1]
    assert harmfulness(X, y, asked).tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_constant_dimension_is_no_harm():
    X, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) < 6
    X[:, 2] = 3.0
    assert torch.isfinite(harmfulness(X, y, X)).all()


def test_common_ending():
    assert common_ending([(1, 2, 3), (4, 2, 3), (3, 3)]) == 1
    assert common_ending([(1, 2, 3), (2, 3)]) == 2
    assert common_ending([(1,), (2,)]) == 0


@pytest.fixture(autouse=True)
def eight_together(monkeypatch):
    """Several batches of a few prompts."""
    monkeypatch.setattr("spf.next_token.TOGETHER", 8)


def test_middle_states_are_those_before_the_ending_whatever_the_padding(tokenizer):
    model = make_model(width=32)
    prompts = asked(tokenizer, ["Hi", "How far is it to the next town, please?", "Why?"])
    ending = common_ending(prompts)
    found = middle_states(model, prompts, ending)
    layer = model.config.num_hidden_layers // 2
    for prompt, state in zip(prompts, found, strict=True):
        whole = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer]
        assert torch.allclose(state, whole[0, len(prompt) - ending - 1], atol=1e-5)
    assert model.training


def read_one_by_one(model, prompts):
    layer = model.config.num_hidden_layers // 2
    whole = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[layer][0] for p in prompts]
    return torch.stack([w[len(p) - ENDING - 1] for w, p in zip(whole, prompts, strict=True)]).detach()


ENDING = 3


def of_tokens(beginning):
    """Twenty prompts of several lengths, whose first tokens are the same, and whose last `ENDING`."""
    ids = torch.randint(5, 900, (20, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return [(*range(5, 5 + beginning), *row[: 4 + i % 7], 7, 8, 9) for i, row in enumerate(ids)]


def last_layer_calls(model, calls):
    def seen(*args):
        calls.append(1)

    model.model.layers[-1].register_forward_hook(seen)


def test_middle_states_stop_half_way_and_read_what_is_shared_once():
    """The first batch is read both ways; of the others the model's upper half is left out."""
    model, prompts = make_model(width=32), of_tokens(beginning=12)
    wanted = read_one_by_one(model, prompts)
    calls, widths = [], []
    last_layer_calls(model, calls)
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    assert torch.allclose(middle_states(model, prompts, ENDING), wanted, atol=1e-5)
    # asking whether the shared beginning may be read apart, that beginning, and the first batch
    assert len(calls) == 4
    assert len(widths) == 3 + 1 + 3
    assert max(widths[3:]) < min(map(len, prompts))


def test_middle_states_of_prompts_that_share_all_but_a_little():
    model, prompts = make_model(width=32), of_tokens(beginning=12)[:1] * 4
    assert torch.allclose(middle_states(model, prompts, ENDING), read_one_by_one(model, prompts), atol=1e-5)


def test_layers_that_are_not_the_decoder_s_are_not_stopped_at():
    """A tower with as many layers stands before them; it is not called for text."""
    model = make_model(width=32)
    tower = torch.nn.ModuleList(torch.nn.Identity() for _ in range(model.config.num_hidden_layers))
    model._modules = {"tower": tower, **model._modules}
    prompts = of_tokens(beginning=2)
    wanted = read_one_by_one(model, prompts)
    calls = []
    last_layer_calls(model, calls)
    assert torch.allclose(middle_states(model, prompts, ENDING), wanted, atol=1e-5)
    assert len(calls) >= 3


def test_another_layer_s_states_are_not_taken(monkeypatch):
    """Stopping gives something of the right shape that is not what the model says of that layer."""
    model = make_model(width=32)
    prompts = of_tokens(beginning=2)
    wanted = read_one_by_one(model, prompts)
    monkeypatch.setattr(
        "spf.shared_prefix.MiddleStates._stopped",
        lambda self, prompts, rows, places: torch.ones(len(prompts), model.config.hidden_size),
    )
    assert torch.allclose(middle_states(model, prompts, ENDING), wanted, atol=1e-5)


def test_a_model_whose_parameters_are_gathered_is_not_stopped(monkeypatch):
    """Its other processes make whole passes, and wait for this one."""
    model, prompts = make_model(width=32), of_tokens(beginning=2)
    monkeypatch.setattr("spf.shared_prefix.shares_parameters", lambda model: True)
    calls = []
    last_layer_calls(model, calls)
    assert torch.allclose(middle_states(model, prompts, ENDING), read_one_by_one(model, prompts), atol=1e-5)
    assert len(calls) == 3 + len(prompts)


def test_states_of_several_streams_say_nothing():
    """Gemma 3n's are (streams, B, L, n): they were indexed as (B, L, n), which ended the audit."""
    model = FAMILIES[[family.kind for family in FAMILIES].index("gemma3n_text")].model()
    assert middle_states(model, of_tokens(beginning=2), ENDING) is None


@pytest.fixture
def split(monkeypatch, tokenizer):
    """Prompts with what looks harmful in them, and such without; states tell them apart by so much."""
    harmful = set(asked(tokenizer, [*HARMFUL, "an attack"]))

    def by(distance):
        def states(model, prompts, ending, progress):
            found = torch.randn(len(prompts), 256, generator=torch.Generator().manual_seed(0))
            found[:, :128] += distance * torch.tensor([[float(prompt in harmful)] for prompt in prompts])
            return found

        monkeypatch.setattr(spf.over_refusal, "middle_states", states)

    return by


def test_what_looks_harmless_is_called_so(split, tokenizer):
    split(6.0)
    prompts = asked(tokenizer, ["an attack", "a task of mine", "another"])
    cut = prompts[1][:-1]  # does not end as the template has it
    assert clearly_harmless(None, tokenizer, [*prompts, cut], ROWS) == [False, True, True, False]
    assert clearly_harmless(None, tokenizer, [], ROWS) == []


def test_a_probe_that_cannot_tell_calls_nothing_harmless(split, tokenizer, monkeypatch):
    prompts = asked(tokenizer, TASKS)
    split(0.0)
    assert not any(clearly_harmless(None, tokenizer, prompts, ROWS))
    split(6.0)
    assert all(clearly_harmless(None, tokenizer, prompts, ROWS))
    # no context is long enough for a sample
    assert not any(clearly_harmless(None, tokenizer, prompts, ROWS, max_length=3))
    monkeypatch.setattr(
        spf.over_refusal, "middle_states", lambda model, asked, *_: torch.full((len(asked), 9), torch.nan)
    )
    assert not any(clearly_harmless(None, tokenizer, prompts, ROWS))
    monkeypatch.setattr(spf.over_refusal, "middle_states", lambda *args: None)
    assert not any(clearly_harmless(None, tokenizer, prompts, ROWS))


def test_a_probe_that_takes_harmful_prompts_for_harmless_calls_nothing_harmless(tokenizer, monkeypatch):
    """It tells most apart, but one in ten of the harmful ones lies among the harmless: it would let attacks go."""
    harmful = set(asked(tokenizer, HARMFUL))

    def states(among):
        def found(model, prompts, ending, progress):
            numbers = itertools.count()
            kinds = [float(prompt in harmful and next(numbers) % among > 0) for prompt in prompts]
            return torch.randn(len(prompts), 256, generator=torch.Generator().manual_seed(0)) + 6 * torch.tensor(
                kinds
            ).unsqueeze(1)

        return found

    prompts = asked(tokenizer, TASKS)
    monkeypatch.setattr(spf.over_refusal, "middle_states", states(101))
    assert all(clearly_harmless(None, tokenizer, prompts, ROWS))
    monkeypatch.setattr(spf.over_refusal, "middle_states", states(11))
    assert not any(clearly_harmless(None, tokenizer, prompts, ROWS))


@pytest.mark.parametrize(("tasks", "least", "most"), [(40, 6, 8), (4, 0, 1)])
def test_what_is_like_a_task_that_was_let_go_is_let_go_too(tokenizer, monkeypatch, tasks, least, most):
    """Only if most of what is refused is such a task: else a few attacks that fool the probe would bring others."""

    def states(model, prompts, ending, progress):
        found = torch.randn(len(prompts), 256, generator=torch.Generator().manual_seed(0))
        found[: spf.over_refusal.HARMFUL, :128] += 1.0
        # the task has a place of its own, and some of it is not far enough from what is harmful
        found[-tasks - 8 :, 128:] += 2.0
        found[-8:, :128] += 0.3
        return found

    monkeypatch.setattr(spf.over_refusal, "middle_states", states)
    prompts = asked(tokenizer, [f"{task} {i}" for i in range(3) for task in TASKS])[: tasks + 8]
    found = clearly_harmless(None, tokenizer, prompts, ROWS)
    assert sum(found[:tasks]) > 0.9 * tasks
    assert least <= sum(found[tasks:]) <= most


def test_a_model_s_own_safety_data_are_harmful_too(split, tokenizer, monkeypatch):
    """What a policy of the user's refuses is no task: their rows come before the packaged ones."""
    seen = []
    monkeypatch.setattr(spf.over_refusal, "middle_states", lambda model, prompts, *rest: seen.extend(prompts))
    policy = [SafetyRow([{"role": "user", "content": f"Which shares should I buy, {i}?"}], "No.", "") for i in range(9)]
    clearly_harmless(None, tokenizer, asked(tokenizer, ["x"]), policy)
    own = asked(tokenizer, [row.messages[0]["content"] for row in policy])
    assert seen[:9] == own
    assert len(seen) == spf.over_refusal.HARMFUL + len(TASKS) + len(packaged_prompts("benign_anchors")) + 1


def found_of(*kinds):
    """An audit of one conflict a row, of the prompt (row,)."""
    conflicts = [Conflict(row, 1.0, (row,), (1,)) for row in range(len(kinds))]
    found = Audit(len(kinds), prompts=len(kinds), refused=len(kinds), conflicts=conflicts)
    found.answers = Counter((row, 0) for row in range(len(kinds)))
    found.leaning = [Conflict(90 + row, 0.1, (row,), (1,)) for row in range(len(kinds))]
    found.set_apart({(row,) for row, kind in enumerate(kinds) if kind == "harmless"})
    return found


def test_over_refusals_are_no_conflicts_and_are_listed(tmp_path):
    found = found_of("harmful", "harmless", "harmful")
    assert found.conflicting_rows == [0, 2]
    assert [conflict.row for conflict in found.leaning] == [90, 92]
    held, watched = found.split()
    assert [anchor.prompt_ids for anchor in held + watched] == [[0], [2], [0], [2]]
    assert without(Dataset.from_dict({"x": [1, 2, 3]}), found.pressing, False)["x"] == [2]
    found.write(tmp_path / "list.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    told = [(entry["row"], entry["refused"], entry["over_refusal"]) for entry in listed]
    assert told == [(0, True, False), (2, True, False), (90, False, False), (92, False, False), (1, True, True)]
    lines = audit_lines(data_with(found, "hold"), NullSpace())
    assert "2 of 3 training rows answer prompts that the model refuses, and 1 answer prompts that it" in lines[0]
    assert lines[1].startswith("1 rows answer what the model refuses although it looks harmless to itself")
    assert "conflicts='hold-all'" in lines[1]
    assert not any("hold-all" in line for line in audit_lines(data_with(found, "allow"), NullSpace()))


@pytest.mark.parametrize(
    ("conflicts", "rule", "held"),
    [
        ("hold", NullSpace(), 0),
        ("drop", NullSpace(), 0),
        ("hold-all", NullSpace(), 4),
        # nothing depends on it there, so the probe's passes are saved
        ("allow", NullSpace(), 4),
        ("hold", SPF(), 4),
        ("drop", SPF(), 0),
    ],
)
def test_the_callback_holds_over_refusals_only_if_asked(tmp_path, tokenizer, monkeypatch, conflicts, rule, held):
    monkeypatch.setattr(
        spf.audit, "clearly_harmless", lambda model, tokenizer, prompts, *_, **__: [True] * len(prompts)
    )
    monkeypatch.setattr(spf.audit, "CONFIRM", 0.0)
    data = Dataset.from_list([{"prompt": task, "completion": COMPLIES} for task in TASKS[:4]])
    callback = SafetyCallback(conflicts=conflicts, rule=rule)
    rows = [SafetyRow([{"role": "user", "content": HARMFUL[0]}], REFUSAL, "", True, True)]
    first = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(spf.audit, "ask", lambda model, prompts, *rest: [(1.0, first)] * len(prompts))
    found = callback.data.audit(data, make_model(width=32), tokenizer, rows, tmp_path)
    assert (len(found.conflicts), len(found.over_refusals)) == (held, 4 - held)
    assert len(found.split()[0]) == held
    assert found.refused == 4
    listed = [json.loads(line) for line in (tmp_path / "spf_conflicts.jsonl").read_text().splitlines()]
    assert [entry["over_refusal"] for entry in listed] == [held == 0] * 4


def test_the_command_shows_them_and_fails_for_conflicts_only(tmp_path, tokenizer, monkeypatch, capsys):
    model = tmp_path / "model"
    make_model(width=32).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": t, "completion": "Yes."}) + "\n" for t in TASKS[:3]))
    safety = tmp_path / "safety.jsonl"
    safety.write_text(json.dumps({"prompt": HARMFUL[0], "refusal": "I cannot."}) + "\n")
    found = found_of("harmless", "harmful", "harmless")
    found.conflicts, found.leaning = [], []
    monkeypatch.setattr("spf.audit_command.audit_data", lambda *args, **options: found)
    arguments = ["--model", str(model), "--safety_data", str(safety), "--output", str(tmp_path / "output")]
    main(["audit", str(data), *arguments, "--show", "--fail_over", "0"])
    shown = capsys.readouterr().out
    assert "0 of 3 training rows" in shown
    assert shown.count("1.00    over-refusal ") == 2  # rich puts blanks for tabs
    assert audit_data is spf.audit.audit_data
