"""What SafetyCallback is put on: processors of text and images, and models that have no answers to hold."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    ProcessorMixin,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from spf import NullSpace, SafetyCallback, UnsupportedModelError
from spf.trainers import tokenizer_of
from tests.conftest import make_model, make_tokenizer
from tests.support_matrix import FAMILIES
from tests.test_callback import PROMPTS, arguments, make_trainer, safety_data, token_data


class Processor(ProcessorMixin):
    """A processor of text and images, as a vision-language model has one; the images' part is not needed for text."""

    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs):
        # always a batch, as those of the models do
        return super().__call__(images=images, text=[text] if isinstance(text, str) else text, **kwargs)


def processor(template_at):
    tokenizer = make_tokenizer()
    template = tokenizer.chat_template
    if template_at == "processor":
        tokenizer.chat_template = None
    return Processor(tokenizer, chat_template=template)


@pytest.mark.parametrize("template_at", ["tokenizer", "processor"])
def test_a_processor_is_taken_for_its_tokenizer(template_at, tmp_path, rows, caplog):
    given = processor(template_at)
    model = next(family for family in FAMILIES if family.kind == "llava").model()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    make_trainer(tmp_path, given, callback, model).train()
    assert "proven on the model's own parameters" in caplog.records[-1].getMessage()
    assert tokenizer_of(given).chat_template == make_tokenizer().chat_template
    assert (given.tokenizer.chat_template is None) == (template_at == "processor")  # the user's own is left alone


def test_sft_on_text_with_a_processor(tmp_path, rows):
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": "A poem."}]}
            for p in PROMPTS
        ]
    )
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    SFTTrainer(
        make_model(),
        arguments(SFTConfig, tmp_path),
        train_dataset=data,
        processing_class=processor("tokenizer"),
        callbacks=[callback],
    ).train()
    assert callback.attachment.corrected == 4


def classifier():
    config = make_model().config
    config.num_labels, config.pad_token_id = 1, 1
    return AutoModelForSequenceClassification.from_config(config)


def test_a_reward_model_is_refused_in_one_sentence(tmp_path, tokenizer, rows):
    pairs = Dataset.from_list(
        [
            {
                "chosen": [{"role": "user", "content": p}, {"role": "assistant", "content": "A poem."}],
                "rejected": [{"role": "user", "content": p}, {"role": "assistant", "content": "Sorry."}],
            }
            for p in PROMPTS
        ]
    )

    def run(*callbacks):
        args = arguments(RewardConfig, tmp_path, max_steps=1)
        RewardTrainer(
            classifier(), args, train_dataset=pairs, processing_class=tokenizer, callbacks=list(callbacks)
        ).train()

    with pytest.raises(UnsupportedModelError, match=r"LlamaForSequenceClassification has no output layer over"):
        run(SafetyCallback(safety_data(rows)))
    run()  # the remedy: without it


def test_an_encoder_decoder_is_refused_in_one_sentence(tmp_path, tokenizer, rows):
    config = T5Config(vocab_size=2048, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1)

    def run(*callbacks):
        args = arguments(Seq2SeqTrainingArguments, tmp_path, max_steps=1)
        Seq2SeqTrainer(
            T5ForConditionalGeneration(config),
            args,
            train_dataset=token_data(),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        ).train()

    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        run(SafetyCallback(safety_data(rows)))
    run()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_is_refused_in_one_sentence(kind, tmp_path, tokenizer, rows):
    config = kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)

    def run(config):
        model = get_peft_model(make_model(), config)
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        make_trainer(tmp_path, tokenizer, callback, model, max_steps=1).train()

    with pytest.raises(UnsupportedModelError, match=r"learns an input that every prompt is given.* use LoRA"):
        run(config)
    run(LoraConfig(r=2, target_modules=["q_proj"]))


def test_a_classifier_is_refused_without_a_trainer_too():
    from spf import SafetyProbe
    from spf.data import Anchor

    with pytest.raises(UnsupportedModelError, match="a reward model or a classifier"):
        SafetyProbe(classifier(), [Anchor([3], [4], "row 1")])
    assert torch.is_grad_enabled()
