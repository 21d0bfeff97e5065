"""What trains in every mode: python -m tests.distributed.worker OUTPUT, told on its input what to do, line by line.

A line is MODE PROCESSES [CASE]; MODE is single, ddp, fsdp2, zero1, zero2 or zero3. The mode's processes are forked from
this one, which has imported everything and done nothing. They train every case, or the one named, and write their
losses, final parameters and counters to OUTPUT. The answer is one line: the exit codes. Unpatched accelerate runs FSDP2
and DeepSpeed only on accelerators, so there its choice of a backend is overridden with gloo.
"""

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import copy
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import signal
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

import spf.audit
import spf.callback
import spf.data.refusals as refusals
import spf.next_token
import spf.rules.growth as growth
import spf.rules.spf as published
import spf.training_data
from spf import SPF, CorrectionError, NullSpace, Rank1, SafetyCallback, UnsupportedSetupError
from spf.data import Anchor
from spf.data.examples import IGNORED, Example, Examples, read_examples
from spf.going_on import _ENDED
from spf.next_token import Known, fingerprint
from spf.over_refusal import PROBE, Frame, middle_states
from spf.probe import SafetyProbe, Watched
from spf.rules import Constrained, Mix, SafeGrad
from spf.rules.growth import Growth
from spf.rules.holding import Holding
from spf.sharding import object_of_rank_0
from spf.shared_prefix import NextToken
from spf.stepping import Stepping
from spf.subspace import SafetySubspace
from tests.conftest import make_tokenizer
from tests.test_callback import token_data

# the cases in bf16 need no GPU, but transformers asks for one
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

OUTPUT = sys.argv[1]
MODE, WORLD, RANK = "", 1, 0
"""Of a process that trains: set when it is forked."""

# every run asks the model for its refusals, a pass a token; some read its answers
refusals.ask_refusals.__kwdefaults__["max_new_tokens"] = refusals.READ_TOKENS = 4

STEPS = 4
TIMEOUT = 480
"""Seconds after which a process is ended."""


@dataclasses.dataclass
class Case:
    rule: Any
    lora: bool = False
    optim: str = "sgd"  # AdamW would amplify the order of summation
    learning_rate: float = 0.5
    bf16: bool = False
    checkpointing: bool = False


CASES = {
    "null-space-full": Case(NullSpace(rank=8)),
    "null-space-lora-adamw": Case(NullSpace(rank=8), True, "adamw_torch", 1e-2),
    "feedback-full": Case(NullSpace(rank=8, prompts=8, feedback=Mix(weight=0.5))),
    "spf-left-full": Case(SPF(rank=4, gate="matrix")),
    "spf-right-lora": Case(SPF(rank=4, side="right", gate="matrix"), True),
    "spf-both-full": Case(SPF(rank=4, side="both", gate="matrix")),
    "rank1-lora": Case(Rank1(), True),
    "safegrad-full": Case(SafeGrad()),
    "constrained-full-adamw": Case(Constrained(margin=0.0), False, "adamw_torch", 5e-2),
    "null-space-bf16": Case(NullSpace(rank=8), False, "adamw_torch", 1e-2, bf16=True),
    "checkpointing": Case(NullSpace(rank=8), checkpointing=True),
}

in_hook = False
collectives: list[tuple[str, int]] = []


def watch_hooks() -> None:
    """Record every collective of torch that runs inside the rule's step hooks."""
    for name in ("_before", "_after"):
        real = getattr(Stepping, name)

        def wrapped(self, *args, real=real):
            global in_hook
            in_hook = True
            try:
                return real(self, *args)
            finally:
                in_hook = False

        setattr(Stepping, name, wrapped)
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        real = getattr(dist, name)

        def counted(*args, real=real, name=name, **kwargs):
            if in_hook:
                collectives.append((name, args[0].numel() * args[0].element_size()))
            return real(*args, **kwargs)

        setattr(dist, name, counted)


def make_model(lora: bool) -> Any:
    # Odd sizes: ZeRO's borders cut rows, FSDP2's shards are uneven.
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=36,
        head_dim=10,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    return model


# Made before any TrainingArguments: ZeRO-3's would have from_config fill the weights in another way.
MODELS = {lora: make_model(lora) for lora in (False, True)}


