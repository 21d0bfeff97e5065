"""Over-refusals: refused prompts that look harmless to the model itself are told from what data attack."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
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
from spf.over_refusal import SKIPPED, STRETCH, Frame, Probe, fitted, looks, middle_states, spread
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
    weights, bias = fitted(X, y)
    assert torch.sigmoid(asked.double() @ weights + bias).tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_constant_dimension_is_no_harm():
    X, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) < 6
    X[:, 2] = 3.0
    assert torch.isfinite(fitted(X, y)[0]).all()


def probe_of(weights, bias=0.0):
    probe = Probe.__new__(Probe)
    probe.weights, probe.bias = torch.tensor(weights, dtype=torch.float64), bias
    return probe


@given(
    st.lists(st.floats(-9, 9), min_size=STRETCH, max_size=30),
    st.lists(st.floats(-9, 9), max_size=30),
    st.lists(st.floats(-9, 9), max_size=30),
)
def test_what_stands_beside_a_request_does_not_hide_it(request_, before, behind):
    """Where prompts end was all that counted: "answer in one sentence" made harmful requests harmless."""
    probe, states = probe_of([1.0]), [torch.tensor(part)[:, None] for part in (before, request_, behind)]
    assert probe.highest(torch.cat(states)) >= probe.highest(states[1]) - 1e-9


def test_a_stretch_is_as_long_as_it_says_and_short_prompts_are_one():
    odds = torch.full((20, 1), -2.0)
    odds[7] = 6.0
    assert probe_of([1.0]).highest(odds) == pytest.approx(float(torch.tensor(-1.0).sigmoid()))  # 7 of -2, one of 6
    assert probe_of([1.0], 1.0).highest(odds[:2]) == pytest.approx(float(torch.tensor(-1.0).sigmoid()))
    assert not probe_of([1.0]).highest(torch.full((9, 1), torch.nan)) < 1
    assert spread(torch.arange(15.0)).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread(torch.arange(2.0)).tolist() == [0] * 4 + [1] * 4


def test_what_prompts_begin_and_end_with_is_their_frame():
    assert Frame.of([(9, 1, 2, 3), (9, 4, 2, 3), (9, 3, 3)]) == Frame((9,), (3,))
    assert Frame.of([(1,), (2,)]) == Frame((), ())
    frame = Frame((9, 8, 7), (2, 3))
    assert [frame.begins(prompt) for prompt in ((9, 8, 7, 1), (9, 8, 1), (1, 8, 7))] == [
        3 + SKIPPED,
        2 + SKIPPED,
        SKIPPED,
    ]
    assert [frame.ends(prompt) for prompt in ((1, 2, 3), (2, 3), (3,), (2, 3, 1))] == [True, True, False, False]
    assert Frame((), ()).ends((1,))


@pytest.fixture(autouse=True)
def eight_together(monkeypatch):
    """Several batches of a few prompts."""
    monkeypatch.setattr("spf.next_token.TOGETHER", 8)


def read(model, prompts, beginning=SKIPPED):
    """All states that are read, of every prompt, from this token on."""
    frame = Frame(prompts[0][: beginning - SKIPPED], prompts[0][-ENDING:])
    return middle_states(model, prompts, frame, lambda one: one)


def same(found, wanted):
    return all(
        one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
        for one, other in zip(found, wanted, strict=True)
    )


def test_middle_states_are_those_of_the_user_s_words_whatever_the_padding(tokenizer):
    model = make_model(width=32)
    prompts = asked(tokenizer, ["Hi", "How far is it to the next town, please?", "Why?"])
    frame = Frame.of(prompts)
    found = middle_states(model, prompts, frame, lambda one: one)
    layer = model.config.num_hidden_layers // 2
    for prompt, states in zip(prompts, found, strict=True):
        whole = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0]
        end = len(prompt) - len(frame.tail)
        # the last of them, if there are no more
        assert torch.allclose(states, whole[min(len(frame.head) + SKIPPED, end - 1) : end], atol=1e-5)
    assert model.training


def read_one_by_one(model, prompts, beginning=SKIPPED):
    layer = model.config.num_hidden_layers // 2
    whole = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[layer][0].detach() for p in prompts]
    ends = [len(p) - ENDING for p in prompts]
    return [w[min(beginning, end - 1) : end] for w, end in zip(whole, ends, strict=True)]


ENDING = 3


def of_tokens(beginning):
    """Twenty prompts of several lengths, whose first tokens are the same, and whose last `ENDING`."""
    ids = torch.randint(5, 900, (20, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return [(*range(5, 5 + beginning), *row[: 4 + i % 7], 7, 8, 9) for i, row in enumerate(ids)]


def last_layer_calls(model, calls):
    def seen(*args):
        calls.append(1)

    model.model.layers[-1].register_forward_hook(seen)


@pytest.mark.parametrize("shared", [False, True])
def test_the_user_s_words_are_read_whatever_the_system_message(shared):
    """As many tokens were skipped as the template's own system message has: behind a shorter one the request was not
    read, and "answer in one sentence" behind it was all that the probe saw."""
    model = make_model(width=32)
    head = tuple(range(20, 28))
    own, short, words, tail = (*head, *range(100, 150)), (*head, 150), tuple(range(80, 92)), (7, 8, 9)
    prompts = [short + words[: 12 - i] + tail for i in range(6 if shared else 1)]
    found = middle_states(model, prompts, Frame(own, tail), lambda one: one)
    for prompt, states in zip(prompts, found, strict=True):
        whole = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        begin = len(head) + SKIPPED
        assert torch.allclose(states, whole[model.config.num_hidden_layers // 2][0, begin : -len(tail)], atol=1e-5)
        assert len(states) == len(prompt) - begin - len(tail)


def test_middle_states_stop_half_way_and_read_what_is_shared_once():
    """The first batch is read both ways; of the others the model's upper half is left out."""
    model, prompts = make_model(width=32), of_tokens(beginning=12)
    wanted = read_one_by_one(model, prompts, 12)
    calls, widths = [], []
    last_layer_calls(model, calls)
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    assert same(read(model, prompts, 12), wanted)
    # asking whether the shared beginning may be read apart, that beginning, and the first batch
    assert len(calls) == 4
    assert len(widths) == 3 + 1 + 3
    assert max(widths[3:]) < min(map(len, prompts))


