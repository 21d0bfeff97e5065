"""Loading models: an adapter's base that was moved with it, and what is said of a base that is written."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from spf.models import _base, load_model
from spf.train import save_base
from tests.conftest import make_model


def lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for weights in adapted.parameters():
            weights += 0.05 * torch.randn_like(weights) * weights.requires_grad
    return adapted


@pytest.fixture
def trained(tmp_path, tokenizer):
    """What `spf train` leaves of an adapter above another: the base as a whole, and the new adapter beside it."""
    lora(make_model(width=64)).save_pretrained(tmp_path / "first")
    base = make_model(width=64)
    save_base(base, tokenizer, tmp_path / "first", tmp_path / "out")
    model = lora(base)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out" / "checkpoint-3")
    with torch.no_grad():
        return tmp_path / "out", model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("place", [".", "checkpoint-3"])
def test_an_adapter_finds_what_it_stands_on_after_both_were_moved(trained, tmp_path, place):
    """It is named by an absolute path; the loader took that for an id of the hub."""
    out, wanted = trained
    shutil.move(out, tmp_path / "elsewhere")
    with torch.no_grad():
        model = load_model(str(tmp_path / "elsewhere" / place), torch.float32)[0].eval()
        assert torch.allclose(model(input_ids=torch.arange(5, 25)[None]).logits, wanted, atol=1e-4)


def test_a_base_that_is_nowhere_is_named(trained, tmp_path):
    out, _ = trained
    [base] = out.glob("base-*")
    shutil.rmtree(base)
    said = rf"the adapter {out} stands on {base}, which is not there; put that model there, or into {out}, or correct"
    with pytest.raises(FileNotFoundError, match=said):
        load_model(str(out))
    # an id of the hub is none of our business
    assert _base(out, "base-of/a-hub") == "base-of/a-hub"


def test_what_a_base_is_for_is_said_when_it_is_written(capsys, trained):
    out, wanted = trained
    [base] = out.glob("base-*")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line.startswith(f"spf: {base} is a whole model (0.")
    # the lines that it gives to ship one model
    place = {}
    exec(line[line.index("from spf.models") :], place)
    whole = load_model(str(Path(f"{out}-merged")), torch.float32)[0].eval()
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=torch.arange(5, 25)[None]).logits, wanted, atol=1e-4)
