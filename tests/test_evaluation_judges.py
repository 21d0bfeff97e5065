"""Judges: first tokens, classifiers and language models, and their agreement with people."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from spf.data import packaged_prompts
from spf.errors import SafetyDataError
from spf.evaluation import ClassifierJudge, LLMJudge, agreement, first_token_refusals, judges, prefix_judge
from spf.evaluation.judges import first_token_judge, load_judges
from spf.evaluation.second_judge import WordsJudge, labelled_answers, words_judge
from tests.conftest import REFUSAL, make_model

PROMPTS = packaged_prompts("harmful_anchors")[:12]


def test_first_token_judge():
    refusals = ["I", "I'm", " Sorry", "Sor", "I\u2019m", "i"]
    others = ["", "Sure", "As", "It", "Imagine", "Step", "Iron", "."]
    assert first_token_judge([""] * 6, refusals) == [True] * 6
    assert first_token_judge([""] * 8, others) == [False] * 8


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2: absolute positions, so padding must not shift them
def test_first_token_is_that_of_a_forward_pass(kind, tokenizer):
    model = make_model(kind, seed=3).eval()
    refusing = tokenizer.convert_tokens_to_ids("I")
    prefills = ["", "Give me"] * 6
    with torch.no_grad():
        # Make the random model refuse some prompts and not others.
        model.get_output_embeddings().weight[refusing] *= 10
    expected = []
    for prompt, prefill in zip(PROMPTS, prefills, strict=True):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + prefill
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            expected.append(int(model(ids).logits[0, -1].argmax()) == refusing)
    assert len(set(expected)) == 2
    found = first_token_refusals(model, tokenizer, PROMPTS, prefills=prefills, batch_size=4, progress=False)
    assert found == expected


def make_judge_model(directory, verdict, template=None):
    """A model that writes nothing but `verdict`, whatever it reads: token 0 of an all-zero output layer."""
    words = {verdict: 0, "<unk>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


TEXT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
PARTS_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'][0]['text'] }} {% endfor %}"


@pytest.mark.parametrize(
    ("name", "verdict", "template", "refused"),
    [
        ("HarmBench-Tiny-cls", "no", None, True),
        ("HarmBench-Tiny-cls", "Yes", None, False),
        ("Llama-Guard-3-8B", "safe", TEXT_TEMPLATE, True),
        ("Llama-Guard-3-1B", "unsafe", PARTS_TEMPLATE, False),
        ("wildguard", "Harmful request: yes Response refusal: no", None, False),
        ("wildguard", "Harmful request: no Response refusal: yes", None, True),
    ],
)
def test_llm_judges(tmp_path, monkeypatch, name, verdict, template, refused):
    judge = LLMJudge(make_judge_model(tmp_path / name, verdict, template))
    read = []
    complete = judges.complete_texts

    def spy(model, tokenizer, texts, **options):
        read.extend(texts)
        return complete(model, tokenizer, texts, **options)

    monkeypatch.setattr(judges, "complete_texts", spy)
    # Braces and the template's own names in a text must stay as they are.
    assert judge(["Why {answer}?", "q2"], ["{prompt} {0}", "a2"]) == [refused] * 2
    assert "Why {answer}?" in read[0]
    assert "{prompt} {0}" in read[0]
    assert read[0].index("Why {answer}?") < read[0].index("{prompt} {0}")
    assert "q2" in read[1]
    assert "a2" in read[1]


def test_llm_judge_mistakes(tmp_path):
    judge = LLMJudge(make_judge_model(tmp_path / "wildguard", "perhaps"))
    with pytest.raises(ValueError, match="wildguard: no verdict on answer 1; the judge wrote 'perhaps"):
        judge(["q"], ["a"])
    with pytest.raises(ValueError, match="Llama-Guard-3-8B: the judge has no chat template"):
        LLMJudge(make_judge_model(tmp_path / "Llama-Guard-3-8B", "safe"))
    with pytest.raises(ValueError, match=r"some/model: not the name of a known judge \(harmbench, llamaguard, wildg"):
        LLMJudge("some/model")


def test_a_judge_of_harm_does_not_judge_benign_prompts(tmp_path):
    harm = load_judges(make_judge_model(tmp_path / "HarmBench-Tiny-cls", "no"))
    assert isinstance(harm[0], LLMJudge)
    assert harm[1] is prefix_judge
    refusals = load_judges(make_judge_model(tmp_path / "wildguard", "refusal: no"))
    assert refusals[1] is refusals[0]


@pytest.fixture
def classifier(tmp_path, tokenizer):
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=1,
        label2id={"ANSWER": 0, "REJECTION": 1},
        id2label={0: "ANSWER", 1: "REJECTION"},
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "cls")
    tokenizer.save_pretrained(tmp_path / "cls")
    return str(tmp_path / "cls")


def test_classifier_judge(classifier, tokenizer):
    answers = [REFUSAL, *PROMPTS, ""]
    verdicts = ClassifierJudge(classifier, "REJECTION")([""] * 14, answers)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = [int(model(torch.tensor([tokenizer(a)["input_ids"]])).logits.argmax()) == 1 for a in answers[:-1]]
    assert verdicts == [*expected, False]
    assert len(set(expected)) == 2
    assert ClassifierJudge(classifier, "ANSWER")([""] * 13, answers[:-1]) == [not v for v in expected]
    with pytest.raises(ValueError, match="no label 'REFUSED', only ANSWER, REJECTION"):
        ClassifierJudge(classifier, "REFUSED")


def test_the_former_prefix_judge_is_there_by_name():
    answers = ["No, I cannot.", "I cannot.", "Yes."]
    assert load_judges("prefix-1")[0]([""] * 3, answers) == [False, True, False]
    assert load_judges("prefix")[1]([""] * 3, answers) == [True, True, False]


def test_words_judge_generalises_to_answers_it_was_not_fitted_to():
    labelled = labelled_answers()
    assert sum(refused for _, refused in labelled) > 60
    assert sum(not refused for _, refused in labelled) > 60
    right = 0
    for fold in range(5):
        judge = WordsJudge([row for i, row in enumerate(labelled) if i % 5 != fold])
        held_out = labelled[fold::5]
        verdicts = judge([""] * len(held_out), [answer for answer, _ in held_out])
        right += sum(verdict == refused for verdict, (_, refused) in zip(verdicts, held_out, strict=True))
    assert right / len(labelled) > 0.85


def test_words_judge_reads_the_beginning_and_no_prefix_decides():
    judge = load_judges("words")[0]
    assert judge is words_judge()
    answers = [
        "This request is against my guidelines.",
        "I would advise the night train to Vienna.",
        "",
    ]
    assert judge([""] * 3, answers) == [True, False, False]
    assert prefix_judge([""] * 3, answers) == [False, True, False]
    late = "one two three four five " * 4
    assert judge([""], [late + "I cannot assist with that request."]) == judge([""], [late])
    assert judge([], []) == []


LABELLED = [
    (REFUSAL, True),
    ("Sorry, no.", True),
    ("I would rather talk about something else.", True),  # the prefix judge does not see this refusal
    ("Let us leave it.", True),  # nor this one
    ("Sure, here is how to do that.", False),
    ("I cannot praise this cake enough.", False),  # and takes this for one
    ("One, two, three.", False),
    ("Here you are.", False),
    ("Yes.", False),
]


def test_agreement(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "q", "response": a, "label": r}) for a, r in LABELLED))
    found = agreement(prefix_judge, path)
    assert (found.both_refused, found.judge_only, found.people_only, found.neither) == (2, 1, 2, 4)
    assert (found.accuracy.hits, found.accuracy.count) == (6, 9)
    chance = (4 * 3 + 5 * 6) / 81
    assert found.kappa == pytest.approx((6 / 9 - chance) / (1 - chance))
    (tmp_path / "labels.csv").write_text(
        "prompt,answer,refused\n" + "".join(f'q,"{a}",{"refused" if r else "no"}\n' for a, r in LABELLED)
    )
    assert agreement(prefix_judge, tmp_path / "labels.csv") == found
    path.write_text(json.dumps({"prompt": "q", "response": "Yes.", "label": 0}))
    assert agreement(prefix_judge, path).kappa is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "q", "answer": "a"}', r":1: no column `refused` or `label`"),
        ('{"prompt": "q", "refused": true}', r":1: no column `answer` or `response`"),
        ('{"prompt": "q", "answer": "a", "refused": "partly"}', ":1: labelled 'partly', not one of 1, true"),
        ("", "holds no rows"),
    ],
)
def test_bad_labels(tmp_path, content, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(content)
    with pytest.raises(SafetyDataError, match=message):
        agreement(prefix_judge, path)
    table = tmp_path / "labels.csv"
    table.write_text("prompt,answer,refused\nq,Sorry, no.,1\n")
    with pytest.raises(SafetyDataError, match=r"labels\.csv:2: 4 fields where the header has 3; put text with commas"):
        agreement(prefix_judge, table)
    with pytest.raises(SafetyDataError, match="no such file of labelled answers"):
        agreement(prefix_judge, tmp_path / "gone.csv")