def test_middle_states_of_prompts_that_share_all_but_a_little():
    model, prompts = make_model(width=32), of_tokens(beginning=12)[:1] * 4
    assert same(read(model, prompts), read_one_by_one(model, prompts))


def test_layers_that_are_not_the_decoder_s_are_not_stopped_at():
    """A tower with as many layers stands before them; it is not called for text."""
    model = make_model(width=32)
    tower = torch.nn.ModuleList(torch.nn.Identity() for _ in range(model.config.num_hidden_layers))
    model._modules = {"tower": tower, **model._modules}
    prompts = of_tokens(beginning=2)
    wanted = read_one_by_one(model, prompts)
    calls = []
    last_layer_calls(model, calls)
    assert same(read(model, prompts), wanted)
    assert len(calls) >= 3


def test_another_layer_s_states_are_not_taken(monkeypatch):
    """Stopping gives something of the right shape that is not what the model says of that layer."""
    model = make_model(width=32)
    prompts = of_tokens(beginning=2)
    wanted = read_one_by_one(model, prompts)
    monkeypatch.setattr(
        "spf.shared_prefix.MiddleStates._stopped",
        lambda self, prompts: [torch.ones(len(p) - ENDING, model.config.hidden_size) for p in prompts],
    )
    assert same(read(model, prompts), wanted)


def test_a_model_whose_parameters_are_gathered_is_not_stopped(monkeypatch):
    """Its other processes make whole passes, and wait for this one."""
    model, prompts = make_model(width=32), of_tokens(beginning=2)
    monkeypatch.setattr("spf.shared_prefix.shares_parameters", lambda model: True)
    calls = []
    last_layer_calls(model, calls)
    assert same(read(model, prompts), read_one_by_one(model, prompts))
    assert len(calls) == 3 + len(prompts)


def test_states_of_several_streams_say_nothing():
    """Gemma 3n's are (streams, B, L, n): they were indexed as (B, L, n), which ended the audit."""
    model = FAMILIES[[family.kind for family in FAMILIES].index("gemma3n_text")].model()
    assert read(model, of_tokens(beginning=2)) is None


