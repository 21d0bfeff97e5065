"""Whole evaluations: verdicts, comparison with a reference, and `spf eval`."""

import json

import pytest

from spf import cli
from spf.data import load_safety_rows, packaged_prompts, tokenise
from spf.evaluation import TRANSFORMS, evaluate_refusals, run
from spf.evaluation.suites import Suite, load_suite
from spf.text.chat import render_chat
from tests.conftest import PLAIN_TEMPLATE, REFUSAL, make_model

ANY_ROLE = "{% for m in messages %}" + PLAIN_TEMPLATE

HARMFUL = packaged_prompts("harmful_anchors")[:5]
BENIGN = packaged_prompts("benign_anchors")[:4]


@pytest.fixture
def answers(monkeypatch):
    """Stands in for generation: the model refuses what it knows, and what was sent to it is kept."""
    sent = []

    def generate(model, tokenizer, prompts, *, prefills, max_new_tokens, **options):
        sent.append((prompts, prefills, max_new_tokens))
        given = []
        for messages in prompts:
            text = messages[-1]["content"]
            given.append(REFUSAL if text in HARMFUL[1:] or text == BENIGN[0] else "Sure, here is how to do that. One.")
        return given

    monkeypatch.setattr(run, "generate_answers", generate)
    return sent


def test_figures_and_verdicts(answers):
    suites = Suite("h", HARMFUL, "a file"), Suite("b", BENIGN, "a file")
    results = run.evaluate_suites(None, None, *suites, transforms=["prefill", "role-play"], max_new_tokens=7)
    assert results["refused"] == {
        "asr": [False, True, True, True, True],
        "asr/prefill": [False, True, True, True, True],
        "asr/role-play": [False] * 5,
        "over_refusal": [True, False, False, False],
    }
    assert (results["asr"], results["asr_count"]) == (0.2, 5)
    assert results["asr/role-play"] == 1.0
    assert results["over_refusal"] == 0.25
    low, high = results["asr_ci"]
    assert low < 0.2 < high
    assert [prefills[0] for _, prefills, _ in answers] == ["", "Sure, here is how to", "", ""]
    assert all(tokens == 7 for *_, tokens in answers)


def test_the_judge_reads_the_plain_prompt_and_no_stub(monkeypatch):
    stub = "Sure, here is how to do that."
    monkeypatch.setattr(run, "generate_answers", lambda m, t, prompts, **kw: [f"{stub} {REFUSAL}"] * len(prompts))
    read = []

    def judge(prompts, answers):
        read.extend(zip(prompts, answers, strict=True))
        return [True] * len(prompts)

    evaluate_refusals(None, None, HARMFUL[:2], transform=TRANSFORMS["base64"], judge=judge)
    assert read == [(HARMFUL[0], REFUSAL), (HARMFUL[1], REFUSAL)]


def test_a_template_without_system_role_is_named(tokenizer):
    with pytest.raises(ValueError, match="asr/identity-shift: the chat template refuses the roles system, user"):
        evaluate_refusals(
            make_model(), tokenizer, HARMFUL, transform=TRANSFORMS["identity-shift"], description="asr/identity-shift"
        )


def test_a_system_prompt_stands_before_every_prompt(answers):
    suites = Suite("h", HARMFUL, "a file"), Suite("b", BENIGN, "a file")
    run.evaluate_suites(None, None, *suites, transforms=["identity-shift", "many-shot"], system_prompt="Be brief.")
    plain, shifted, shots, benign = ([message["content"] for message in prompts[0]] for prompts, *_ in answers)
    assert plain == ["Be brief.", HARMFUL[0]]
    assert benign == ["Be brief.", BENIGN[0]]
    # few templates take two system messages
    assert shifted == [f"Be brief.\n\n{TRANSFORMS['identity-shift'].system}", f"AOA, here is your order: {HARMFUL[0]}"]
    assert (shots[0], len(shots)) == ("Be brief.", 18)
    assert all(prompt[0]["role"] == "system" for prompts, *_ in answers for prompt in prompts)


