"""The recipes and the notebook as they stand, on tiny models: only the model and the output are others."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from spf import cli
from spf.models import load_model
from spf.train import Parser
from tests.conftest import REFUSAL, make_model

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def make_mixture():
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.fixture
def model(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refusals(tmp_path, rows):
    path = tmp_path / "refusals.jsonl"
    path.write_text("".join(json.dumps({"messages": r.messages, "refusal": r.refusal}) + "\n" for r in rows), "utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_as_it_stands(recipe, model, refusals, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load(recipe.read_text("utf-8"))
    if recipe.stem == "sft_moe":
        make_mixture().save_pretrained(model)
    if recipe.stem == "dpo_after_sft":  # on the adapter that the first recipe makes
        first = ["train", "recipes/sft_lora.yaml", "--model", str(model), "--output", str(tmp_path / "first")]
        assert cli.main([*first, "--max_steps", "1", "--safety_data", str(refusals), "--report_to", "none"]) == 0
        model = tmp_path / "first"
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--max_steps", "2", "--report_to", "none"]
    flags += ["--max_completion_length", "4"] if recipe.stem == "grpo" else []
    assert cli.main(["train", f"recipes/{recipe.name}", *flags, "--safety_data", str(refusals)]) == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("spf: ")]
    assert any("answer the held inputs as before" in line for line in said), said
    assert not any("the trainer's data_collator" in line for line in said), said
    weights = [load_file(path) for path in (tmp_path / "out").glob("*model.safetensors")]
    assert any(tensor.abs().max() > 0 for file in weights for tensor in file.values())
    assert ("use_peft" in given) == (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if recipe.stem == "dpo_after_sft":
        # the first training was gone, or the adapter could not be loaded, whoever loaded it
        before, base = (
            load_model(str(path))[0].state_dict() for path in (model, next((tmp_path / "out").glob("base-*")))
        )
        assert all(torch.equal(before[name], base[name]) for name in before)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload().state_dict()
        found = load_model(str(tmp_path / "out"), torch.float32)[0].state_dict()
        assert all(torch.allclose(found[name], loaded[name].float(), atol=1e-5) for name in found)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_launched_and_what_a_user_puts_in(recipe):
    text = recipe.read_text("utf-8")
    first, second, *rest = text.splitlines()
    assert first.endswith(f": spf train recipes/{recipe.name}")
    launcher = re.search(r"--config_file (\S+) -m spf.cli train recipes/(\S+)$", second)
    assert launcher
    assert (ROOT / launcher[1]).is_file()
    assert launcher[2] == recipe.name
    assert [line.split(":")[0] for line in rest[:3]] == ["model_name_or_path", "dataset_name", "output_dir"]
    data = yaml.safe_load(text)["dataset_name"]
    assert len((ROOT / data).read_text("utf-8").splitlines()) == 10


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer", "ppo"], "trainer: must be one of sft, dpo, kto, grpo, not 'ppo'"),
        (["--trainer=grpo"], "reward_funcs: FILE.py:FUNCTION, with the trainer grpo"),
        (["--reward_funcs", "recipes/examples/rewards.py:short"], "reward_funcs: FILE.py:FUNCTION, with the trainer"),
        (["--trainer", "grpo", "--reward_funcs", "rewards:short"], "'rewards:short': no such Python file"),
        (["--trainer", "grpo", "--reward_funcs", "recipes/examples/rewards.py:long"], "has no function 'long'"),
        (["--load_in_4bit", "true", "--model", "spf/lab/demo/aligned"], "cannot be merged into packed weights"),
    ],
)
def test_mistakes_about_the_trainer_end_in_a_sentence(flags, said, refusals, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["--data", "recipes/examples/sft.jsonl", "--output", str(tmp_path / "out"), "--safety_data", str(refusals)]
    assert cli.main(["train", *([] if "--model" in flags else ["--model", str(model)]), *words, *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_notebook_runs(model, tmp_path, monkeypatch, capsys):
    """Its cells, word for word, in one place of names; only the names in the first one are others."""
    cells = json.loads((ROOT / "recipes" / "five_minutes.ipynb").read_text("utf-8"))["cells"]
    names, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)
    place = {}
    exec(names, place)
    assert set(place) - {"__builtins__"} == {"MODEL", "DATA", "OUTPUT"}
    place |= {"MODEL": str(model), "OUTPUT": str(tmp_path / "out")}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: [REFUSAL] * len(prompts))
    for cell in code:
        exec(compile(cell, "five_minutes.ipynb", "exec"), place)
    printed = capsys.readouterr().out
    assert printed.count("of 8 refused") == 4
    assert "spf/refusal_rate" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", ["train", "lock apply", "lock remove"])
def test_a_directory_with_another_kind_of_model_is_not_written_into(command, model, refusals, tmp_path, capsys):
    """The old adapter would be loaded, not the whole model that was saved beside it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    words = {
        "train": ["--model", model, "--data", ROOT / "recipes/examples/sft.jsonl", "--output", out],
        "lock apply": [model, tmp_path / "lock", out],
        "lock remove": [model, out],
    }[command]
    words += ["--safety_data", refusals] if command == "train" else []
    assert cli.main([*command.split(), *map(str, words)]) == 2
    assert f"{out / 'adapter_config.json'} is of another model, and would be" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("given", ["true", "false", "checkpoint-3", "null"])
def test_a_file_says_whether_to_go_on_as_a_flag_does(given, tmp_path):
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\nresume_from_checkpoint: {given}\n")
    *_, training, _ = Parser("sft").parse_args_and_config(args=["--config", str(tmp_path / "run.yaml")])
    assert str(training.resume_from_checkpoint).lower() == given.replace("null", "none")
    assert (training.resume_from_checkpoint is None) == (given == "null")