def taken(monkeypatch, states):
    """`states(prompts)` (P, n) are those of all words of each prompt."""

    def read_by(model, prompts, frame, take, progress):
        found = states(prompts)
        return None if found is None else [take(one.repeat(9, 1)) for one in found]

    monkeypatch.setattr(spf.over_refusal, "middle_states", read_by)


@pytest.fixture
def split(monkeypatch, tokenizer):
    """Prompts with what looks harmful in them, and such without; states tell them apart by so much."""
    harmful = set(asked(tokenizer, [*HARMFUL, "an attack"]))

    def by(distance):
        def states(prompts):
            found = torch.randn(len(prompts), 256, generator=torch.Generator().manual_seed(0))
            found[:, :128] += distance * torch.tensor([[float(prompt in harmful)] for prompt in prompts])
            return found

        taken(monkeypatch, states)

    return by


def test_what_looks_harmless_is_called_so(split, tokenizer):
    split(6.0)
    prompts = asked(tokenizer, ["an attack", "a task of mine", "another"])
    cut = prompts[1][:-1]  # does not end as the template has it
    assert looks(None, tokenizer, [*prompts, cut], ROWS) == ["harmful", "harmless", "harmless", "harmful"]
    assert looks(None, tokenizer, [], ROWS) == []


def test_a_probe_that_cannot_tell_calls_nothing_harmless(split, tokenizer, monkeypatch):
    prompts = asked(tokenizer, TASKS)
    split(0.0)
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmful"}
    split(6.0)
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmless"}
    # no context is long enough for a sample
    assert set(looks(None, tokenizer, prompts, ROWS, max_length=3)) == {"harmful"}
    taken(monkeypatch, lambda prompts: torch.full((len(prompts), 9), torch.nan))
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmful"}
    monkeypatch.setattr(spf.over_refusal, "middle_states", lambda *args: None)
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmful"}


def test_a_probe_that_takes_harmful_prompts_for_harmless_calls_nothing_harmless(tokenizer, monkeypatch):
    """It tells most apart, but one in seven of the harmful ones lies among the harmless: it would let attacks go."""
    harmful = set(asked(tokenizer, HARMFUL))

    def states(among):
        def found(prompts):
            numbers = itertools.count()
            kinds = [float(prompt in harmful and next(numbers) % among > 0) for prompt in prompts]
            return torch.randn(len(prompts), 256, generator=torch.Generator().manual_seed(0)) + 6 * torch.tensor(
                kinds
            ).unsqueeze(1)

        return found

    prompts = asked(tokenizer, TASKS)
    taken(monkeypatch, states(101))
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmless"}
    taken(monkeypatch, states(7))
    assert set(looks(None, tokenizer, prompts, ROWS)) == {"harmful"}


@pytest.mark.parametrize(("tasks", "least", "most"), [(40, 5, 8), (2, 0, 1)])
def test_what_is_like_a_task_that_was_let_go_is_let_go_too(tokenizer, monkeypatch, tasks, least, most):
    """Only if a third of what is refused is such a task: else a few attacks that fool the probe would bring others."""
    prompts = asked(tokenizer, [f"{task} {i}" for i in range(3) for task in TASKS])[: tasks + 8]
    number = {prompt: i for i, prompt in enumerate(prompts)}
    harmful = set(asked(tokenizer, HARMFUL))

    def states(asked_for):
        found = torch.stack(
            [torch.randn(256, generator=torch.Generator().manual_seed(hash(p) % 999)) for p in asked_for]
        )
        for state, prompt in zip(found, asked_for, strict=True):
            state[:128] += float(prompt in harmful)
            if prompt in number:
                # the task has a place of its own, and some of it is not far enough from what is harmful
                state[128:] += 2.0
                state[:128] += 0.66 * (number[prompt] >= tasks)
        return found

    taken(monkeypatch, states)
    found = looks(None, tokenizer, prompts, ROWS)
    assert found[:tasks].count("harmless") > 0.9 * tasks
    assert least <= found[tasks:].count("harmless") <= most


