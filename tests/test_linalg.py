"""The products of the core are float32's whatever rounds operands around them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import spf.linalg
from spf import NullSpace, SafetyCallback, SafetyProbe
from spf.bases import InputSketch
from spf.lab.analysis.gradients import overlap
from spf.linalg import bfloat16_parts, exact_matmul, float32_is_exact, split_matmul
from tests.conftest import make_model
from tests.test_callback import make_trainer, safety_data

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.matmul.default}


def rounded(x, bits=10):
    """float32 with so many bits of mantissa, as tensor cores read it in TF32."""
    shift = 23 - bits
    whole = x.view(torch.int32)
    return (((whole + (1 << (shift - 1))) >> shift) << shift).view(torch.float32)


class TF32(TorchDispatchMode):
    """Every float32 product with operands of 10 bits: what `tf32=True` makes of them on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            narrow = lambda x: (  # noqa: E731
                rounded(x.contiguous()) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
            )
            args = tree_map(narrow, args)
        return function(*args, **(kwargs or {}))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 200),
    k=st.integers(1, 40),
    kinds=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    seed=st.integers(0, 999),
)
def test_split_products_are_as_exact_as_float32(m, n, k, kinds, seed):
    torch.manual_seed(seed)
    A, B = torch.randn(m, n).to(kinds[0]), torch.randn(n, k).to(kinds[1])
    wanted = A.double() @ B.double()
    size = A.double().abs() @ B.double().abs()
    # A float32 product's own bound is n roundings (Higham, Accuracy and Stability, 3.5): how it is summed is the
    # machine's affair. Parts are multiplied without rounding, so only sums are rounded; a lost part leaves 2^-17.
    for product, allowed in ((split_matmul(A, B), 2**-20 * size), (exact_matmul(A, B), (n + 2) * 2**-24 * size)):
        assert product.dtype == torch.float32
        assert bool(((product.double() - wanted).abs() <= allowed + 1e-30).all())


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        ((torch.float32, torch.float32), 6),
        ((torch.bfloat16, torch.float32), 3),
        ((torch.float32, torch.bfloat16), 3),
        ((torch.float16, torch.float32), 5),
        ((torch.bfloat16, torch.bfloat16), 1),
    ],
)
def test_the_number_of_split_products(kinds, count, monkeypatch):
    made = []
    real = spf.linalg._product
    monkeypatch.setattr(spf.linalg, "_product", lambda A, B: made.append((A.dtype, B.dtype)) or real(A, B))
    split_matmul(torch.randn(4, 8).to(kinds[0]), torch.randn(8, 3).to(kinds[1]))
    assert made == [(torch.bfloat16, torch.bfloat16)] * count


@given(seed=st.integers(0, 999), exponent=st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_parts_add_up_to_the_number(seed, exponent):
    torch.manual_seed(seed)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        X = (torch.randn(50) * (2.0**exponent if kind != torch.float16 else 1)).to(kind)
        assert torch.equal(sum(part.double() for part in bfloat16_parts(X)), X.double())


def test_products_are_exact_under_tf32_and_autocast():
    torch.manual_seed(0)
    A, B = torch.randn(64, 300), torch.randn(300, 32)
    wanted = A.double() @ B.double()
    error = lambda C: float((C.double() - wanted).norm() / wanted.norm())  # noqa: E731
    assert float32_is_exact(A.device)
    with TF32():
        assert not float32_is_exact(A.device)
        assert error(A @ B) > 1e-4  # the simulation rounds
        assert error(exact_matmul(A, B)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert error(A @ B) > 1e-3
        assert error(exact_matmul(A, B)) < 1e-6


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("learning_rate", [pytest.param(1e-5, marks=pytest.mark.slow), 5e-3])
def test_the_null_space_holds_under_tf32(tuning, learning_rate, tmp_path, tokenizer, rows):
    model = make_model()
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = make_trainer(tmp_path, tokenizer, callback, model, max_steps=12, learning_rate=learning_rate)
    start = {}
    begin = callback.on_step_begin

    def first(args, state, control, **kwargs):
        if not start:
            start.update({n: m.weight.detach().clone() for n, m in callback.attachment.matrices.items()})
        begin(args, state, control, **kwargs)

    callback.on_step_begin = first
    with TF32():
        trainer.train()
    for name, matrix in callback.attachment.matrices.items():
        moved = (matrix.weight.detach() - start[name]).double()
        V = callback.attachment.subspace.right[name].double()
        assert moved.norm() > 0
        assert (moved @ V).norm() <= 1e-3 * moved.norm(), name


def test_bases_under_autocast_are_those_of_the_same_inputs_in_float32(anchors, monkeypatch):
    """The sketch of the inputs once ran in accelerate's autocast: overlap with the exact basis .94 to .965."""
    model = make_model(width=64)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    real, seen = InputSketch.add, {}

    def add(self, X, weights=None):
        seen.setdefault(id(self), []).append((X, weights))
        real(self, X, weights)

    monkeypatch.setattr(InputSketch, "add", add)
    with torch.autocast("cpu", torch.bfloat16):
        bases = probe.input_bases(anchors, list(probe.matrices), rank=8)
        plain = torch.randn(64, 64) @ torch.randn(64, 64)
    monkeypatch.undo()
    assert plain.dtype == torch.bfloat16  # it was on
    for rows, V in zip(seen.values(), {id(V): V for V in bases.values()}.values(), strict=True):
        again = InputSketch(2 * 8 + 16)
        for X, weights in rows:
            again.add(X, weights)
        assert again.omega is not None  # folded: products were made
        assert overlap(V, again.basis(8)) > 1 - 1e-5
