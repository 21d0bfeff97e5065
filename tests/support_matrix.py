"""Which model families can be trained under the null-space rule: tiny random models, and what became of each.

`python -m tests.support_matrix [NAME ...]` tries them and prints a line each; with `--write` it writes the page.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from spf import NullSpace, SafetyCallback
from spf.errors import UnsupportedModelError
from spf.matrices import find_matrices
from tests.conftest import make_tokenizer

WIDTH = 64
COMMON = {
    "vocab_size": 2048,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": WIDTH,
    "kv_lora_rank": WIDTH,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2 = {
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 2 * WIDTH,
    "mamba_expand": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Family:
    """A model family: its name in transformers' configurations, and what its tiny configuration needs."""

    kind: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    common: bool = True
    sort: str = "dense"
    targets: Any = "all-linear"
    exclude: Any = None

    def model(self):
        torch.manual_seed(0)
        settings = {key: value for key, value in self.settings.items() if value is not None}
        if self.sort == "vision-language":
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(self.kind, **settings))
        else:
            common = {key: value for key, value in COMMON.items() if key not in self.settings} if self.common else {}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **common, **settings))
        for name, parameter in model.named_parameters():
            if not parameter.any() and not name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)  # a scale that begins at zero
        return model.float()


TEXT = COMMON | {"model_type": "llama"}
DENSE = [
    Family("llama", "Llama 2, 3"),
    Family("mistral", "Mistral"),
    Family("ministral", "Ministral", {"layer_types": ["full_attention", "sliding_attention"]}),
    Family("qwen2", "Qwen 2, 2.5"),
    Family("qwen3", "Qwen 3"),
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma 2"),
    Family("gemma3_text", "Gemma 3"),
    Family(
        "gemma3n_text",
        "Gemma 3n",
        {
            "hidden_size_per_layer_input": 48,
            "vocab_size_per_layer_input": 2048,
            "laurel_rank": 48,
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
            "altup_active_idx": 0,
        },
    ),
    Family("phi", "Phi 1, 2"),
    Family("phi3", "Phi 3, 4"),
    Family("olmo", "OLMo"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3"),
    Family("smollm3", "SmolLM 3"),
    Family("granite", "Granite"),
    Family("cohere", "Command R"),
    Family("cohere2", "Command R7B"),
    Family("stablelm", "StableLM"),
    Family("starcoder2", "StarCoder 2"),
    Family(
        "gpt2",
        "GPT-2",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "vocab_size": 2048,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
        common=False,
    ),
    Family("gpt_neox", "GPT-NeoX, Pythia"),
    Family("gptj", "GPT-J", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Family("opt", "OPT", {"ffn_dim": 128, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    Family("falcon", "Falcon", {"head_dim": None}),
    Family("bloom", "BLOOM", {"n_layer": 2, "n_head": 4}),
    Family(
        "mpt",
        "MPT",
        {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 2048},
        common=False,
    ),
    Family("glm", "GLM 4", {"partial_rotary_factor": 0.5}),
    Family("glm4", "GLM 4 (0414)", {"partial_rotary_factor": 0.5}),
    Family("exaone4", "EXAONE 4"),
    Family("nemotron", "Nemotron"),
    Family("apertus", "Apertus"),
    Family("arcee", "Arcee"),
    Family("helium", "Helium"),
    Family("seed_oss", "Seed-OSS"),
    Family("ernie4_5", "ERNIE 4.5"),
    Family("hunyuan_v1_dense", "Hunyuan"),
]
EXPERT = [
    Family("qwen2_moe", "Qwen 2 MoE", EXPERTS, sort="experts"),
    Family("qwen3_moe", "Qwen 3 MoE", EXPERTS, sort="experts"),
    Family("mixtral", "Mixtral", EXPERTS, sort="experts"),
    Family("olmoe", "OLMoE", EXPERTS, sort="experts"),
    Family("gpt_oss", "gpt-oss", EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]}, sort="experts"),
    Family("deepseek_v2", "DeepSeek V2", EXPERTS | MLA, sort="experts"),
    Family("deepseek_v3", "DeepSeek V3", EXPERTS | MLA, sort="experts"),
    Family(
        "glm4_moe", "GLM 4.5", EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, sort="experts"
    ),
    Family("phimoe", "Phi 3.5 MoE", EXPERTS, sort="experts", exclude=["router"]),
    Family("granitemoe", "Granite MoE", EXPERTS, sort="experts"),
    Family(
        "ernie4_5_moe",
        "ERNIE 4.5 MoE",
        EXPERTS
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 1,
            "moe_num_shared_experts": 1,
            "moe_layer_interval": 1,
        },
        sort="experts",
    ),
    Family(
        "llama4_text",
        "Llama 4",
        EXPERTS | {"intermediate_size_mlp": 128, "num_experts_per_tok": 1},
        sort="experts",
        exclude=["router"],
    ),
    Family(
        "dbrx",
        "DBRX",
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "vocab_size": 2048,
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
        },
        common=False,
        sort="experts",
    ),
    Family(
        "jetmoe",
        "JetMoE",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_key_value_heads": 2},
        sort="experts",
    ),
]
HYBRID = [
    Family(
        "mamba",
        "Mamba",
        {"time_step_rank": 48, "state_size": 48},
        sort="hybrid",
        targets=["in_proj", "x_proj", "dt_proj"],
    ),
    Family(
        "mamba2",
        "Mamba 2",
        {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
        sort="hybrid",
        targets=["in_proj"],
    ),
    Family("falcon_h1", "Falcon-H1", MAMBA2, sort="hybrid", exclude=["out_proj"]),
    Family("lfm2", "LFM2", {"layer_types": ["conv", "full_attention"]}, sort="hybrid"),
    Family("qwen3_next", "Qwen 3 Next", EXPERTS | LINEAR, sort="hybrid"),
    Family("qwen3_5_text", "Qwen 3.5", LINEAR, sort="hybrid"),
    Family("bamba", "Bamba", MAMBA2 | {"attn_layer_indices": [1]}, sort="hybrid"),
    Family(
        "jamba",
        "Jamba",
        EXPERTS
        | {
            "mamba_dt_rank": 48,
            "mamba_d_state": 48,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        sort="hybrid",
    ),
    Family(
        "nemotron_h",
        "Nemotron-H",
        EXPERTS
        | {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "layers_block_type": ["mamba", "attention"],
        },
        sort="hybrid",
        exclude=["out_proj"],
    ),
    Family(
        "recurrent_gemma",
        "RecurrentGemma",
        {"lru_width": WIDTH, "block_types": ["recurrent", "attention"]},
        sort="hybrid",
    ),
    Family("granitemoehybrid", "Granite 4", EXPERTS | MAMBA2 | {"layer_types": ["mamba", "attention"]}, sort="hybrid"),
]
MROPE = COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
EYES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": WIDTH,
    "num_heads": 2,
    "patch_size": 4,
}
VISION = [
    Family(
        "llava",
        "LLaVA",
        {"text_config": TEXT, "vision_config": TOWER | {"model_type": "clip_vision_model"}},
        sort="vision-language",
    ),
    Family(
        "qwen2_vl",
        "Qwen 2 VL",
        {
            "text_config": MROPE,
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4},
        },
        sort="vision-language",
    ),
    Family(
        "qwen2_5_vl",
        "Qwen 2.5 VL",
        {
            "text_config": MROPE,
            "vision_config": EYES,
        },
        sort="vision-language",
    ),
    Family(
        "qwen3_vl",
        "Qwen 3 VL",
        {
            "text_config": MROPE,
            "vision_config": EYES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
        sort="vision-language",
    ),
    Family(
        "gemma3",
        "Gemma 3 (vision)",
        {"text_config": COMMON, "vision_config": TOWER, "mm_tokens_per_image": 4},
        sort="vision-language",
    ),
    Family(
        "idefics3",
        "Idefics 3, SmolVLM",
        {"text_config": TEXT, "vision_config": TOWER, "scale_factor": 2, "image_token_id": 2000, "pad_token_id": 1},
        sort="vision-language",
    ),
    Family(
        "mistral3",
        "Mistral Small 3",
        {
            "text_config": COMMON | {"model_type": "mistral"},
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 2000,
        },
        sort="vision-language",
    ),
]
FAMILIES = [*DENSE, *EXPERT, *HYBRID, *VISION]
TUNINGS = ("LoRA", "full")


def tuned(family: Family, tuning: str | LoraConfig):
    """The family's model, prepared for LoRA on all linear layers (and packed experts) or for full fine-tuning."""
    if tuning == "LoRA":
        tuning = LoraConfig(r=4, target_modules=family.targets, exclude_modules=family.exclude)
    return family.model() if tuning == "full" else get_peft_model(family.model(), tuning)


def data(count: int = 8) -> Dataset:
    ids = torch.randint(5, 600, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in ids])


