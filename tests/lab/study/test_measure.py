import copy
import json
import shutil

import pytest
import torch

from spf.cli import main
from spf.data import Anchor, packaged_prompts
from spf.lab.analysis.activations import capture, find_mlps
from spf.lab.analysis.inputs import Prompts
from spf.lab.study import measure
from tests.conftest import make_model, make_tokenizer


def make_prompts(count, seed, length=8):
    ids = torch.randint(5, 2048, (count, length), generator=torch.Generator().manual_seed(seed))
    return Prompts(ids, torch.ones_like(ids))


SETS = {"safe": make_prompts(8, 0), "unsafe": make_prompts(8, 1), "jb_co_task": make_prompts(6, 2)}


def changed(model, scale=0.02, seed=1, only=""):
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if only in name:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.fixture(scope="module")
def world():
    base = make_model("llama")
    tuned = {"ssft-medium": changed(base), "dpo-medium": changed(base, seed=2)}
    embeds = SETS["unsafe"].embed(base)
    embeds = torch.cat([embeds, 0.1 * torch.randn(8, 1, embeds.shape[2])], 1)
    found = measure.measure_world(
        base,
        tuned,
        SETS,
        positions=3,
        attacked={"ssft-medium": {"m=1": embeds}},
        attacked_success={"ssft-medium": {"m=1": [True] * 3 + [False] * 5}},
        evaluate=lambda model: {"safe_instruct": float(next(model.parameters()).detach().abs().mean())},
        scaled=["ssft-medium"],
        alphas=(0, 1, 0.5),
    )
    return base, tuned, found


def test_results_are_json_and_cover_every_model_set_and_layer(world):
    _, _, found = world
    found = json.loads(json.dumps(found))
    assert list(found["models"]) == ["base", "ssft-medium", "dpo-medium"]
    assert list(found["updates"]) == ["ssft-medium", "dpo-medium"]
    assert found["config"]["counts"] == {"safe": 8, "unsafe": 8, "jb_co_task": 6}
    for model in found["models"].values():
        assert len(model["tau"]) == len(model["separation"]) == 2
        assert all(layer["jb_co_task"]["count"] == 6 for layer in model["tau"])
        assert model["lipschitz"]["unsafe"]["mean"] > 0
    update = found["updates"]["ssft-medium"]
    assert len(update["matrices"]) == 6
    assert all(m["rank"] == 32 and len(m["sines"]) <= measure.SINES for m in update["matrices"])
    assert {m["kind"]: tuple(m["shape"]) for m in update["matrices"]} == {
        "up_proj": (64, 32),
        "gate_proj": (64, 32),
        "down_proj": (32, 64),
    }
    assert len(update["rows"][1]["up_proj"]["sets"]["safe"]["coefficients"]) == measure.COEFFICIENTS


def test_attacks_that_work_are_told_apart_after_the_means_were_taken(world):
    tau = world[2]["models"]["ssft-medium"]["tau"][-1]
    assert (tau["m=1"]["count"], tau["m=1 that work"]["count"]) == (8, 3)
    assert "m=1" not in world[2]["models"]["dpo-medium"]["tau"][-1]


def test_tau_in_the_results_is_the_tensor_functions(world):
    base, _, found = world
    hidden = {name: capture(base, p, positions=3, generated=2).hidden[1] for name, p in SETS.items()}
    safe, unsafe = hidden["safe"], hidden["unsafe"]
    values = torch.empty(8)
    for half in (0, 1):
        to_safe = safe[half::2] - safe[1 - half :: 2].mean(0)
        to_unsafe = safe[half::2] - unsafe[1 - half :: 2].mean(0)
        values[half::2] = to_unsafe.norm(dim=1) - to_safe.norm(dim=1)
    assert found["models"]["base"]["tau"][1]["safe"]["mean"] == pytest.approx(float(values.mean()), rel=1e-3)