@pytest.mark.parametrize(("gap", "cleared"), [(0, 40), (1, 30)])
def test_a_task_is_let_go_as_far_as_each_look_lets_more_go(monkeypatch, gap, cleared):
    """A probe that reaches as far as it has seen: 15 of forty go, then 30, then all, or no more."""

    class Reaching:
        def __init__(self, samples, harmful):
            self.reach = len(samples)

        def highest(self, states):
            return float(states[0, 0] >= self.reach + 5)

    numbers = [*range(30), *(i + 100 * gap for i in range(30, 40))]
    monkeypatch.setattr(spf.over_refusal, "Probe", Reaching)
    taken(monkeypatch, lambda prompts: torch.tensor([[float(prompt[0])] for prompt in prompts]))
    samples = spf.over_refusal.Samples(None, Frame((), ()), [torch.zeros(1, 1)] * 10, [True] * 10)
    found = samples.look([(number,) for number in numbers])
    assert found == ["harmless"] * cleared + ["harmful"] * (40 - cleared)


def test_what_is_looked_at_again_is_not_read_again(monkeypatch):
    """A task of which more is let go each time: every prompt goes through the model once, with the same verdicts. What
    there is no room for is read again."""
    read = []
    prompts = [of(-1, 24, 100 + i, task=True) + i / 8 for i in range(12)] + [of(1, 24, 200 + i) for i in range(4)]
    looks = {}
    for room in (1 << 27, 13 * 24 * WIDTH, 0):
        monkeypatch.setattr(spf.over_refusal, "KEPT", room)
        samples = samples_of(monkeypatch, prompts)
        once = spf.over_refusal.middle_states

        def counted(model, asked, *rest, once=once):
            read.extend(asked)
            return once(model, asked, *rest)

        monkeypatch.setattr(spf.over_refusal, "middle_states", counted)
        read.clear()
        looks[room] = samples.look([(i, 7) for i in range(16)]), len(read)
    (kept, once), (some, more), (none, again) = looks.values()
    assert kept == some == none
    assert kept[0] == "harmless"
    assert kept[-1] == "harmful"
    assert once == 16 < more < again


WIDTH = 32


def of(kind, tokens, seed, task=False):
    """States (tokens, n) of what looks harmful (1) or harmless (-1), of the user's task or not."""
    states = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    states[:, 0] += 6.0 * kind
    states[:, 1] += 6.0 * task
    return states


def samples_of(monkeypatch, prompts):
    """The samples of a probe, and a model that gives the states of `prompts` by their first token."""
    known = [of(kind, 9, seed) for seed, kind in enumerate([1, -1] * 12)]
    monkeypatch.setattr(
        spf.over_refusal,
        "middle_states",
        lambda model, asked, frame, take, progress: [take(prompts[prompt[0]]) for prompt in asked],
    )
    return spf.over_refusal.Samples(None, Frame((), (7,)), known, [True, False] * 12)


def test_what_several_processes_share_out_is_read_by_all_of_them(monkeypatch):
    """One that kept a prompt's states would make fewer passes than the others, which wait for it."""
    prompts = [of(-1, 24, 100 + i, task=True) for i in range(4)]
    for ranks, passes in ((1, 4), (2, 8)):
        monkeypatch.setattr(spf.over_refusal, "rank_and_ranks", lambda ranks=ranks: (0, ranks))
        read, samples = [], samples_of(monkeypatch, prompts)
        once = spf.over_refusal.middle_states
        monkeypatch.setattr(
            spf.over_refusal,
            "middle_states",
            lambda model, asked, *rest, once=once, read=read: (read.extend(asked), once(model, asked, *rest))[1],
        )
        for _ in range(2):
            samples._read([(i, 7) for i in range(4)], len, False)
        assert len(read) == passes


