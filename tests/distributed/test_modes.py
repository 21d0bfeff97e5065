"""Two gloo processes under DDP, FSDP2 and ZeRO-1, -2, -3 give the losses and parameters of one process."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from spf.data import packaged_prompts
from tests.conftest import REFUSAL

ROOT = Path(__file__).parents[2]
FP32 = [
    "null-space-full",
    "null-space-lora-adamw",
    "feedback-full",
    "spf-left-full",
    "spf-right-lora",
    "spf-both-full",
    "rank1-lora",
    "safegrad-full",
    "constrained-full-adamw",
    "checkpointing",
]
MATRICES = 15
pytestmark = pytest.mark.distributed
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'spf[deepspeed]'"
)


@functools.cache
def output() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="spf-modes-"))
    prompts = packaged_prompts("harmful_anchors")[:12]
    lines = [json.dumps({"prompt": p, "refusal": REFUSAL}) for p in prompts]
    (directory / "safety.jsonl").write_text("\n".join(lines))
    (directory / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    return directory


@functools.cache
def worker() -> subprocess.Popen:
    """It imports once what every mode needs: each is trained in processes that it forks."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.worker", str(output())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(output() / "worker.log").open("w"),
        text=True,
    )


def launch(mode: str, processes: int, *case: str) -> None:
    print(mode, processes, *case, file=worker().stdin, flush=True)
    codes = worker().stdout.readline().split()
    assert codes == ["0"] * processes, (output() / "worker.log").read_text()[-3000:]


@functools.cache
def trained(mode: str) -> list[dict[str, dict]]:
    """What every rank wrote, by case."""
    processes = 1 if mode == "single" else 2
    if mode == "ddp":
        trained("single")  # one of its cases goes on from a checkpoint of that
    launch(mode, processes)
    ranks = []
    for rank in range(processes):
        cases = {}
        for file in output().glob(f"{mode}-*-{rank}.json"):
            name = file.name.removeprefix(f"{mode}-").removesuffix(f"-{rank}.json")
            cases[name] = json.loads(file.read_text()) | {"parameters": torch.load(file.with_suffix(".pt"))}
        ranks.append(cases)
    return ranks


def distance(one: dict, other: dict) -> float:
    assert one["parameters"].keys() == other["parameters"].keys()
    return max(float((p - other["parameters"][name]).abs().max()) for name, p in one["parameters"].items())


def deviation(one: dict, other: dict, key: str) -> float:
    assert len(one[key]) == len(other[key]) > 0
    return max(abs(a - b) for a, b in zip(one[key], other[key], strict=True))


MODES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def in_mode(mode: str, *rest: str):
    """A test of a mode. All are in this one file, so that one worker process trains every mode once."""
    return pytest.param(mode, *rest, marks=[needs_deepspeed] if mode.startswith("zero") else [])


every_mode = pytest.mark.parametrize("mode", [in_mode(mode) for mode in MODES])


@pytest.mark.parametrize(("mode", "name"), [in_mode(mode, name) for mode in MODES for name in FP32])
def test_two_processes_equal_one(mode, name):
    reference = trained("single")[0][name]
    for ranks in trained(mode):
        case = ranks[name]
        # Adam divides by small second moments, so it amplifies the order of summation
        assert distance(case, reference) < (2e-4 if "adamw" in name else 1e-6)
        assert deviation(case, reference, "losses") < 1e-5
        assert deviation(case, reference, "cos") < 1e-5
        assert case["corrected"] == reference["corrected"] >= (2 if "constrained" in name else 4)
        assert case["split"] == (mode != "ddp")


FAULTS = {"fault": 1, "fault-lora": 2, "fault-late": 4, "fault-one": 1, "fault-one-lora": 2}
"""By which step each planted fault of the null space has to be found: with LoRA, lora_A does not move at the first."""


@pytest.mark.parametrize(("mode", "name"), [in_mode(mode, name) for mode in ["single", *MODES] for name in FAULTS])
def test_a_correction_that_is_left_out_is_found(mode, name):
    for ranks in trained(mode):
        assert "answers the held inputs differently" in ranks[name]["error"]
        assert ranks[name]["step"] <= FAULTS[name]