def test_update_is_the_difference_of_the_weights(world):
    # the released code took the tuned weight in place of the difference
    base, tuned, found = world
    name = find_mlps(base)[1].weight_names()[0]
    W, W2 = (dict(m.named_parameters())[name].detach() for m in (base, tuned["dpo-medium"]))
    U, s, Vh = torch.linalg.svd(W2 - W, full_matrices=False)
    P = torch.linalg.svd(W, full_matrices=False).U[:, : found["updates"]["dpo-medium"]["matrices"][3]["column_rank"]]
    matrix = found["updates"]["dpo-medium"]["matrices"][3]
    assert matrix["name"] == name
    outside = (U - P @ (P.T @ U)).norm(dim=0)
    assert matrix["mean_sine"] == pytest.approx(float(outside.mean()), rel=1e-3)
    inputs = capture(tuned["dpo-medium"], SETS["unsafe"], positions=3, generated=2).inputs[1]
    coefficients = (torch.nn.functional.normalize(inputs, dim=1) @ Vh.T[:, :15]).abs() * s[:15]
    got = found["updates"]["dpo-medium"]["rows"][1]["up_proj"]["sets"]["unsafe"]["coefficients"]
    assert got == pytest.approx(coefficients.mean(0).tolist(), rel=1e-3)


def test_scaling_reaches_both_models_and_leaves_the_tuned_one_as_it_was(world):
    base, tuned, found = world
    level = {name: float(next(m.parameters()).detach().abs().mean()) for name, m in (("base", base), *tuned.items())}
    curve = found["alpha"]["ssft-medium"]["all"]
    assert [point["alpha"] for point in curve] == [0, 1, 0.5]
    assert curve[0]["safe_instruct"] == pytest.approx(level["base"], rel=1e-4)
    assert curve[1]["safe_instruct"] == pytest.approx(level["ssft-medium"], rel=1e-4)
    # the first parameter is the embedding, which belongs to no MLP
    mlps = found["alpha"]["ssft-medium"]["mlp"]
    assert len({point["safe_instruct"] for point in mlps}) == 1
    assert "dpo-medium" not in found["alpha"]
    again = changed(base)
    assert all(torch.equal(a, b) for a, b in zip(tuned["ssft-medium"].parameters(), again.parameters(), strict=True))


def test_gpt2_matrices_are_turned_round():
    base = make_model("gpt2")
    found = measure.measure_world(base, {"tuned": changed(base)}, SETS, positions=2, generated=0)
    shapes = {m["kind"]: m["shape"] for m in found["updates"]["tuned"]["matrices"]}
    assert shapes == {"c_fc": [128, 32], "c_proj": [32, 128]}
    assert found["updates"]["tuned"]["matrices"][0]["chance"] > 0.8


def test_matrices_that_were_not_changed_are_left_out():
    base = make_model("llama")
    tuned = {"attention": changed(base, only="q_proj"), "one": changed(base, only="layers.1.mlp.down_proj")}
    found = measure.measure_world(base, tuned, SETS, positions=2, generated=0)
    assert found["updates"]["attention"]["matrices"] == []
    assert [m["name"] for m in found["updates"]["one"]["matrices"]] == ["model.layers.1.mlp.down_proj.weight"]
    assert found["updates"]["one"]["rows"] == [{}, {}]


def test_models_that_do_not_belong_together_are_refused_before_anything_is_measured():
    base = make_model("llama")
    with pytest.raises(ValueError, match="tuned: no weight differs"):
        measure.measure_world(base, {"tuned": copy.deepcopy(base)}, SETS)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(2048, 48\), and \(2048, 32\)"):
        measure.measure_world(base, {"tuned": make_model("llama", width=48)}, SETS)
    with pytest.raises(ValueError, match="is in one of the two models only"):
        measure.measure_world(base, {"tuned": make_model("qwen")}, SETS)
    with pytest.raises(ValueError, match="set unsafe is missing"):
        measure.measure_world(base, {"tuned": changed(base)}, {"safe": SETS["safe"]})
    with pytest.raises(ValueError, match="called base"):
        measure.measure_world(base, {"base": changed(base)}, SETS)


def test_histograms_hold_every_value_and_nan_is_refused():
    values = torch.tensor([0.0, 1.0, 1.0, 4.0])
    found = measure.describe(values)
    assert (sum(found["counts"]), found["mean"], found["quartiles"]) == (4, 1.5, [0.75, 1.0, 1.75])
    assert found["std"] == pytest.approx(float(values.std()))
    assert measure.describe(torch.ones(3))["counts"] == [3]
    with pytest.raises(ValueError, match="1 of 4 measured values are NaN"):
        measure.describe(torch.tensor([0.0, float("nan"), 1.0, 2.0]))