def launcher(lora: bool) -> dict[str, Any]:
    if MODE in ("single", "ddp"):
        return {"use_cpu": True}
    if MODE == "fsdp2":
        wrapped = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        return {"fsdp": True, "fsdp_config": wrapped}
    # by default all parameters of a model this small stay whole in stage 3, as an adapter's do
    stage = {"stage": int(MODE[-1]), **({} if lora else {"stage3_param_persistence_threshold": 0})}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {
        "deepspeed": {
            "zero_optimization": stage,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": "auto"},
            **dict.fromkeys(auto, "auto"),
        }
    }


def zero_launcher(case: Case, **changes: Any) -> dict[str, Any]:
    """The launcher's settings with changes to DeepSpeed's `zero_optimization`."""
    settings = launcher(case.lora)
    settings["deepspeed"]["zero_optimization"] |= changes
    return settings


def make_trainer(
    case: Case, directory: Path, data: Any = None, audited: Path | None = None, model: Any = None, **changes: Any
) -> tuple[Trainer, SafetyCallback]:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
    callback = SafetyCallback(
        str(Path(OUTPUT) / "safety.jsonl"), case.rule, monitor_steps=2, cosines=True, audited=audited
    )
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // WORLD,
        "gradient_accumulation_steps": 2,
        "learning_rate": case.learning_rate,
        "weight_decay": 0.1,
        "optim": case.optim,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "seed": 3,
        "bf16": case.bf16,
        "gradient_checkpointing": case.checkpointing,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**(settings | launcher(case.lora) | changes))
    trainer = Trainer(
        copy.deepcopy(MODELS[case.lora]) if model is None else model,
        args,
        train_dataset=token_data(64) if data is None else data,
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    return trainer, callback


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if isinstance(parameter, DTensor):
            whole = parameter.full_tensor()
        elif MODE == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.data.clone()
        else:
            whole = parameter
        state[name] = whole.detach().float().clone()
    return state


def record(trainer: Trainer, callback: SafetyCallback) -> dict[str, Any]:
    attachment = callback.attachment
    assert attachment is not None
    logs = trainer.state.log_history
    frozen = vars(attachment.correction).get("frozen")
    # parts that a pass left gathered were taken for changed weights
    assert frozen is None or not frozen.told(), frozen.told()
    return {
        "parameters": parameters(trainer),
        "losses": [log["loss"] for log in logs if "loss" in log],
        "cos": [log["spf/cos"] for log in logs if "spf/cos" in log],
        "corrected": attachment.corrected,
        "cut_rows": sum(len(attachment.sharding.parts[name].cut_rows) for name in attachment.matrices),
        "split": attachment.sharding.split,
    }


def run(case: Case, directory: Path, **changes: Any) -> dict[str, Any]:
    collectives.clear()
    trainer, callback = make_trainer(case, directory, **changes)
    trainer.train()
    return record(trainer, callback) | {"collectives": list(collectives)}


def resume(case: Case, directory: Path) -> dict[str, Any]:
    """Train half, save, and go on with everything made anew."""
    trainer, _ = make_trainer(case, directory, save_strategy="steps", save_steps=STEPS // 2)
    trainer.train()
    if dist.is_initialized():
        dist.barrier()
    trainer, callback = make_trainer(case, directory)
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{STEPS // 2}"))
    return record(trainer, callback)


def resume_elsewhere(case: Case, directory: Path) -> dict[str, Any]:
    """Go on from the checkpoint that another number of processes made: DDP's two from one's, FSDP2's one from two's."""
    maker = "single" if MODE == "ddp" else MODE
    checkpoint = str(Path(OUTPUT) / maker / "resume" / f"checkpoint-{STEPS // 2}")
    trainer, callback = make_trainer(case, directory, resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    return record(trainer, callback)


def stopped(case: Case, directory: Path) -> dict[str, Any]:
    """What training stopped with, if it did."""
    try:
        trainer, _ = make_trainer(case, directory)
        trainer.train()
    except CorrectionError as error:
        return {"error": str(error), "step": trainer.state.global_step}
    return {"error": ""}


def planted(held: Callable[[Holding, list[str]], list[str]]) -> Callable[[Case, Path], dict[str, Any]]:
    """A run in which only those of the matrices are corrected that `held` names: training has to stop."""

    def fault(case: Case, directory: Path) -> dict[str, Any]:
        real = Holding._hold
        Holding._hold = lambda self, names, dtype: real(self, held(self, list(names)), dtype)  # type: ignore[method-assign]
        try:
            return stopped(case, directory)
        finally:
            Holding._hold = real  # type: ignore[method-assign]

    return fault


def without_one(self: Holding, names: list[str]) -> list[str]:
    return [name for name in names if name != sorted(self.run.matrices)[3]]


def unprojected(case: Case, directory: Path) -> dict[str, Any]:
    """The gradient rule corrects nothing: the gradients that are used have to show it."""
    real = published.without_components
    published.without_components = lambda G, *rest: G  # type: ignore[assignment]
    try:
        return stopped(case, directory)
    finally:
        published.without_components = real


def offloaded(case: Case, directory: Path) -> dict[str, Any]:
    """DeepSpeed keeps the optimizer's weights and states on the CPU."""
    settings = zero_launcher(case, offload_optimizer={"device": "cpu", "pin_memory": False})
    # its own CPU optimizer would have to be compiled
    settings["deepspeed"]["zero_force_ds_cpu_optimizer"] = False
    return run(case, directory, **settings)


def in_groups(case: Case, directory: Path) -> dict[str, Any]:
    """Stage 3 steps sub-group by sub-group: the null space works, a rule that compares everything is refused."""
    trainer, callback = make_trainer(case, directory, **zero_launcher(case, sub_group_size=3000))
    trainer.train()
    assert callback.attachment is not None
    result = record(trainer, callback)
    result["groups"] = callback.attachment.sharding.calls(list(callback.attachment.matrices))
    trainer, _ = make_trainer(
        dataclasses.replace(case, rule=Mix()), directory, **zero_launcher(case, sub_group_size=3000)
    )
    try:
        trainer.train()
    except UnsupportedSetupError as error:
        result["refused"] = str(error)
    return result


def own_refusals(case: Case, directory: Path) -> dict[str, Any]:
    """Prompts without refusals, and ranks that judge differently: what rank 0 heard has to count on all of them."""
    heard = itertools.count()
    real = refusals.is_refusal
    refusals.is_refusal = lambda answer: RANK == 0 and next(heard) % 2 == 0
    try:
        trainer, callback = make_trainer(case, directory)
        callback.samples.data, callback.samples.count = str(Path(OUTPUT) / "prompts.jsonl"), 6
        trainer.train()
    finally:
        refusals.is_refusal = real
    return {"rows": [[row.messages[0]["content"], row.refusal] for row in callback.samples.rows]}


def audited(case: Case, directory: Path, alone: bool = False) -> dict[str, Any]:
    """The training data's prompts are asked by all ranks together, and all get the same answers.

    alone: the first rows with conflicts teach nothing else, so that they can be left out.
    """
    real, passes = spf.training_data.audit_data, itertools.count()
    asked = {name: getattr(NextToken, name) for name in ("ask", "ask_twice")}
    states: list[Any] = []

    def counted(name: str) -> Any:
        def ask(*given: Any) -> Any:
            next(passes)
            return asked[name](*given)

        return ask

    def made(dataset: Any, model: Any, tokenizer: Any, *rest: Any, **options: Any) -> spf.audit.Audit:
        prompts = [(*range(5, 9 + i % 7), 20 + i) for i in range(37)]
        examples = Examples([Example(prompt, (3,), "Yes.", i) for i, prompt in enumerate(prompts)], len(prompts))
        anchors = [Anchor([1], [token, 7], "") for token in range(0, 2000, 2)]
        frame = Frame((), prompts[0][-1:])
        found = middle_states(model, prompts, frame, lambda one: float(one[-1].double().square().sum()))
        assert found is not None
        states.extend(found)
        audit = spf.audit.audit(model, tokenizer, examples, anchors)
        audit.answers = Counter({(row, 0): 1 if alone and row < 16 else 2 for row in range(37)})
        return audit

    together = spf.next_token.TOGETHER
    # several batches a rank
    spf.training_data.audit_data, spf.audit.CONFIRM, spf.next_token.TOGETHER = made, 0.0, 8
    for name in asked:
        setattr(NextToken, name, counted(name))
    try:
        trainer, callback = make_trainer(case, directory)
        read = rows_read(trainer)
        trainer.train()
    finally:
        spf.training_data.audit_data, spf.audit.CONFIRM, spf.next_token.TOGETHER = real, 0.2, together
        for name, method in asked.items():
            setattr(NextToken, name, method)
    assert callback.audit is not None
    return {
        "conflicts": [[c.row, c.probability, c.refusal_ids[0]] for c in callback.audit.conflicts],
        "passes": next(passes),
        "rows": read[0],
        "left_out": callback.data.left_out_rows,
        "obstacle": callback.data.obstacle,
        "states": states,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


def rows_read(trainer: Trainer) -> list[int]:
    """Gets how many rows there are whenever a loader is made of them."""
    rows: list[int] = []
    loader = trainer.get_train_dataloader

    def noting() -> Any:
        rows.append(len(trainer.train_dataset))  # type: ignore[arg-type]
        return loader()

    trainer.get_train_dataloader = noting  # type: ignore[method-assign]
    return rows


def taken(case: Case, directory: Path) -> dict[str, Any]:
    """An audit was made before, so rows are left out also where the model is sharded when it can be asked."""
    rows = token_data(64)
    data = rows.map(lambda row: {"labels": [IGNORED] * 4 + row["input_ids"][4:]})
    prompts = [Known.name(example.prompt_ids) for example in read_examples(data, make_tokenizer()).examples]
    finished = {
        "weights": fingerprint(MODELS[case.lora]),
        "asked": prompts,
        "refusals": [[7, 8]],
        "refused": dict.fromkeys(prompts[:20], (0.9, 7)),
        "leaning": {},
        "harmless": [],
        "probe": PROBE,
    }
    place = directory / f"audited-{RANK}"
    place.mkdir(parents=True)
    (place / "spf_audit.json").write_text(json.dumps({"key": "", "answers": {}, "finished": finished}))
    trainer, callback = make_trainer(case, directory, data, place)
    lengths = rows_read(trainer)
    trainer.train()
    assert callback.audit is not None
    return record(trainer, callback) | {
        "rows": lengths[0],
        "left_out": callback.data.left_out_rows,
        "held": [anchor.prompt_ids for anchor in callback.data.held],
        "refused": callback.audit.refused,
        "other_weights": callback.audit.other_weights,
    }


def grown(case: Case, directory: Path, again: bool = False) -> dict[str, Any]:
    """Held prompts that flip, on one rank only before they agree: all hold the same directions more."""
    real = Growth._flipped, growth.EVERY, growth.PER_ROUND

    def flipped(self: Growth, anchors: Any) -> list[bool]:
        asked = len(anchors) < len(self.run.basis)
        real[0](self, anchors)  # the pass that all ranks make together
        return object_of_rank_0([asked and self.rounds < 2 and RANK == 0 for _ in anchors])

    Growth._flipped, growth.EVERY, growth.PER_ROUND = flipped, 1, 4  # type: ignore[method-assign]
    growth.AT_ONCE = 3
    try:
        trainer, callback = make_trainer(
            case, directory, **({"save_strategy": "steps", "save_steps": 2} if again else {})
        )
        trainer.train()
        if again:
            if dist.is_initialized():
                dist.barrier()
            trainer, callback = make_trainer(case, directory)
            trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    finally:
        Growth._flipped, growth.EVERY, growth.PER_ROUND = real  # type: ignore[method-assign]
        growth.AT_ONCE = 32
    assert callback.attachment is not None
    correction = callback.attachment.correction
    assert isinstance(correction, Holding)
    subspace = callback.attachment.subspace
    violations = correction.constraint.violations(correction.run.matrices)
    return record(trainer, callback) | {
        "directions": sorted({V.shape[1] for V in subspace.right.values()}),
        "left": sorted({R.shape[1] for R in subspace.reserve.values()}),
        "error": max(v.error / (v.rounding + 1e-9) for v in violations.values()),
    }


def read(case: Case, directory: Path) -> dict[str, Any]:
    """Watched prompts that flipped, as rank 0 only sees them: all ranks write the answers that it reads."""
    trainer, callback = make_trainer(case, directory)
    begins, watch = dict.fromkeys(range(2048), ()), SafetyProbe.watch

    class Flip(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            monitor = callback.attachment.monitor
            monitor._begins, monitor._answered = begins, set()
            monitor.before = monitor.now = monitor._ask(monitor.run.watched)

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            callback.attachment.monitor._begins = {}

    def seen(self: SafetyProbe, anchors: Any, _: Any = ()) -> Watched:
        found = watch(self, anchors, callback.attachment.monitor._begins if callback.attachment else {})
        return dataclasses.replace(found, refused=1.0) if RANK else found

    trainer.add_callback(Flip())
    written: list[int] = []
    real = refusals.complete_tokens, refusals.is_refusal
    refusals.complete_tokens = lambda *given, **named: written.append(len(given[2])) or real[0](*given, **named)
    refusals.is_refusal = lambda answer: RANK == 0
    SafetyProbe.watch = seen  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        refusals.complete_tokens, refusals.is_refusal = real
        SafetyProbe.watch = watch  # type: ignore[method-assign]
    rates = [log["spf/refusal_rate"] for log in trainer.state.log_history if "spf/refusal_rate" in log]
    return record(trainer, callback) | {"written": written, "rates": rates, "warned": callback.warned}


@contextmanager
def written_over(trainer: Trainer, name: str) -> Iterator[None]:
    """What another callback might write into the model's own parameter, on every process, for the while."""
    parameter = trainer.accelerator.unwrap_model(trainer.model).get_parameter(name)

    def write(change: Callable[[torch.Tensor], Any]) -> None:
        with torch.no_grad():
            if MODE != "zero3":
                change(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
                return
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                change(parameter)

    before: list[torch.Tensor] = []
    write(lambda own: (before.append(own.clone()), own.add_(1)))
    yield
    write(lambda own: own.copy_(before[0]))


def after(case: Case, directory: Path, anew: bool = False) -> dict[str, Any]:
    """What `save_model` writes, what is said of it when others have written into the model, and a second training.

    anew: by a new trainer with the same model, as where there is no other way.
    """
    changes: dict[str, Any] = {}
    if MODE == "zero3":  # an adapter stays whole, what is below it does not
        changes = zero_launcher(case, stage3_param_persistence_threshold=500)
        changes["deepspeed"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    trainer, callback = make_trainer(case, directory, **changes)
    trainer.train()
    running = callback.attachment
    assert running is not None
    result = record(trainer, callback)
    said: list[str] = []
    warning = spf.callback.logger.warning
    spf.callback.logger.warning = said.append
    trained, correction = sorted(running.matrices)[3], running.correction
    assert isinstance(correction, Holding)

    def saved(place: str) -> list[str]:
        said.clear()
        trainer.save_model(str(directory / place))
        if dist.is_initialized():
            dist.barrier()
        return list(said)

    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    kinds = [plugin.state_dict_type] if plugin else []
    try:
        result["said"] = saved("saved")
        result["kinds"] = [str(kind) for kind in [*kinds, *([plugin.state_dict_type] if plugin else [])]]
        if MODE in ("ddp", "zero1", "zero2") and RANK == 0:  # as scripts do where no other process is needed
            said.clear()
            trainer.save_model(str(directory / "alone"))
            result["said_alone"] = list(said)
            result["alone"] = sorted(path.name for path in (directory / "alone").iterdir())
            if case.lora:
                ended = _ENDED.pop(running)
                trainer.save_model(str(directory / "broken off"))
                _ENDED[running] = ended
                one, *others = (
                    SafetySubspace.load(next((directory / place).glob("spf_subspace-*")))
                    for place in ("saved", "alone", "broken off")
                )
                result["apart"] = max(
                    float((part[n] - tensor).abs().max())
                    for other in others
                    for part, whole in ((one.right, other.right), (one.target, other.target))
                    for n, tensor in whole.items()
                )
        with written_over(trainer, trained):
            result["said_of_another"] = saved("another")
        if case.lora:
            with written_over(trainer, trained.replace("lora_A.default", "base_layer")):
                result["frozen"] = correction.frozen.told()
        else:
            with written_over(trainer, "model.norm.weight"):
                result["said_of_a_norm"] = saved("norm")
    finally:
        spf.callback.logger.warning = warning
    subspace = running.whole_subspace()
    if RANK == 0:
        result["files"] = sorted(path.name for path in (directory / "saved").iterdir())
        written = load_file(directory / "saved" / f"{'adapter_' * case.lora}model.safetensors")
        own = {name.replace(".default", ""): tensor for name, tensor in result["parameters"].items()}
        result["missing"] = [n for n in own if n not in written and (not case.lora or ".lora_" in n)]
        result["off"] = max(float((own[n] - tensor).abs().max()) for n, tensor in written.items())
        held = {name.replace(".default", ""): name for name in running.matrices}
        result["unheld"] = max(
            float((written[n] @ subspace.right[name] - subspace.target[name]).abs().max()) for n, name in held.items()
        )
    try:
        if not anew:
            trainer.train()
    except UnsupportedSetupError as error:
        result["refused"] = str(error)
    if anew or "refused" in result:
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer, callback = make_trainer(case, directory, model=model, **changes)
        trainer.train()
    assert callback.attachment is not None
    return result | {"again": record(trainer, callback)["losses"], "held_again": callback.attachment.corrected}


SPECIAL = {
    "after": (after, "null-space-full"),
    "after-lora": (after, "null-space-lora-adamw"),
    "anew": (functools.partial(after, anew=True), "null-space-full"),
    "anew-lora": (functools.partial(after, anew=True), "null-space-lora-adamw"),
    "read": (read, "null-space-full"),
    "read-lora": (read, "null-space-lora-adamw"),
    "grown": (grown, "null-space-full"),
    "grown-lora": (grown, "null-space-lora-adamw"),
    "grown-resume": (functools.partial(grown, again=True), "null-space-full"),
    "audit": (audited, "null-space-full"),
    "taken": (taken, "null-space-full"),
    "left-out": (functools.partial(audited, alone=True), "null-space-full"),
    "resume": (resume, "null-space-full"),
    "resume-lora": (resume, "null-space-lora-adamw"),
    "resume-bf16": (resume, "null-space-bf16"),
    "own-refusals": (own_refusals, "null-space-full"),
    "fault": (planted(lambda self, names: []), "null-space-full"),
    "fault-lora": (planted(lambda self, names: []), "null-space-lora-adamw"),
    "fault-late": (planted(lambda self, names: names if self.run.steps < 2 else []), "null-space-full"),
    "fault-one": (planted(without_one), "null-space-full"),
    "fault-one-lora": (planted(without_one), "null-space-lora-adamw"),
    "unprojected": (unprojected, "spf-left-full"),
}


def asked_for() -> dict[str, tuple[Callable[[Case, Path], dict[str, Any]], str]]:
    """What the mode trains, by name."""
    found = {name: (run, name) for name in CASES} | SPECIAL
    if MODE != "single":  # what DeepSpeed's second training is compared with
        del found["anew"], found["anew-lora"]
    if MODE == "zero3":
        found["in-groups"] = (in_groups, "null-space-full")
    if MODE in ("zero2", "zero3"):
        found["offload"] = (offloaded, "null-space-full")
        found["offload-spf"] = (offloaded, "spf-both-full")
    if MODE == "ddp" or (MODE != "single" and WORLD == 1):
        found["resume-elsewhere"] = (resume_elsewhere, "null-space-full")
    if MODE != "single" and WORLD == 1:
        found |= {"one-taken": (taken, "null-space-full"), "one-lora": (after, "null-space-lora-adamw")}
    return found


def train(only: list[str]) -> None:
    """What a forked process does."""
    if MODE.startswith("zero"):
        # a kernel for shared memory that g++ would have to compile; gloo does without (deepspeed.comm.torch is torch)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        importlib.import_module("deepspeed.utils.nvtx").enable_nvtx = False  # marks for a profiler, a fifth of the time
    if MODE not in ("single", "ddp"):
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    watch_hooks()
    place = Path(OUTPUT)
    known = asked_for()
    for name in only or known:
        what, case = known[name]
        result = what(CASES[case], place / MODE / name)
        torch.save(result.pop("parameters", {}), place / f"{MODE}-{name}-{RANK}.pt")
        (place / f"{MODE}-{name}-{RANK}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()


def forked(rank: int, port: int, only: list[str]) -> int:
    """The process of a rank, as torchrun would have started it; its id."""
    global RANK
    if child := os.fork():
        return child
    code = 1
    try:
        RANK = rank
        os.dup2(2, 1)  # answers alone go to the output
        signal.alarm(TIMEOUT)
        if MODE != "single":
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in here.items()}
        train(only)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # gloo's teardown at interpreter exit aborts now and then
        os._exit(code)


def launch(only: list[str]) -> list[int]:
    """The mode in processes of its own; their exit codes. When one fails, the others would wait for it: they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running, codes = {forked(rank, port, only) for rank in range(WORLD)}, []
    while running:
        child, status = os.wait()
        running.discard(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    gc.freeze()  # the search for garbage at the start of every training leaves out what is imported
    for line in sys.stdin:
        MODE, processes, *rest = line.split()
        WORLD = int(processes)
        print(*launch(rest), flush=True)