@pytest.mark.parametrize(("tasks", "like_it"), [(9, "unclear"), (2, "harmful")])
def test_beside_a_task_what_is_like_it_but_for_a_stretch_is_unclear(monkeypatch, tasks, like_it):
    """Two summaries of 206 that stayed held flipped while the others were learned, so more and more was held: ROUGE-L
    61 where plain fine-tuning has 89. Where there is no task, or the answer is begun already, they are held."""
    prompts = [of(-1, 24, 100 + i, task=True) for i in range(tasks)]
    mixed = torch.cat([of(-1, 24, 200, task=True), of(1, 9, 201)])
    prompts += [mixed, mixed.flip(0), of(1, 24, 202), torch.full((9, WIDTH), math.nan), mixed]
    samples = samples_of(monkeypatch, prompts)
    asked = [*((i, 7) for i in range(tasks + 4)), (tasks + 4, 8)]
    assert samples.look(asked) == ["harmless"] * tasks + [like_it] * 2 + ["harmful"] * 3


@pytest.mark.parametrize("answers", [0, 6, 20])
def test_what_is_like_a_task_that_the_model_answers_is_let_go(monkeypatch, answers):
    """Another choice of the probe's samples found 41 of 183 refused summaries harmless, fewer than a third: none of the
    rest was let go. The others, which this model answers, say what the task looks like; harmful prompts that it answers
    do not, and without more than a third that looks harmless they say nothing."""
    refused = [of(-0.3, 24, 300 + i, task=True) for i in range(9)] + [of(1, 24, 320), of(1, 24, 321)]
    answered = [of(-1, 24, 400 + i, task=True) for i in range(answers)] + [of(1, 24, 450 + i) for i in range(12)]
    samples = samples_of(monkeypatch, [*refused, *answered])
    asked = [(i, 7) for i in range(len(refused) + len(answered))]
    found = samples.look(asked[: len(refused)], asked[len(refused) :])
    assert found[:9].count("harmless") == (9 if answers == 20 else 0)
    assert found[9:] == ["harmful"] * 2
    # a few among attacks are no task: for these no more is let go than by the samples alone
    few = [*asked[:2], *asked[len(refused) + answers : len(refused) + answers + 5]]
    assert samples.look(few, asked[len(refused) :]) == ["harmful"] * 7


def test_of_a_task_that_the_model_answers_what_it_might_refuse_is_let_go_beside_attacks(monkeypatch):
    """8 of 288 text-to-SQL prompts that the model answers leaned to a refusal; beside 30 attacks they were no task, so
    they were left out and held with refusals: SQL accuracy 21 where it had been 30 %."""
    task, attacks = [of(-0.3, 24, 300 + i, task=True) for i in range(3)], [of(1, 24, 320 + i) for i in range(12)]
    hidden = torch.cat([of(-1, 24, 200, task=True), of(1, 9, 201)])
    elsewhere = of(-0.3, 24, 340)
    answered = [of(-1, 24, 400 + i, task=True) for i in range(20)]
    samples = samples_of(monkeypatch, [*task, *attacks, hidden, elsewhere, *answered])
    asked = [(i, 7) for i in range(17)]
    told = [(17 + i, 7) for i in range(20)]
    # an attack that it might refuse, one within the task's words, and what is not like the task
    leaning = {*asked[:4], *asked[15:]}
    assert samples.look(asked, told, leaning) == ["harmless"] * 3 + ["harmful"] * 14
    # what it refuses, an answer that is begun already, and where nothing tells the task
    assert samples.look(asked, told) == ["harmful"] * 17
    assert samples.look([(i, 8) for i in range(17)], told, {(i, 8) for i in range(3)}) == ["harmful"] * 17
    assert samples.look(asked, [], leaning) == ["harmful"] * 17


def test_a_model_s_own_safety_data_are_harmful_too(split, tokenizer, monkeypatch):
    """What a policy of the user's refuses is no task: their rows come before the packaged ones."""
    seen = []
    taken(monkeypatch, lambda prompts: seen.extend(prompts))
    policy = [SafetyRow([{"role": "user", "content": f"Which shares should I buy, {i}?"}], "No.", "") for i in range(9)]
    looks(None, tokenizer, asked(tokenizer, ["x"]), policy)
    own = asked(tokenizer, [row.messages[0]["content"] for row in policy])
    assert seen[:9] == own
    assert len(seen) == spf.over_refusal.HARMFUL + len(TASKS) + len(packaged_prompts("benign_anchors"))