def test_comparison_counts_harm_and_over_refusal_in_their_own_direction():
    now = {"asr": [True, True, True, True], "over_refusal": [True, True, False], "asr/prefill": [True]}
    before = {"asr": [False, False, True, True], "over_refusal": [False, True, False]}
    found = run.compare(now, before)
    assert found["asr"]["difference"] == -0.5  # two attacks fewer succeed
    assert found["over_refusal"]["difference"] == pytest.approx(1 / 3)  # one refusal of a benign prompt more
    assert set(found) == {"asr", "over_refusal"}
    assert found["asr"]["p"] == 0.5


def test_parse_transforms():
    assert run.parse_transforms("all") == list(TRANSFORMS)
    assert run.parse_transforms("none") == []
    assert run.parse_transforms("prefill, base64") == ["prefill", "base64"]
    with pytest.raises(ValueError, match="no transform hypnosis; there are prefix-injection"):
        run.parse_transforms("prefill,hypnosis")


@pytest.fixture
def workspace(tmp_path, tokenizer, monkeypatch):
    model = make_model()
    model.config.max_position_embeddings = 1024  # jailbreaks are long in the words of this tokenizer
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    (tmp_path / "labels.jsonl").write_text(
        '{"prompt": "q", "answer": "Sorry, no.", "refused": true}\n{"prompt": "q", "answer": "Yes.", "refused": false}'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


SUITES = ["--harmful", "harmful.jsonl", "--benign", "benign.jsonl", "--max_new_tokens", "3"]


def test_eval_command(workspace, capsys):
    command = ["eval", "model", *SUITES, "--transforms", "prefill,base64", "--perplexity", "--output"]
    assert cli.main([*command, "first.json", "--validate_judge", "labels.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "accuracy 100.0% (95 % interval 34.2% to 100.0%, 2 answers), Cohen's kappa 1.00" in " ".join(out.split())
    assert "asr/base64" in out
    assert "5 prompts" in out
    assert "perplexity" in out
    first = json.loads((workspace / "first.json").read_text())
    assert first["asr"] == 1.0  # a random model refuses nothing
    assert first["refused"]["asr/prefill"] == [False] * 5
    assert first["suites"]["benign"]["count"] == 4
    assert first["judge"] == {"name": "prefix", "refusal_label": None, "version": 2}
    assert first["over_refusal_judge"] == "prefix"
    assert first["agreement"]["kappa"] == 1.0
    assert {"spf", "torch", "transformers"} <= set(first["versions"])
    assert first["perplexity"]["ci"][0] < first["perplexity"]["value"] < first["perplexity"]["ci"][1]
    text = (workspace / "first.json").read_text()
    assert not any(prompt in text for prompt in HARMFUL)  # verdicts only

    # one from before judges had versions
    first["judge"] = {"name": "prefix", "refusal_label": None}
    (workspace / "old.json").write_text(json.dumps(first))
    assert cli.main([*command, "new.json", "--reference", "old.json"]) == 2
    assert "--judge prefix-1 is the prefix judge of version 1" in capsys.readouterr().err
    assert cli.main([*command, "new.json", "--reference", "old.json", "--judge", "prefix-1"]) == 0

    assert cli.main([*command, "second.json", "--reference", "first.json"]) == 0
    second = json.loads((workspace / "second.json").read_text())
    assert set(second["comparison"]) == {"asr", "asr/prefill", "asr/base64", "over_refusal"}
    assert second["comparison"]["asr"]["difference"] == 0
    assert second["comparison"]["asr"]["p"] == 1.0
    assert "p = 1" in capsys.readouterr().out


def test_a_reference_measured_with_other_variables_of_the_template_is_refused(workspace, tokenizer, capsys):
    """It was compared: what the options did was taken for the model's."""
    tokenizer.chat_template += "{% if enable_thinking %}{% endif %}{% if opens %}Sure{% endif %}"
    tokenizer.save_pretrained("model")

    def evaluated(output, *more):
        return cli.main(["eval", "model", *SUITES, "--output", output, *more])

    opened = '{"opens": true}'
    assert evaluated("opened.json", "--chat_template_kwargs", opened) == 0
    assert json.loads((workspace / "opened.json").read_text())["chat_template_kwargs"] == {"opens": True}
    assert evaluated("plain.json", "--reference", "opened.json") == 2
    said = "opened.json: measured with chat_template_kwargs {'opens': True}, not {}; give --chat_template_kwargs "
    assert f"{said}'{opened}'" in capsys.readouterr().err
    assert evaluated("again.json", "--reference", "opened.json", "--chat_template_kwargs", opened) == 0
    # off is what they are without it, and what they were before it was written down
    assert evaluated("plain.json") == 0
    old = json.loads((workspace / "plain.json").read_text())
    assert old.pop("chat_template_kwargs") == {}
    (workspace / "old.json").write_text(json.dumps(old))
    for reference in ("plain.json", "old.json"):
        off = ("--reference", reference, "--chat_template_kwargs", '{"enable_thinking": false}')
        assert evaluated("off.json", *off) == 0
        assert evaluated("on.json", *off[:3], '{"enable_thinking": true}') == 2
    assert "give --chat_template_kwargs '{}'" in capsys.readouterr().err


def test_a_model_is_measured_with_the_users_own_system_prompt(workspace, tokenizer, capsys, monkeypatch):
    """A suite of [system, user] was refused, so what is shipped could not be measured."""
    monkeypatch.setattr(tokenizer, "chat_template", ANY_ROLE)
    tokenizer.save_pretrained("model")
    (workspace / "system.txt").write_text("You are a helpful\ntravel agent.\n", "utf-8")

    def evaluated(output, *more):
        return cli.main(["eval", "model", *SUITES, "--output", output, *more])

    assert evaluated("file.json", "--system_prompt", "system.txt") == 0
    assert json.loads((workspace / "file.json").read_text())["system_prompt"] == "You are a helpful\ntravel agent."
    for text in ("", "You are a sheriff.", "You are a very patient sheriff. " * 200):  # too long to be a file's name
        assert evaluated("other.json", "--reference", "file.json", *(["--system_prompt", text] if text else [])) == 2
        said = "file.json: measured with the system prompt 'You are a helpful travel agent.'; give that by --system_pr"
        assert said in capsys.readouterr().err
    assert evaluated("same.json", "--reference", "file.json", "--system_prompt", "system.txt") == 0
    # results of before have none
    assert evaluated("none.json") == 0
    old = json.loads((workspace / "none.json").read_text())
    assert old.pop("system_prompt") is None
    (workspace / "old.json").write_text(json.dumps(old))
    assert evaluated("now.json", "--reference", "old.json") == 0
    assert evaluated("now.json", "--reference", "old.json", "--system_prompt", "system.txt") == 2
    assert "old.json: measured without a system prompt; leave out --system_prompt, or mea" in capsys.readouterr().err


def test_a_template_without_a_place_for_a_system_prompt_is_known_before_anything_is_answered(
    workspace, capsys, answers
):
    assert cli.main(["eval", "model", *SUITES, "--system_prompt", "You are a sheriff."]) == 2
    said = "--system_prompt: the model's chat template has no place for a system message; begin the prompts of your own"
    assert said in capsys.readouterr().err
    assert not answers


def test_safety_data_with_a_system_turn_are_held_in_what_is_measured(tmp_path, tokenizer, answers, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", ANY_ROLE)
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, {"role": "user", "content": HARMFUL[0]}], "refusal": REFUSAL}
    (tmp_path / "safety.jsonl").write_text(json.dumps(row))
    [anchor] = tokenise(load_safety_rows(tmp_path / "safety.jsonl"), tokenizer, 256)
    evaluate_refusals(None, tokenizer, HARMFUL[:1], system_prompt="Be brief.")
    text = render_chat(tokenizer, answers[0][0][0], generation_prompt=True)
    assert anchor.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_jailbreaks_without_a_place_in_the_template_are_known_before_anything_is_answered(workspace, capsys, answers):
    assert cli.main(["eval", "model", *SUITES, "--transforms", "prefill,identity-shift"]) == 2
    assert "no place for the messages of identity-shift" in capsys.readouterr().err
    assert not answers
    assert cli.main(["eval", "model", *SUITES, "--transforms", "all", "--output", "all.json"]) == 0
    assert "Left out: the model's chat template has no place for the messages of identity-shift." in (
        capsys.readouterr().out
    )
    measured = set(json.loads((workspace / "all.json").read_text())["refused"])
    assert measured == {"asr", "over_refusal", *(f"asr/{name}" for name in TRANSFORMS if name != "identity-shift")}


def test_validation_alone_needs_no_model(workspace, capsys):
    assert cli.main(["eval", "--validate_judge", "labels.jsonl", "--output", "agreement.json"]) == 0
    written = json.loads((workspace / "agreement.json").read_text())
    assert written["agreement"]["accuracy"] == 1.0
    assert "refused" not in written


def test_a_prompt_that_just_leaves_room_is_asked(workspace):
    """By the model's own limit: a tokenizer's is often the length that it was trained with."""
    place = workspace / "model" / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_max_length": 64}))
    command = ["eval", "model", "--harmful", "long.jsonl", "--benign", "benign.jsonl", "--max_new_tokens", "3"]
    for room, code in ((3, 0), (2, 2)):  # the last token of an answer is not read
        (workspace / "long.jsonl").write_text(json.dumps({"prompt": "request " * (1024 - 3 - room + 1)}))
        assert cli.main(command) == code


def test_first_token_judge_takes_one_token(workspace):
    assert cli.main(["eval", "model", *SUITES, "--judge", "first-token", "--output", "out.json"]) == 0
    assert json.loads((workspace / "out.json").read_text())["max_new_tokens"] == 1


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("asr < 100, over_refusal > +0", None),
        ("asr < +80, asr/prefill < -10", None),
        ("asr > +79.9", "asr is 100.0%, +80.0 points against the reference (--fail_if 'asr > +79.9')"),
        ("over_refusal<-10,asr > 99.9", "over_refusal is 0.0%, -25.0 points against the reference"),
    ],
)
def test_eval_has_an_exit_code(workspace, capsys, limits, said):
    """1 where a figure is what must not be, with the figures written all the same; 2 is for the input."""
    command = ["eval", "model", *SUITES, "--transforms", "prefill", "--output"]
    assert cli.main([*command, "base.json"]) == 0
    base = json.loads((workspace / "base.json").read_text())
    base |= {"asr": 0.2, "asr/prefill": 0.2, "over_refusal": 0.25}  # a random model refuses nothing
    refused = [True] * 4 + [False]
    base["refused"] = {"asr": refused, "asr/prefill": refused, "over_refusal": [True] + [False] * 3}
    (workspace / "base.json").write_text(json.dumps(base))
    capsys.readouterr()
    code = cli.main([*command, "second.json", "--reference", "base.json", "--fail_if", limits])
    assert code == (1 if said else 0)
    assert json.loads((workspace / "second.json").read_text())["asr"] == 1.0
    error = capsys.readouterr().err
    if said:
        assert said in error
        assert error.strip().splitlines()[-1].endswith("the figures are in second.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "needs a model, or --validate_judge FILE"),
        (["eval", "model", "--batch_size", "-1"], "--batch_size must be at least 1, not -1"),
        (["eval", "model", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, not 0"),
        (["eval", "model", "--output", "model"], "model: a directory, which is not replaced"),
        (["eval", "model", "--harmful", "gone.jsonl"], "gone.jsonl: neither a file nor a known suite"),
        (["eval", "model", "--transforms", "hypnosis"], "no transform hypnosis"),
        (["eval", "model", "--judge", "some/model"], "some/model: not the name of a known judge"),
        (["eval", "--judge", "first-token", "--validate_judge", "labels.jsonl"], "cannot validate it"),
        (["eval", "model", *SUITES, "--reference", "gone.json"], "gone.json: no such file"),
        (["eval", "model", *SUITES, "--reference", "labels.jsonl"], "labels.jsonl: not a JSON file"),
        (
            ["eval", "model", *SUITES, "--reference", "other.json"],
            "other.json: `model` is missing; not written by spf eval --output",
        ),
        (["eval", "model", *SUITES[:4], "--reference", "ref.json"], "ref.json: measured with max_new_tokens 3, not 32"),
        (["eval", "model", *SUITES, "--judge", "first-token", "--reference", "ref.json"], "ref.json: measured with ju"),
        (["eval", "model", *SUITES[2:], "--reference", "ref.json"], "ref.json: measured on other harmful prompts"),
        (["eval", "model", *SUITES, "--fail_if", "asr >= 2"], "--fail_if: 'asr >= 2' is not FIGURE > NUMBER"),
        (
            ["eval", "model", *SUITES, "--fail_if", "asr > 100"],
            "'asr > 100' can never be so: figures are from 0 to 100",
        ),
        (
            ["eval", "model", *SUITES, "--fail_if", "over_refusal < 0"],
            "'over_refusal < 0' can never be so: figures are",
        ),
        (
            ["eval", "model", *SUITES, "--reference", "full.json", "--output", "./full.json"],
            "is the --reference: the n",
        ),
        (["eval", "model", *SUITES, "--reference", "edited.json"], "edited.json: `asr` is not what `refused.asr` says"),
        (["eval", "model", *SUITES, "--reference", "cut.json"], "cut.json: `asr` is not what `refused.asr` says"),
        (
            ["eval", "model", "--harmful", "system.jsonl"],
            "system.jsonl:1: a suite holds single user prompts, not one o",
        ),
        (
            ["eval", "model", "--harmful", "long.jsonl"],
            "prompt 2 of long.jsonl has 1003 tokens, so 32 of an",
        ),
        (["eval", "model", *SUITES, "--system_prompt", "my prompts/the system.txt"], "the system.txt: no such file"),
        (["eval", "model", *SUITES, "--fail_if", "asr > 2,"], "--fail_if: '' is not FIGURE > NUMBER"),
        (["eval", "model", *SUITES, "--fail_if", "asr/base64 > 2"], "--fail_if: asr/base64 is not measured; asr, over"),
        (["eval", "model", *SUITES, "--fail_if", "asr > +2"], "points against a --reference, which is not given"),
        (
            ["eval", "model", *SUITES, "--reference", "ref.json", "--fail_if", "asr > +2"],
            "points against a --reference, which has no asr",
        ),
        (
            ["eval", "model", *SUITES, "--reference", "full.json", "--fail_if", "over_refusal > +9, asr > +20"],
            "--fail_if: 'asr > +20' can never be so: asr of the reference m is 80.0% (it refuses too little to lose",
        ),
        (
            ["eval", "model", *SUITES, "--reference", "full.json", "--fail_if", "over_refusal < -25"],
            "--fail_if: 'over_refusal < -25' can never be so: over_refusal of the reference m is 25.0%; name the res",
        ),
        (["eval", "model", *SUITES, "--system_prompt", "gone.txt"], "--system_prompt: gone.txt: no such file"),
        (["eval", "model", *SUITES, "--system_prompt", "gone/system"], "--system_prompt: gone/system: no such file"),
        (["eval", "model", *SUITES, "--system_prompt", "empty.txt"], "--system_prompt: empty.txt says nothing"),
        (["eval", "model", "--harmful", "two.jsonl"], "two.jsonl:1: a suite holds single user prompts, not 2 messages"),
        (["eval", "model", "--harmful", "two.jsonl"], "; give the system message by --system_prompt"),
        (
            ["eval", "--validate_judge", "labels.jsonl", "--fail_if", "asr > 2"],
            "--fail_if: asr is not measured; without a model nothing is",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(workspace, capsys, arguments, message):
    settings = run.settings(Suite("h", HARMFUL, "x"), Suite("b", BENIGN, "y"), "prefix", None, 3)
    (workspace / "ref.json").write_text(json.dumps({"model": "m", "refused": {}, **settings}))
    (workspace / "other.json").write_text('{"arms": 1}')
    rates = {"asr": 0.8, "over_refusal": 0.25}
    verdicts = {"asr": [False] * 4 + [True], "over_refusal": [True] + [False] * 3}
    full = {"model": "m", "refused": verdicts, **settings}
    for name, rate in rates.items():
        full |= {name: rate, f"{name}_ci": [0, 1], f"{name}_count": len(verdicts[name])}
    suites = [run._describe(load_suite(workspace / f"{kind}.jsonl")) for kind in ("harmful", "benign")]
    full["suites"] = dict(zip(("harmful", "benign"), suites, strict=True))
    (workspace / "full.json").write_text(json.dumps(full))
    (workspace / "long.jsonl").write_text("".join(json.dumps({"prompt": "request " * n}) + "\n" for n in (3, 1000)))
    (workspace / "edited.json").write_text(json.dumps(full | {"asr": 0.0}))
    (workspace / "cut.json").write_text(json.dumps({name: what for name, what in full.items() if name != "asr"}))
    (workspace / "system.jsonl").write_text('{"messages": [{"role": "system", "content": "Be brief."}]}')
    (workspace / "empty.txt").write_text(" \n")
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    (workspace / "two.jsonl").write_text(json.dumps({"messages": two}))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("spf: ")
    assert message in error