def test_gradients_are_autograds_and_leave_the_model_alone():
    base = make_model("llama")
    generator = torch.Generator().manual_seed(3)
    anchors = {
        kind: [Anchor(*torch.randint(5, 2048, (2, 4), generator=generator).tolist(), f"{kind} {i}") for i in range(5)]
        for kind in ("safety", "utility")
    }
    tuned = changed(base)
    found = measure.measure_gradients(base, {"tuned": tuned}, anchors, k=4)
    names = [name for mlp in find_mlps(base) for name in mlp.weight_names()]
    parameters = [dict(base.named_parameters())[name] for name in names]

    def gradient(kind):
        total = [torch.zeros_like(p) for p in parameters]
        for chunk in (anchors[kind][:4], anchors[kind][4:]):
            ids = torch.tensor([a.prompt_ids + a.refusal_ids for a in chunk])
            logits = base(input_ids=ids).logits[:, 3:-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()) * len(chunk) / 5
            total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
        return total

    safety, utility = gradient("safety"), gradient("utility")
    flat = [torch.cat([G.flatten() for G in found]) for found in (safety, utility)]
    entry = found["models"]["base"]
    assert entry["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(*flat, dim=0)), abs=1e-4)
    assert entry["norm"]["safety"] == pytest.approx(float(flat[0].norm()), rel=1e-3)
    shares = []
    for G, name in zip(safety, names, strict=True):
        V = torch.linalg.svd(G).Vh[:4].T
        dW = (dict(tuned.named_parameters())[name] - dict(base.named_parameters())[name]).detach()
        shares.append(float((dW @ V).square().sum() / dW.square().sum()))
    assert found["models"]["tuned"]["update_right"] == pytest.approx(sum(shares) / 6, rel=1e-3)
    assert found["models"]["tuned"]["chance_left"] == pytest.approx((4 / 64 * 2 + 4 / 32) / 3)
    assert 0 < found["models"]["tuned"]["overlap_left"] < 1
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    turned = make_model("gpt2")  # holds W^T
    found = measure.measure_gradients(turned, {"tuned": changed(turned)}, anchors, k=4)
    assert 0 < found["models"]["tuned"]["update_right"] < 1


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    base, tokenizer = make_model("llama"), make_tokenizer()
    for name, model in (("a", base), ("b", changed(base)), ("same", base), ("wide", make_model("llama", width=48))):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in ("safe", "unsafe"):
        prompts = packaged_prompts("benign_eval" if name == "safe" else "harmful_eval")[:8]
        lines = [json.dumps({"prompt": p}) for p in prompts]
        (place / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    (place / "empty.jsonl").write_text("", "utf-8")
    (place / "few.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n', "utf-8")
    return place


def command(place, *more, tuned="b", safe="safe.jsonl"):
    files = ["--benign", str(place / safe), "--harmful", str(place / "unsafe.jsonl")]
    models = ["--aligned", str(place / "a"), "--tuned", str(place / tuned)]
    return main(["study", "measure", *models, *files, "--output", str(place / "out"), *more])


def test_command_writes_figures_a_page_and_a_table(checkpoints, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # tables break words on a narrow terminal
    options = [
        "--transforms",
        "past-tense",
        "--alphas",
        "0,1",
        "--alpha_prompts",
        "2",
        "--positions",
        "2",
        "--gradient_prompts",
        "4",
    ]
    assert command(checkpoints, *options) == 0
    results = json.loads((checkpoints / "out" / "results.json").read_text("utf-8"))
    assert results["measurements"]["config"]["counts"] == {"safe": 8, "unsafe": 8, "jailbreak: past-tense": 8}
    assert [p["alpha"] for p in results["measurements"]["alpha"]["b"]["all"]] == [0, 1]
    assert results["measurements"]["alpha"]["b"]["all"][0]["unsafe_refused"]["count"] == 2
    assert results["measurements"]["gradients"]["counts"] == {"safety": 4, "utility": 4}
    page = (checkpoints / "out" / "report.html").read_text("utf-8")
    assert "Do safe and unsafe prompts form clusters?" in page
    assert (checkpoints / "out" / "plots" / "tau.png").is_file()
    said = capsys.readouterr().out
    assert "τ gap, last layer" in said
    assert str(checkpoints / "out") in said.replace("\n", "")


def test_an_interrupted_run_goes_on_where_it_stopped(checkpoints, monkeypatch, capsys):
    options = ["--alphas", "0", "--alpha_prompts", "2", "--positions", "2", "--gradient_prompts", "0"]

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "scale_curve", interrupted)
        assert command(checkpoints, *options) == 130
    kept = f"finished parts are kept in {checkpoints}/out/parts (models)"
    assert capsys.readouterr().err.splitlines()[-1] == f"spf: interrupted; {kept}"
    assert [path.name for path in (checkpoints / "out" / "parts").iterdir()] == ["models.json"]

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_json", full)
        assert command(checkpoints, *options) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"spf: [Errno 28] No space left on device; {kept}"
    calls = []
    measured = measure.measure_world
    monkeypatch.setattr(measure, "measure_world", lambda *a, **k: calls.append(1) or measured(*a, **k))
    assert command(checkpoints, *options) == 0
    assert calls == []
    assert not (checkpoints / "out" / "parts").exists()
    results = json.loads((checkpoints / "out" / "results.json").read_text("utf-8"))
    assert results["measurements"]["alpha"]["b"]["all"][0]["alpha"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(measure, "scale_curve", interrupted)
        assert command(checkpoints, *options) == 130
    assert command(checkpoints, *options[:-1], "3") == 0  # other settings: measured again
    assert calls == [1, 1]


@pytest.mark.parametrize("replaced", ["a", "b", "unsafe.jsonl"])
def test_parts_of_other_weights_or_prompts_are_not_kept(checkpoints, tmp_path, monkeypatch, replaced):
    """A model that was trained again in the same place had the figures of the first one."""
    place = shutil.copytree(checkpoints, tmp_path / "place", ignore=shutil.ignore_patterns("out"))
    options = ["--alphas", "0", "--alpha_prompts", "2", "--positions", "2", "--gradient_prompts", "0"]

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "scale_curve", interrupted)
        assert command(place, *options) == 130
    if replaced == "unsafe.jsonl":
        prompts = packaged_prompts("harmful_eval")[8:16]
        (place / replaced).write_text("\n".join(json.dumps({"prompt": p}) for p in prompts), "utf-8")
    else:
        changed(make_model("llama"), scale=0.1, seed=5).save_pretrained(place / replaced)
    calls = []
    measured = measure.measure_world
    monkeypatch.setattr(measure, "measure_world", lambda *a, **k: calls.append(1) or measured(*a, **k))
    assert command(place, *options) == 0
    assert calls == [1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"safe": "empty.jsonl"}, "holds no rows"),
        ({"safe": "few.jsonl"}, "1 prompts; at least 4"),
        ({"safe": "none.jsonl"}, "no such safety data file"),
        ({"tuned": "same"}, "no weight differs"),
        ({"tuned": "wide"}, "has shape"),
        ({"more": ["--alphas", "a"]}, "--alphas a: numbers"),
        ({"more": ["--transforms", "nonsense"]}, "no transform nonsense"),
        ({"more": ["--transforms", "prefill"]}, "no last prompt token"),
        ({"more": ["--positions", "300"]}, "300 prompt tokens"),
    ],
)
def test_mistakes_end_in_one_sentence(checkpoints, capsys, options, said):
    more = options.pop("more", [])
    assert command(checkpoints, *more, **options) == 2
    assert said in capsys.readouterr().err


def test_names_of_tuned_models():
    assert measure._names(["plain=/a/b", "/c/spf"]) == {"plain": "/a/b", "spf": "/c/spf"}
    with pytest.raises(ValueError, match="the name 'b' is taken"):
        measure._names(["/a/b", "/c/b"])


def test_prompts_end_where_the_answer_begins():
    tokenizer = make_tokenizer()
    rows = measure._load(None, "benign_eval")[:5]
    prompts = measure.tokenise_prompts(rows, tokenizer)
    assert set(prompts.input_ids[:, -1].tolist()) == {tokenizer.convert_tokens_to_ids("<assistant>")}
    lengths = [len(tokenizer(measure.render(r, tokenizer), add_special_tokens=False)["input_ids"]) for r in rows]
    assert prompts.attention_mask.sum(1).tolist() == lengths
