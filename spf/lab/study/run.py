"""`spf study run`: the whole study of one seed, stage by stage, resumable."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from spf.arguments import RunArguments
from spf.config import File, NotNegative, read_json
from spf.errors import keeping, working
from spf.files import claim, directory_lock, write_json
from spf.lab.report.tables import rich_table
from spf.lab.study import grammar
from spf.lab.study.bridge import BridgeSettings, run_bridge
from spf.lab.study.data import BASE, TEST_SETS, EvalSet, Sampler, WorldSettings
from spf.lab.study.evaluation import evaluate, quick_rates, rate_dict
from spf.lab.study.jailbreaks import Place, mean_embedding_norm, soft_token_attack
from spf.lab.study.measure import measure_world
from spf.lab.study.model import SIZES, build_model
from spf.lab.study.report import READINGS, success_table, write_report
from spf.lab.study.training import (
    PROTOCOLS,
    STAGE_NUMBER,
    STUDY_MODES,
    TASKS_BY_RATE,
    Modes,
    Protocol,
    Schedule,
    Task,
    copied,
    pretraining_step,
    protocol_step,
    run_stage,
)
from spf.models import machine_device
from spf.progress import progress, tracked


@dataclass(frozen=True)
class Preset:
    """A size of the study.

    tasks: what the protocols are told, by rate. protocols: schedules by rate, and by protocol. save_every: steps
    between resumable states. test_prompts: per test set. attack_tokens: soft tokens of the attacks. scale_prompts: per
    set and factor on the update.
    """

    model: str
    world: WorldSettings
    pretraining: Schedule
    modes: Modes
    tasks: dict[str, dict[Protocol, Task]]
    protocols: dict[str, dict[Protocol, Schedule]]
    bridge: BridgeSettings
    save_every: int
    test_prompts: int
    attack_tokens: tuple[int, ...]
    attack_place: Place
    attack_prompts: int
    scale_prompts: int


def paper() -> Preset:
    """The study's size, for a GPU.

    Deviations from Jain et al.: a Llama-class model (gated MLP, RMSNorm, rotary positions) instead of minGPT; a null
    token of its own; token losses are means over targets, so one coefficient serves every length.
    """

    def schedule(rate: float) -> Schedule:
        return Schedule(10_000, 512, rate, weight_decay=1e-4)

    return Preset(
        model="mini",
        world=WorldSettings(operators=(*BASE, "r1", "r3")),
        pretraining=Schedule(100_000, 512, 1e-3, 10_000, 1e-6),
        modes=STUDY_MODES,
        tasks=TASKS_BY_RATE,
        protocols={
            name: {protocol: schedule(rate) for protocol in (*PROTOCOLS, "instruct")}
            for name, rate in (("medium", 1e-4), ("small", 1e-5))
        },
        bridge=BridgeSettings(Schedule(2_000, 512, 1e-4)),
        save_every=1_000,
        test_prompts=1_000,
        attack_tokens=(1, 2, 3, 5, 10),
        attack_place="before_eot",
        attack_prompts=1_000,
        scale_prompts=200,
    )


def tiny() -> Preset:
    """About 620 CPU seconds on one thread, 6.5 minutes on two free cores.

    Deviations from `paper`: 3 layers of width 64, MLP width 128. One PCFG in pre-training. A leaf of the grammar yields
    one terminal (12 symbols in all), so strings are a third as long, and all texts have 12 tokens: the distance from a
    text token to its output is the same everywhere. Pre-training text is of the safe and unsafe (ID-MG) sub-grammars
    too, without labels; text and outputs are learned together from the start (no slow shift between loss modes).
    2 000 steps of 128 at 3e-3, then 200 to 1 400 steps of 96 a protocol at 2e-3 (medium) and 6e-4 (small) instead of
    1e-4 and 1e-5. SSFT sees as many unsafe prompts as safe ones (the paper: a fifth). gamma of unlearning is .03 and
    .003 (.1 and .01), of DPO .001 and .0001 (.01 and .002): with the paper's, safe prompts lose outputs in so few
    steps. Soft tokens stand before the prompt, so that the text keeps its distance to the outputs.
    """

    def protocols(rate: float, ssft: int, dpo: int, unlearning: int) -> dict[Protocol, Schedule]:
        return {
            "instruct": Schedule(200, 96, rate, 20),
            "ssft": Schedule(ssft, 96, rate, 20),
            "dpo": Schedule(dpo, 96, rate, 20),
            "unlearning": Schedule(unlearning, 96, rate, 20),
        }

    tasks: dict[str, dict[Protocol, Task]] = {
        name: {
            "instruct": Task(0.0),
            "ssft": Task(0.5),
            "dpo": Task(0.5, beta=0.1, gamma=gamma / 30),
            "unlearning": Task(0.5, gamma=gamma),
        }
        for name, gamma in (("medium", 0.03), ("small", 0.003))
    }
    return Preset(
        model="tiny",
        world=WorldSettings(
            leaf=1,
            window=(12, 12),
            pcfgs=(1,),
            operators=(*BASE, "r1", "r3"),
            branches=("base", "safe", "id_mg"),
        ),
        pretraining=Schedule(2_000, 128, 3e-3, 100, 3e-5),
        modes=((0.0, 0.5, 0.25, 0.25), (0.0, 0.5, 0.25, 0.25)),
        tasks=tasks,
        protocols={"medium": protocols(2e-3, 1400, 1200, 500), "small": protocols(6e-4, 300, 300, 300)},
        bridge=BridgeSettings(Schedule(200, 64, 1e-3, 20)),
        save_every=500,
        test_prompts=500,
        attack_tokens=(1, 2, 5, 10),
        attack_place="prefix",
        attack_prompts=128,
        scale_prompts=100,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": tiny, "paper": paper}


def run_study(args: RunArguments) -> None:
    """Run all stages that `args.output` does not hold yet; write results.json, report.html and its plots."""
    preset = PRESETS[args.preset]()
    directory = Path(args.output)
    with directory_lock(directory):
        study = Study(preset, args)
        study.claim()
        with keeping(study.kept), working():
            results = study.run()
            title = f"Study, {results['preset']}, {results['grammar']} grammar, seed {results['seed']}"
            Console().print(rich_table(success_table([results], "free_running"), title, READINGS["free_running"]))
            Console().print(f"Figures: {directory / 'results.json'}", soft_wrap=True)
            Console().print(f"Report:  {write_report(results, directory)}", soft_wrap=True)


class _Stage(File):
    """A finished stage's file."""

    seconds: NotNegative
    content: dict[str, Any]