@pytest.mark.parametrize("mode", [in_mode(mode) for mode in ["single", *MODES]])
def test_a_gradient_that_is_not_corrected_is_found(mode):
    for ranks in trained(mode):
        assert "the gradients still have" in ranks["unprojected"]["error"]


@every_mode
def test_ranks_ask_for_own_refusals_in_step(mode):
    """Ranks that judge for themselves make different numbers of passes, and wait for each other for ever."""
    first, second = (ranks["own-refusals"]["rows"] for ranks in trained(mode))
    assert first == second
    assert len(first) == 6


READ = [("read", "null-space-full"), ("read-lora", "null-space-lora-adamw")]


@pytest.mark.parametrize(("mode", "name", "plain"), [in_mode(mode, *names) for mode in MODES for names in READ])
def test_ranks_write_the_answers_that_rank_0_reads(mode, name, plain):
    """In the middle of training, and without a trace in it."""
    for ranks in trained(mode):
        case = ranks[name]
        # after the second and the fourth step, and at the end
        assert case["written"] == [1, 1, 1]
        assert set(case["rates"]) == {1.0}
        assert not case["warned"]
        assert distance(case, ranks[plain]) == 0
        assert case["losses"] == ranks[plain]["losses"]


@every_mode
def test_ranks_share_the_audit_and_agree(mode):
    alone, ranks = trained("single")[0]["audit"], [ranks["audit"] for ranks in trained(mode)]
    assert 5 < len(alone["conflicts"]) < 37
    for found in ranks:
        assert found["conflicts"] == ranks[0]["conflicts"]
        assert [c[::2] for c in found["conflicts"]] == [c[::2] for c in alone["conflicts"]]
        assert max(abs(a[1] - b[1]) for a, b in zip(found["conflicts"], alone["conflicts"], strict=True)) < 1e-5
        # what is held is the same, so is the run
        assert deviation(found, alone, "losses") < 1e-4
        # so are the states by which over-refusals are told
        assert found["states"] == pytest.approx(alone["states"], rel=1e-4)
    assert len(alone["states"]) == 37
    assert alone["passes"] == 8
    assert [found["passes"] for found in ranks] in ([5, 3], [5, 5])


@every_mode
def test_ranks_leave_the_same_rows_out_or_say_why_not(mode):
    alone, ranks = trained("single")[0]["left-out"], [ranks["left-out"] for ranks in trained(mode)]
    rows = alone["left_out"]
    assert set(rows) >= {row for row, *_ in alone["conflicts"] if row < 16}
    assert alone["rows"] == 64 - len(rows) < 64
    for found in ranks:
        if mode == "ddp":
            assert (found["left_out"], found["rows"]) == (rows, alone["rows"])
            assert deviation(found, alone, "losses") < 1e-4
        else:
            assert (found["left_out"], found["rows"]) == ([], 64)
            assert "parameters are sharded" in found["obstacle"]
            assert deviation(found, trained("single")[0]["audit"], "losses") < 1e-4


@every_mode
def test_an_earlier_audit_leaves_rows_out_in_every_mode(mode):
    alone, ranks = trained("single")[0]["taken"], [ranks["taken"] for ranks in trained(mode)]
    assert 16 <= len(alone["left_out"]) <= alone["refused"] == 20
    assert alone["rows"] == 64 - len(alone["left_out"])
    for found in ranks:
        for what in ("left_out", "held", "rows", "refused"):
            assert found[what] == alone[what]
        assert not found["other_weights"]
        assert deviation(found, alone, "losses") < 1e-4
        assert distance(found, alone) < 1e-5


@pytest.mark.parametrize(("mode", "name"), [in_mode(mode, name) for mode in MODES for name in ("grown", "grown-lora")])
def test_ranks_hold_the_same_directions_more(mode, name):
    alone = trained("single")[0][name]
    # 8 of 36 and of 63 inputs, of 40 by one head, and two rounds of 4 of the 23, 27 and 47 at hand
    assert alone["directions"] == [16]
    assert alone["left"] == [15, 19, 39]
    for case in (ranks[name] for ranks in trained(mode)):
        assert case["directions"] == alone["directions"]
        assert case["left"] == alone["left"]
        assert case["error"] < 4
        assert distance(case, alone) < (2e-4 if "lora" in name else 1e-5)