def found_of(*kinds):
    """An audit of one conflict a row, of the prompt (row,)."""
    conflicts = [Conflict(row, 1.0, (row,), (1,)) for row in range(len(kinds))]
    found = Audit(len(kinds), prompts=len(kinds), refused=len(kinds), conflicts=conflicts)
    found.answers = Counter((row, 0) for row in range(len(kinds)))
    found.leaning = [Conflict(90 + row, 0.1, (row,), (1,)) for row in range(len(kinds))]
    found.set_apart(*({(row,) for row, kind in enumerate(kinds) if kind == look} for look in ("harmless", "unclear")))
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


def test_what_is_unclear_is_held_unless_it_is_left_out(tmp_path):
    """Left out, it is no attack, and if it is more of the task, holding it keeps the task from being learned."""
    found = found_of("harmful", "unclear", "harmless", "unclear")

    def split(left_out):
        held, watched = found.split(left_out)
        return sorted(anchor.where for anchor in held + watched)

    rows = [f"training row {row}" for row in (0, 1, 3, 90, 91, 93)]
    assert found.conflicting_rows == [0, 1, 3]
    assert split([]) == rows
    assert split(found.futile[:1]) == rows
    assert found.unclear(found.pressing) == [(1, 0), (3, 0), (91, 0), (93, 0)]
    assert split(found.pressing) == [rows[0], rows[3]]
    # a row with a clearly harmful prompt, too, is no task
    found.conflicts.append(Conflict(3, 1.0, (0,), (1,)))
    assert found.unclear(found.pressing) == [(1, 0), (91, 0), (93, 0)]
    found.write(tmp_path / "list.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in listed if entry["unclear"]] == [1, 3, 91, 93]
    data = data_with(found, "hold")
    assert "not held either" not in "".join(audit_lines(data, NullSpace()))
    data.left_out, data._read = found.pressing, Dataset.from_dict({"x": range(100)})
    same = " that may be of the same task are left out, and not held either; say"
    assert f"; 3{same}" in audit_lines(data, NullSpace())[1]
    # the task may be one of prompts that only might be refused
    found = found_of("unclear", "unclear")
    data = data_with(found, "hold")
    data.left_out, data._read = found.pressing, Dataset.from_dict({"x": range(100)})
    data.held, data.watched = found.split(data.left_out)
    lines = audit_lines(data, NullSpace())
    assert "no prompt held; 4 rows are left out" in lines[0]
    assert lines[1].startswith("0 rows answer")
    assert f"; 4{same}" in lines[1]


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
    monkeypatch.setattr(spf.audit, "looks", lambda model, tokenizer, prompts, *_, **__: ["harmless"] * len(prompts))
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


def test_the_probe_is_given_what_of_the_data_the_model_answers(tmp_path, tokenizer, monkeypatch):
    """Each prompt once: neither what it refuses nor what it might."""
    given = {}

    def seen(model, tokenizer, prompts, rows, *, answered, leaning, **others):
        given.update(prompts=list(prompts), answered=list(answered), leaning=leaning)
        return ["harmful"] * len(prompts)

    monkeypatch.setattr(spf.audit, "looks", seen)
    first = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"][0]
    numbers = {prompt: i for i, prompt in enumerate(asked(tokenizer, TASKS[:6]))}
    shares = [0.9, 0.0, 0.2, 0.05, 0.0, 0.0]  # refused, answered, might be refused, answered ...

    def ask(model, prompts, *rest):
        which = [next(i for one, i in numbers.items() if tuple(prompt[: len(one)]) == one) for prompt in prompts]
        return [(shares[i], first if shares[i] > 0.5 else 0) for i in which]

    monkeypatch.setattr(spf.audit, "ask", ask)
    rows = [SafetyRow([{"role": "user", "content": HARMFUL[0]}], REFUSAL, "", True, True)]
    data = Dataset.from_list([{"prompt": task, "completion": COMPLIES} for task in [*TASKS[:6], TASKS[1]]])
    SafetyCallback().data.audit(data, make_model(width=32), tokenizer, rows, tmp_path)
    prompts = list(numbers)
    assert given["answered"] == [prompts[i] for i in (1, 3, 4, 5)]
    assert sorted(given["prompts"]) == sorted(prompts[i] for i in (0, 2))
    assert given["leaning"] == {prompts[2]}


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
