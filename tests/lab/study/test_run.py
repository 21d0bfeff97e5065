"""`spf study run` from end to end in a world smaller than tiny, and the bridge's parts."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from spf.lab.study import bridge
from spf.lab.study import run as study_run
from spf.lab.study.bridge import BridgeSettings, anchors_of, pairs_of, toy_tokenizer
from spf.lab.study.data import EOT, ID, STOP, TEST_SETS, VOCABULARY, Sampler, WorldSettings
from spf.lab.study.measure import measure_world
from spf.lab.study.model import ModelSize
from spf.lab.study.run import PRESETS, RunArguments, run_study
from spf.lab.study.training import Schedule

WORLD = WorldSettings(leaf=1, window=(6, 6), pcfgs=(1,), operators=("(", ")", "[", "r1", "r3"))


def test_anchors_are_refusals_of_unsafe_prompts():
    test = Sampler(WORLD, (0,)).test("unsafe", 5)
    for anchor in anchors_of(test):
        assert anchor.prompt_ids[-1] == EOT
        assert anchor.refusal_ids == [ID["null"]] * 6 + [STOP]
        assert len(anchor.prompt_ids) == 11


def test_tokenizer_reads_every_word_as_one_token():
    tokenizer = toy_tokenizer()
    assert tokenizer(" ".join(VOCABULARY))["input_ids"] == list(range(59))


def test_pairs_render_to_the_samples_tokens():
    from spf.safetylock.pairs import encode

    test = Sampler(WORLD, (0,)).test("unsafe", 5)
    tokenizer = toy_tokenizer()
    for pair, null, executed in zip(pairs_of(test), test.null.ids, test.instruct.ids, strict=True):
        for answer, ids in ((pair.safe, null), (pair.unsafe, executed)):
            found, length = encode(pair.messages, answer, pair.where, tokenizer)
            assert found == ids.tolist()
            assert length == 7


def test_presets_can_be_built():
    for preset in PRESETS.values():
        made = preset()
        assert made.protocols["medium"].keys() == {"instruct", "ssft", "dpo", "unlearning"}
        assert made.protocols["medium"]["dpo"].rate > made.protocols["small"]["dpo"].rate
    paper = PRESETS["paper"]()
    assert paper.world.window == (15, 25)
    assert paper.world.length <= 100
    assert (paper.pretraining.steps, paper.pretraining.batch, paper.pretraining.rate) == (100_000, 512, 1e-3)
    assert {s.rate for s in paper.protocols["medium"].values()} == {1e-4}


@pytest.fixture
def smallest(monkeypatch):
    """A preset of seconds: nothing is learned, every stage runs."""
    step = Schedule(2, 8, 1e-3)
    tiny = PRESETS["tiny"]()
    preset = replace(
        tiny,
        world=WORLD,
        pretraining=step,
        protocols={"medium": dict.fromkeys(tiny.protocols["medium"], step), "small": {"ssft": step}},
        bridge=BridgeSettings(step, anchors=40, heads=1),
        test_prompts=24,
        attack_tokens=(1,),
        attack_prompts=8,
        scale_prompts=8,
    )
    monkeypatch.setitem(study_run.PRESETS, "tiny", lambda: preset)
    monkeypatch.setitem(study_run.SIZES, "tiny", ModelSize(1, 2, 16, 16))
    few = {"alphas": (0.0, 1.5), "prompts": 8, "lipschitz_prompts": 4}
    monkeypatch.setattr(study_run, "measure_world", partial(measure_world, **few))
    monkeypatch.setattr(bridge, "measure_world", partial(measure_world, **few))
    return preset


def test_the_whole_study_runs_and_continues(smallest, tmp_path, monkeypatch, capsys):
    args = RunArguments(str(tmp_path / "run"), "tiny", "parity", 3)
    run_study(args)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["command"] == "spf study run --preset tiny --grammar parity --seed 3"
    names = ["base", "instruct-medium", "ssft-medium", "dpo-medium", "unlearning-medium", "ssft-small"]
    assert set(results["evaluation"]) == set(names)
    assert set(results["evaluation"]["base"]) == set(TEST_SETS)
    assert results["evaluation"]["base"]["safe"]["instruct"]["free_running"]["count"] == 24
    assert set(results["measurements"]["updates"]) == set(names) - {"base"}
    assert set(results["attack"]) == {"ssft-medium", "dpo-medium", "unlearning-medium"}
    assert set(results["bridge"]["evaluation"]) == {"before", "plain", "null-space", "plain+lock", "null-space+lock"}
    assert "new_operators" in results["bridge"]["evaluation"]["null-space"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert "parity grammar" in capsys.readouterr().out

    # A second call finds every stage done: nothing is trained or measured again.
    monkeypatch.setattr(study_run, "measure_world", None)
    monkeypatch.setattr(study_run, "run_bridge", None)
    run_study(args)
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    for key in ("evaluation", "measurements", "attack", "bridge", "training"):
        assert again[key] == results[key], key


def test_a_directory_keeps_its_settings(smallest, tmp_path):
    from spf.files import write_json

    write_json(tmp_path / "settings.json", {"seed": 1})
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run_study(RunArguments(str(tmp_path), "tiny", "parity", 0))


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--seed must be at least 0, not -1"):
        run_study(RunArguments(str(tmp_path), seed=-1))


def test_options_reach_the_run(monkeypatch):
    # In the released code every boolean option is read as true.
    from spf.cli import main

    seen = []
    monkeypatch.setattr(study_run, "run_study", seen.append)
    assert main(["study", "run", "--output", "x", "--grammar", "parity", "--seed", "4"]) == 0
    assert seen == [RunArguments("x", "tiny", "parity", 4)]
    assert main(["study", "run", "--output", "x", "--grammar", "released"]) == 2


def test_two_runs_with_one_seed_draw_the_same_weights():
    from spf.lab.study.model import build_model

    first, second = (build_model(ModelSize(1, 2, 16, 16), 20, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