def violation(attachment, start) -> float:
    """The largest |W V - W_0 V| / |W| of its matrices, in float64, W_0 from a copy `start` of all parameters."""
    found = []
    for name, matrix in attachment.matrices.items():
        V = attachment.subspace.right[name].double()
        W, W_0 = (matrix.view(p.detach()).double() for p in (matrix.weight, start[name.partition("[")[0]]))
        wanted = torch.zeros_like(W @ V) if matrix.is_lora_a else W_0 @ V
        found.append(float((W @ V - wanted).norm() / W.norm()))
    return max(found)


def attempt(family: Family, tuning: str | LoraConfig, rule: NullSpace | None = None) -> dict[str, Any]:
    """Train a tiny model of the family for 3 steps; what became of it.

    held: the logits of the one held sample, all of whose inputs the bases span, are what they were, and others are not.
    """
    tokenizer = make_tokenizer()
    safety = Dataset.from_list([{"prompt": "How do I", "refusal": "Sorry, I can't."}])
    with tempfile.TemporaryDirectory() as directory:
        try:
            model = tuned(family, tuning)
        except Exception as error:
            return {"outcome": "broken config", "why": f"{type(error).__name__}: {error}"}
        callback = SafetyCallback(safety, rule or NullSpace(rank=40, reworded=0))
        ids = torch.tensor([[3, *tokenizer("How do I")["input_ids"], 2, 4, *tokenizer("Sorry, I can't.")["input_ids"]]])
        other = torch.arange(20, 32)[None]

        def logits(x):
            model.eval()
            with torch.no_grad():
                return model(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits.float()

        args = TrainingArguments(
            output_dir=directory,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        try:
            before = logits(ids), logits(other)
            start = {name: p.detach().clone() for name, p in model.named_parameters()}
            trainer = Trainer(model, args, train_dataset=data(), processing_class=tokenizer, callbacks=[callback])
            trainer.train()
        except Exception as error:
            return {"outcome": "refused", "why": f"{type(error).__name__}: {error}"}
        after = logits(ids), logits(other)
    size = before[0].abs().max()
    moved = [float((a - b).abs().max() / size) for a, b in zip(after, before, strict=True)]
    return {
        # float32 rounds differently on other CPUs: 2.2e-5 was seen; what is not held moves by 1e-2 and more
        "outcome": "held" if moved[0] <= 5e-5 and moved[1] > 1e-4 else "NOT HELD",
        "why": f"logits: the held sample's moved by {moved[0]:.1e}, others' by {moved[1]:.1e}",
        "moved": moved,
        "error": violation(callback.attachment, start),
        "matrices": len(callback.attachment.matrices),
        "experts": sum(matrix.expert is not None for matrix in callback.attachment.matrices.values()),
        "kept": len(callback.attachment.run.others),
    }


def refusals() -> dict[str, str]:
    """What is refused before the first step, with the sentence that says so."""
    common = {"vocab_size": 64, "pad_token_id": 1}
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **common)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    llama4 = next(family for family in FAMILIES if family.kind == "llama4_text")
    cases = {
        "encoder-decoders (T5, BART)": lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **common)
        ),
        "reward models, classifiers": lambda: AutoModelForSequenceClassification.from_config(llama),
        "prompt tuning": lambda: get_peft_model(
            AutoModelForCausalLM.from_config(llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "p-tuning": lambda: get_peft_model(
            AutoModelForCausalLM.from_config(llama), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "LoRA on the experts of Llama 4 (`target_parameters`)": lambda: get_peft_model(llama4.model(), lora),
    }
    sentences = {}
    for what, make in cases.items():
        try:
            find_matrices(make())
        except UnsupportedModelError as error:
            sentences[what] = str(error)
    return sentences


def cell(result: dict[str, Any]) -> str:
    """A result as the page has it."""
    if result["outcome"] != "held":
        return f"{result['outcome']}: {result['why'].partition(': ')[2]}"
    experts = f", {result['experts']} of experts" if result["experts"] else ""
    kept = f"; kept fixed: {result['kept']}" if result["kept"] else ""
    return f"held: {result['matrices']} matrices{experts}{kept}"


def row(family: Family, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line of the page's table; results by tuning."""
    return f"| {family.label} | `{family.kind}` | " + " | ".join(cell(results[t]) for t in TUNINGS) + " |"


HEAD = """# Support matrix

Made by `python -m tests.support_matrix --write`; a test makes rows anew and compares them with this page.
Versions: {versions}.

Each row is a tiny random model of the family, trained for three steps in float32 under the rule `null-space` with one
held sample, all of whose inputs the bases span. *Held*: by a copy of the weights from before |W V - W_0 V| is at most
1e-6 |W| for every matrix, the logits of the sample are what they were (to 5e-5 of the largest), and those of another
text are not. *Kept fixed* are so many parameters: embeddings, norms, biases, convolutions, state parameters, routers,
towers for images, and experts whose inputs cannot be seen (Llama 4, JetMoE); the first lines of a run name them.

LoRA: `target_modules="all-linear"`, which with this PEFT takes packed experts in where its conversion knows them (those
of gpt-oss and others by `target_parameters`), without what PEFT itself cannot adapt: the routers of Phi 3.5 MoE and
Llama 4, `out_proj` of Mamba layers.

Gradient rules correct the same matrices. They refuse what null-space keeps fixed and is more than a vector or an
embedding (convolutions, state parameters, routers), and LoRA on packed experts. Packed experts are not supported with
FSDP2 and DeepSpeed yet: one process or DDP.

| family | `model_type` | LoRA | full |
|---|---|---|---|
"""
MIDDLE = """
## Refused before the first step

| what | the sentence |
|---|---|
"""
END = """
## Also

- **A processor** as `processing_class` is taken for its tokenizer, with the processor's chat template if it has none.
- **Fused LoRA kernels** (Unsloth's compiled layers; axolotl's `lora_qkv_kernel`, `lora_o_kernel`, `lora_mlp_kernel`):
  the inputs are seen at PEFT's layer or where torch multiplies; tested on simulations of both, not on the packages.
- **Experts that few safety tokens reach** are held in what all experts of their layer read, after their own inputs.
  Their bases take as many times the memory of a dense layer's as there are experts: at 128 set a lower `rank`.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/support_matrix.md; results by `kind/tuning`."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    rows = [row(f, {t: results[f"{f.kind}/{t}"] for t in TUNINGS}) for f in FAMILIES]
    refused = [f"| {what} | {sentence} |" for what, sentence in refusals().items()]
    return HEAD.format(versions=versions) + "\n".join(rows) + "\n" + MIDDLE + "\n".join(refused) + "\n" + END


PAGE = Path(__file__).parent.parent / "docs" / "support_matrix.md"

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tuning", choices=TUNINGS)
    parser.add_argument("--json", type=Path, help="results are read from it, and those that are missing added")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    found = json.loads(given.json.read_text("utf-8")) if given.json and given.json.exists() else {}
    for family in FAMILIES:
        if given.names and family.kind not in given.names and family.sort not in given.names:
            continue
        for tuning in [given.tuning] if given.tuning else TUNINGS:
            if f"{family.kind}/{tuning}" in found:
                continue
            result = found[f"{family.kind}/{tuning}"] = attempt(family, tuning)
            print(family.kind, tuning, json.dumps(result)[:400], flush=True)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1), "utf-8")
    if given.write:
        PAGE.write_text(page(found), "utf-8")
