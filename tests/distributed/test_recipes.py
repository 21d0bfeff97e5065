"""The accelerate recipes, as documented: accelerate launch --config_file ... spf train ..., on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spf.audit import Finished
from spf.data import packaged_prompts
from spf.data.examples import read_examples
from spf.next_token import Known, fingerprint
from spf.over_refusal import PROBE
from tests.conftest import REFUSAL, make_model, make_tokenizer, run_module
from tests.distributed.test_modes import needs_deepspeed

pytestmark = pytest.mark.distributed
ROWS = [
    {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": "Yes, gladly."}]}
    for p in packaged_prompts("benign_anchors")[:16]
]
RECIPES = [
    ("ddp", "sft_lora"),
    ("fsdp2", "sft_full"),
    *(pytest.param(f"zero{stage}", "sft_full", marks=needs_deepspeed) for stage in (1, 2, 3)),
]


def launched(launcher: str, recipe: str, place: Path, **settings: Any) -> str:
    """`spf train` with a recipe by `accelerate launch`; what it printed."""
    prompts = packaged_prompts("harmful_anchors")[:12]
    (place / "refusals.jsonl").write_text("\n".join(json.dumps({"prompt": p, "refusal": REFUSAL}) for p in prompts))
    (place / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    settings |= {
        "dataset_name": place / "data.jsonl",
        "output_dir": place / "tuned",
        "safety_data": place / "refusals.jsonl",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
    } | ({"use_cpu": True} if launcher == "ddp" else {})
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return run_module(
        *("accelerate.commands.launch", "--config_file", f"recipes/accelerate/{launcher}.yaml"),
        *("-m", "tests.distributed.cpu_cli", "train", f"recipes/{recipe}.yaml", *flags),
        timeout=400,
    )


@pytest.mark.parametrize(("launcher", "recipe"), RECIPES)
def test_recipe_trains_and_saves_a_model(launcher, recipe, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "aligned")
    make_tokenizer().save_pretrained(tmp_path / "aligned")
    # what `spf audit` writes, as if the model refused a quarter of them
    asked = [Known.name(example.prompt_ids) for example in read_examples(ROWS, make_tokenizer()).examples]
    found = Finished(
        weights=fingerprint(model),
        asked=asked,
        refusals=[[7, 8]],
        refused=dict.fromkeys(asked[:4], (0.9, 7)),
        leaning={},
        harmless=[],
        probe=PROBE,
    )
    kept = {"key": "", "answers": {}, "finished": found.model_dump()}
    (tmp_path / "audited").mkdir()
    (tmp_path / "audited" / "spf_audit.json").write_text(json.dumps(kept))
    audited = tmp_path / "audited"
    printed = launched(launcher, recipe, tmp_path, model_name_or_path=tmp_path / "aligned", safety_audited=audited)
    assert printed.count("spf: rule null-space on") == 1
    assert "spf/removed_share" in printed
    assert "4 of 16 training rows answer prompts that the model refuses" in printed
    assert "4 rows are left out of training" in printed
    assert "other weights" not in printed
    file = "adapter_model.safetensors" if recipe == "sft_lora" else "model.safetensors"
    saved = load_file(tmp_path / "tuned" / file)
    if recipe == "sft_full":
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        tuned = saved["model.layers.0.mlp.up_proj.weight"].float()
        assert tuned.shape == weight.shape
        assert 0 < (tuned - weight).abs().max() < 0.1


@pytest.mark.parametrize("launcher", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_what_a_new_adapter_stands_on_is_written_whole_and_once(launcher, tmp_path):
    """ZeRO-3 cut the weights up while they were loaded, and the adapter below could not be merged into them."""
    make_model().save_pretrained(tmp_path / "aligned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    below = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    below.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "aligned")
    launched(launcher, "sft_lora", tmp_path, model_name_or_path=tmp_path / "adapter")
    [base] = (tmp_path / "tuned").glob("base-*")
    written, merged = load_file(base / "model.safetensors"), below.merge_and_unload().state_dict()
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in merged.items())
    assert json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