@pytest.mark.parametrize("mode", [in_mode(mode) for mode in ("single", *MODES)])
def test_a_run_that_grew_goes_on_where_it_was(mode):
    for ranks in trained(mode):
        assert ranks["grown-resume"]["directions"] == ranks["grown"]["directions"]
        assert distance(ranks["grown-resume"], ranks["grown"]) < 1e-5


@every_mode
def test_bf16_rounds_differently_and_holds(mode):
    for ranks in trained(mode):
        assert ranks["null-space-bf16"]["corrected"] == 4
        reference = trained("single")[0]["null-space-full"]
        assert deviation(ranks["null-space-bf16"], reference, "losses") < 0.1


@every_mode
def test_a_run_taken_up_again_is_the_same_run(mode):
    for ranks in trained(mode):
        assert distance(ranks["resume"], ranks["null-space-full"]) < 1e-6
        assert distance(ranks["resume-lora"], ranks["null-space-lora-adamw"]) < 2e-5
        # under FSDP2 the optimizer had no state of what is kept fixed, and there was no going on
        assert ranks["resume-bf16"]["corrected"] == 4
        assert distance(ranks["resume-bf16"], ranks["null-space-bf16"]) < 1e-2
        for key in ("losses", "cos"):
            assert deviation(ranks["resume"], ranks["null-space-full"], key) < 1e-5
        assert ranks["resume"]["corrected"] == 4


AFTER = [in_mode(mode, name) for mode in ("single", *MODES) for name in ("after", "after-lora")]


@pytest.mark.parametrize(("mode", "name"), AFTER)
def test_what_is_saved_after_training_is_whole_and_held(mode, name):
    """FSDP2's sharded checkpoints had `save_model` write nothing, without a word."""
    case = trained(mode)[0][name]
    assert case["missing"] == []
    assert case["off"] == 0
    assert case["unheld"] < 1e-5
    assert all(ranks[name]["said"] == [] for ranks in trained(mode))
    assert any(file.startswith("spf_subspace-") for file in case["files"]) == ("lora" in name)
    # checkpoints go on being sharded
    assert len(set(case["kinds"])) == (mode == "fsdp2")
    assert all("SHARDED" in kind for kind in case["kinds"])
    if mode in ("ddp", "zero1", "zero2"):
        names = [[file.partition("-")[0] for file in case[what]] for what in ("alone", "files")]
        assert names[0] == names[1]
        assert (case["said_alone"], case.get("apart")) == ([], 0.0 if "lora" in name else None)


@pytest.mark.parametrize(("mode", "name"), AFTER)
def test_what_others_wrote_into_the_model_is_said(mode, name):
    for case in (ranks[name] for ranks in trained(mode)):
        if "lora" in name:
            assert "1 weights that are not trained have been changed" in case["frozen"]
    for what in ("said_of_another", *(() if "lora" in name else ("said_of_a_norm",))):
        # with parts, those who hold some of it see it
        assert any("is not what was held" in said for ranks in trained(mode) for said in ranks[name][what]), what


@pytest.mark.parametrize(("mode", "name"), AFTER)
def test_a_trainer_trains_again_or_says_what_to_do(mode, name):
    zero = mode.startswith("zero")
    alone = trained("single")[0][name.replace("after", "anew") if zero else name]
    for case in (ranks[name] for ranks in trained(mode)):
        assert ("under DeepSpeed a Trainer trains once" in case.get("refused", "")) == zero
        assert ("refused" in case) == zero
        # what that says was done: a new trainer with this model
        assert case["held_again"] == 4
        assert deviation(case, alone, "again") < 1e-4


@pytest.mark.parametrize("mode", [in_mode("ddp")])
def test_ddp_goes_on_from_one_process(mode):
    assert distance(trained("ddp")[0]["resume-elsewhere"], trained("single")[0]["null-space-full"]) < 1e-6