class Study:
    """One seed of the study in one directory."""

    def __init__(self, preset: Preset, args: RunArguments):
        self.preset = preset
        self.args = args
        self.world = WorldSettings(**{**vars(preset.world), "level5": args.grammar})
        self.directory = Path(args.output)
        self.device = machine_device().type
        self.tests = self._tests(preset.test_prompts)
        self.quick = {name: test[: preset.scale_prompts] for name, test in self.tests.items()}
        self.seconds: dict[str, float] = {}

    def claim(self) -> None:
        """Refuse a directory that holds a run with other settings."""
        settings = {"preset": asdict(self.preset), "grammar": self.args.grammar, "seed": self.args.seed}
        claim(self.directory / "settings.json", settings)

    def kept(self) -> str:
        """What an interrupted run leaves."""
        names = [path.parent.name for path in self.directory.glob("*/history.json")]
        names += [path.stem for path in self.directory.glob("*.json") if path.stem not in ("settings", "results")]
        if not names:
            return "no stage is finished; a training stage goes on from its last saved state, if it has one"
        return f"finished stages are kept in {self.directory} ({', '.join(sorted(names))}); the same command goes on"

    def run(self) -> dict[str, Any]:
        """All stages; returns the results, which are also in results.json."""
        data = self._stage("data", self._data)
        base, histories = self._pretrain()
        tuned = self._protocols(base, histories)
        models = {"base": base, **tuned}
        evaluation = self._stage("evaluation", lambda: {n: evaluate(m, self.tests) for n, m in models.items()})
        attack_models = {name: model for name, model in tuned.items() if name.removesuffix("-medium") in PROTOCOLS}
        attack, embeds, works = self._attack(attack_models)
        prompts = {name: test.prompts() for name, test in self.tests.items()}

        def measure() -> dict[str, Any]:
            return measure_world(
                base,
                tuned,
                prompts,
                seed=self.args.seed,
                attacked=embeds,
                attacked_success=works,
                evaluate=lambda model: quick_rates(model, self.quick),
                scaled=list(attack_models),
                batch_size=128,
            )

        measurements = self._stage("measurements", measure)
        bridge = self._stage(
            "bridge",
            lambda: run_bridge(
                tuned["ssft-medium"],
                self.preset.bridge,
                self.world,
                self.tests,
                prompts,
                self.args.seed,
                self.directory / "bridge",
            ),
        )
        results = {
            "command": "spf study run " + " ".join(f"--{n} {v}" for n, v in vars(self.args).items() if n != "output"),
            "preset": self.args.preset,
            "grammar": self.args.grammar,
            "seed": self.args.seed,
            "versions": {name: version(name) for name in ("spf", "torch", "transformers", "numpy")},
            "machine": {"device": self.device, "threads": torch.get_num_threads(), "platform": platform.platform()},
            "settings": asdict(self.preset),
            "seconds": self.seconds,
            "data": data,
            "training": histories,
            "evaluation": evaluation,
            "attack": attack,
            "measurements": measurements,
            "bridge": bridge,
        }
        write_json(self.directory / "results.json", results)
        return results

    def _tests(self, count: int) -> dict[str, EvalSet]:
        test = STAGE_NUMBER["test"]
        return {
            name: Sampler(self.world, (self.args.seed, test, i)).test(name, count) for i, name in enumerate(TEST_SETS)
        }

    def _stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage whose result is a JSON file, computed unless it is there."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            with progress(None, name):
                content = compute()
            write_json(path, {"seconds": round(time.perf_counter() - start, 1), "content": content})
        stored = read_json(_Stage, path, "damaged; remove it, and the stage is done again")
        self.seconds[name] = stored.seconds
        return stored.content

    def _data(self) -> dict[str, Any]:
        level5, leaf = self.world.level5, self.world.leaf
        return {
            "lengths": grammar.length_report(level5, leaf, seed=self.args.seed),
            "separability": grammar.separability_report(level5, self.world.window, leaf, seed=self.args.seed),
        }

    def _pretrain(self) -> tuple[LlamaForCausalLM, dict[str, Any]]:
        preset, seed = self.preset, self.args.seed
        # Room for the soft tokens of the attack.
        length = self.world.length + max(preset.attack_tokens)
        model, history = run_stage(
            build_model(SIZES[preset.model], length, seed).to(self.device),  # type: ignore[arg-type]
            preset.pretraining,
            pretraining_step(self.world, preset.pretraining, preset.modes, seed),
            self.directory / "pretraining",
            "pre-training",
            save_every=preset.save_every,
        )
        self.seconds["pretraining"] = history["seconds"]
        return model, {"pretraining": history}

    def _protocols(self, base: LlamaForCausalLM, histories: dict[str, Any]) -> dict[str, LlamaForCausalLM]:
        tuned = {}
        for rate, protocols in self.preset.protocols.items():
            for protocol, schedule in protocols.items():
                if protocol == "instruct" and rate == "small":
                    continue
                name = f"{protocol}-{rate}"
                task = self.preset.tasks[rate][protocol]
                step = protocol_step(protocol, task, base, self.world, schedule, self.args.seed)
                model = copied(base)
                model, history = run_stage(
                    model, schedule, step, self.directory / name, name, save_every=self.preset.save_every
                )
                tuned[name], histories[name] = model, history
                self.seconds[name] = history["seconds"]
        return tuned

    def _attack(
        self, models: dict[str, LlamaForCausalLM]
    ) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], dict[str, dict[str, list[bool]]]]:
        """Soft tokens against each model. Cheap, so that it is done anew when a run is continued."""
        start = time.perf_counter()
        rates: dict[str, Any] = {}
        embeds: dict[str, dict[str, torch.Tensor]] = {}
        works: dict[str, dict[str, list[bool]]] = {}
        test = self.tests["unsafe"][: self.preset.attack_prompts]
        for name, model in tracked(list(models.items()), "attacks"):
            radius = mean_embedding_norm(model)
            rates[name], embeds[name], works[name] = {}, {}, {}
            for tokens in self.preset.attack_tokens:
                place = self.preset.attack_place
                options: dict[str, Any] = {"place": place, "seed": self.args.seed}
                found = soft_token_attack(model, test, tokens, radius, **options)
                control = soft_token_attack(model, test, tokens, radius, steps=0, **options)
                count = len(found.success)
                rates[name][f"m={tokens}"] = {
                    "radius": radius,
                    "success": rate_dict(int(found.success.sum()), count),
                    "first_token": rate_dict(int(found.first_token.sum()), count),
                    "random_success": rate_dict(int(control.success.sum()), count),
                    "random_first_token": rate_dict(int(control.first_token.sum()), count),
                }
                embeds[name][f"m={tokens}"] = found.embeds
                works[name][f"m={tokens}"] = found.success.tolist()
        self.seconds["attack"] = round(time.perf_counter() - start, 1)
        return rates, embeds, works