@pytest.mark.parametrize("mode", [in_mode("zero2"), in_mode("zero3")])
def test_the_optimizer_may_be_on_the_cpu(mode):
    single = trained("single")[0]
    for ranks in trained(mode):
        assert ranks["offload"]["corrected"] == ranks["offload-spf"]["corrected"] == 4
        assert distance(ranks["offload"], single["null-space-full"]) < 1e-6
        assert distance(ranks["offload-spf"], single["spf-both-full"]) < 1e-6


@pytest.mark.parametrize("mode", [in_mode(mode) for mode in ("zero1", "zero2", "zero3")])
def test_borders_cut_rows(mode):
    """What is hard about flat partitions; without it the other tests would prove less."""
    assert trained(mode)[0]["null-space-lora-adamw"]["cut_rows"] > 0
    assert trained(mode)[0]["null-space-full"]["cut_rows"] >= (mode == "zero3")


@pytest.mark.parametrize("mode", [in_mode("zero3")])
def test_stage_3_in_groups(mode):
    for case in (rank["in-groups"] for rank in trained("zero3")):
        assert case["groups"] > 1
        assert case["corrected"] == 4
        assert distance(case, trained("single")[0]["null-space-full"]) < 1e-6
        assert "steps them in" in case["refused"]


@pytest.mark.parametrize("mode", [in_mode("fsdp2")])
def test_fsdp2_goes_on_with_another_number_of_processes(mode):
    trained("fsdp2")
    launch("fsdp2", 1, "resume-elsewhere")
    parameters = torch.load(output() / "fsdp2-resume-elsewhere-0.pt")
    assert distance({"parameters": parameters}, trained("single")[0]["null-space-full"]) < 1e-6


@pytest.mark.parametrize("mode", [in_mode("fsdp2"), in_mode("zero3")])
def test_one_process_may_have_its_weights_in_parts(mode):
    """As one GPU with offload does: its weights were hashed, of which some are empty, and some no tensors to hash."""
    trained(mode)
    launch(mode, 1, "one-taken", "one-lora")
    for name, other in (("one-taken", "taken"), ("one-lora", "after-lora")):
        case, alone = json.loads((output() / f"{mode}-{name}-0.json").read_text()), trained("single")[0][other]
        assert deviation(case, alone, "losses") < 1e-4
        if name == "one-taken":
            assert [case[what] for what in ("left_out", "held", "other_weights")] == [
                *(alone[what] for what in ("left_out", "held")),
                False,
            ]
        else:
            assert case["said"] == []


@every_mode
def test_collectives_in_the_step_hooks(mode):
    for ranks in trained(mode):
        check_collectives(mode, ranks)


def check_collectives(mode: str, cases: dict[str, dict]) -> None:
    """Their number and bytes in the step hooks over 4 steps, of which 2 are monitored."""
    calls = {name: [tuple(call) for call in cases[name].get("collectives", [])] for name in cases}
    scalars = ("all_reduce", 3 * MATRICES * 4)
    if mode == "ddp":  # nothing but numbers by which rules decide
        of_adapters = 3 * 28 * 4
        assert all(kind == "all_reduce" and size <= of_adapters for found in calls.values() for kind, size in found)
        assert calls["null-space-full"] == [scalars] * 2  # cosines
        return
    null_space = calls["null-space-full"]
    assert null_space.count(scalars) == 2
    rest = [call for call in null_space if call != scalars]
    if mode == "fsdp2":
        assert rest == []
    # one for the cut rows of all matrices, 8 floats each
    assert len(rest) in (0, 4)
    assert all(call == ("all_reduce", cases["null-space-full"]["cut_rows"] * 8 * 4) for call in rest)
    # the scalars of all matrices in one, the matrices in another
    spf = calls["spf-left-full"]
    assert [call for call in spf if call == scalars] == [scalars] * 4
    assert 4 < len(spf) <= 9  # one more to show that the first correction arrived
    assert len(calls["rank1-lora"]) == len(calls["safegrad-full"]) == 5
