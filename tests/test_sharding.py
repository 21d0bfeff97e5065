"""Parts and blocks of flattened matrices, and what is refused by name."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from spf import SPF, SafetyProbe, attach
from spf.errors import UnsupportedSetupError
from spf.probe import ProbeResult
from spf.rules import components, without_components
from spf.sharding import Sharding, innermost_optimizer, refuse_sharded, same_on_all_ranks, spread_over_ranks
from spf.sharding.blocks import flat_part
from spf.subspace import Factors
from tests.conftest import make_model
from tests.test_linalg import TF32


def test_what_is_sent_is_contiguous(monkeypatch):
    """NCCL sends nothing else; gloo does, so that no run without GPUs sees it. Eigenvectors are not."""
    wanted, sent = torch.randn(4, 4), []

    def broadcast(tensor, src):
        assert tensor.is_contiguous()
        sent.append(src)
        tensor.copy_(wanted)

    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "broadcast": None}.items():
        monkeypatch.setattr(dist, name, broadcast if value is None else lambda value=value: value)
    same_on_all_ranks({"a": (one := torch.zeros(8, 4)[::2]), "b": one})
    assert torch.equal(one, wanted)
    assert sent == [0]
    monkeypatch.setattr("spf.sharding.ranks.gather_objects", lambda value: [value, value])
    monkeypatch.setattr("spf.sharding.ranks._collective_device", lambda: torch.device("cpu"))
    found = spread_over_ranks(["a"], lambda name: torch.zeros(4, 8)[:, ::2])
    assert torch.equal(found["a"], wanted)
    assert sent == [0, 0]


@pytest.mark.parametrize(("other", "skipped"), [(-1e3, 0), (float("nan"), 1)])
def test_processes_go_by_the_same_numbers(other, skipped, anchors, monkeypatch):
    """Under DDP each went by its own: one corrected a step that the other left alone, and they drifted apart."""
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    run = attach(SafetyProbe(model, anchors, pad_token_id=1), sgd, SPF()).run
    ids = torch.randint(5, 600, (4, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    run.result = run.probe.measure(next(run.rotation))
    gradients = {name: matrix.weight.grad for name, matrix in run.matrices.items()}
    run.compare(gradients)
    alone = run.comparison
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_backend": "gloo"}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(other / 2))
    with pytest.warns(UserWarning, match="NaN or inf") if skipped else nullcontext():
        run.compare(gradients)
    assert run.skipped == skipped
    if not skipped:
        for of, ours in vars(run.comparison).items():
            wanted = {name: (value + other) / 2 for name, value in vars(alone)[of].items()}
            assert ours == pytest.approx(wanted, rel=1e-5)
    assert ProbeResult(3.0, {}).of_all(run.sharding).loss == pytest.approx((3.0 + other) / 2, nan_ok=True)


@st.composite
def cut_matrices(draw):
    """A matrix (m, n) in the middle of a flat buffer that is cut into equal slices, one a process."""
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    before, after = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    processes = draw(st.integers(1, 5))
    length = -(-(before + m * n + after) // processes)
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    buffer = torch.zeros(processes * length)
    buffer[before : before + m * n] = W.flatten()
    parameter = nn.Parameter(W.clone())
    borders = [rank * length - before for rank in range(1, processes)]
    parts = []
    for rank in range(processes):
        low = rank * length
        holder = buffer[low : low + length].clone()
        parts.append(flat_part(parameter, (m, n), holder, low - before, low - before + length, before - low, borders))
    return W, parts


@settings(deadline=None, max_examples=30)
@given(cut_matrices())
def test_products_of_cut_rows_are_exact_under_tf32(case):
    """They were torch's own, so with `tf32=True` and ZeRO such a row was pushed off what is held, at every step."""
    W, parts = case
    if not parts[0].cut_rows:
        return
    V = torch.linalg.qr(torch.randn(W.shape[1], W.shape[1], generator=torch.Generator().manual_seed(0))).Q
    found = torch.zeros(len(parts[0].cut_rows), V.shape[1])
    with TF32():
        for part in parts:
            here: Any = SimpleNamespace(parts={"W": part}, total=lambda values: values)
            found += Sharding.cut_products(here, {"W": part.holder}, {"W": V})["W"]
    wanted = (W.double() @ V.double())[list(parts[0].cut_rows)]
    assert float((found.double() - wanted).abs().max()) <= 1e-6 * float(W.norm())


@settings(deadline=None, max_examples=150)
@given(cut_matrices())
def test_blocks_tile_the_matrix_once_and_are_views(case):
    W, parts = case
    count, seen = torch.zeros_like(W), torch.zeros_like(W)
    owned = torch.zeros(len(W))
    for part in parts:
        for block in part.blocks(part.holder):
            count[block.rows, block.columns] += 1
            seen[block.rows, block.columns] = block.tensor
            assert part.rows.start <= block.rows.start <= block.rows.stop <= part.rows.stop
            assert block.cut == (block.rows.start in part.cut_rows and len(block.tensor) == 1)
            block.tensor.add_(1.0)
        owned[part.owned] += 1
        held = torch.cat([b.tensor.flatten() for b in part.blocks(part.holder)] or [torch.zeros(0)])
        assert torch.equal(held, part.piece(part.holder))
    assert torch.equal(count, torch.ones_like(W))
    assert torch.equal(seen, W)
    assert torch.equal(owned, torch.ones(len(W)))
    assert all(part.cut_rows == parts[0].cut_rows for part in parts)


@settings(deadline=None, max_examples=150)
@given(cut_matrices(), st.sampled_from(["left", "right", "both"]), st.integers(0, 99))
def test_rules_on_blocks_equal_rules_on_the_matrix(case, side, seed):
    G, parts = case
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(len(G), min(2, len(G)), generator=generator)).Q
    V = torch.linalg.qr(torch.randn(G.shape[1], min(2, G.shape[1]), generator=generator)).Q
    factors = Factors(torch.randn(4, G.shape[1], generator=generator), torch.randn(4, len(G), generator=generator))
    blocks = [block for part in parts for block in part.blocks(part.holder)]

    inner = sum(factors.inner_block(b.tensor, b.rows, b.columns) for b in blocks)
    assert torch.allclose(inner, (G * factors.dense()).sum(), atol=1e-4)
    for b in blocks:
        assert torch.allclose(factors.block(b.rows, b.columns, b.tensor), factors.dense()[b.rows, b.columns], atol=1e-5)

    whole = components(G, U, V, side)
    summed = torch.zeros_like(whole)
    for b in blocks:
        share = components(b.tensor, U[b.rows], V[b.columns], side)
        place = {"left": (slice(None), b.columns), "right": (b.rows,), "both": (slice(None),)}[side]
        summed[place] += share
    assert torch.allclose(summed, whole, atol=1e-5)
    wanted = without_components(G, whole, U, V, side)
    for b in blocks:
        part = {"left": summed[:, b.columns], "right": summed[b.rows], "both": summed}[side]
        got = without_components(b.tensor, part, U[b.rows], V[b.columns], side)
        assert torch.allclose(got, wanted[b.rows, b.columns], atol=1e-5)


def test_a_plain_parameter_is_one_block_and_a_transposed_one_its_transpose():
    layer = nn.Linear(3, 5)
    sharding = Sharding(layer, torch.optim.SGD(layer.parameters(), lr=1.0), dict(layer.named_parameters()))
    assert not sharding.split
    (block,) = sharding.parts["weight"].blocks(layer.weight)
    assert block.rows == slice(0, 5)
    assert block.tensor.shape == (5, 3)
    (block,) = sharding.parts["weight"].blocks(layer.weight, transposed=True)
    assert block.rows == slice(0, 3)
    assert block.tensor.shape == (3, 5)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
def test_tensor_parallel_layouts_are_refused_by_name(process_group, placement):
    mesh = init_device_mesh("cpu", (1,))
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [placement]))
    with pytest.raises(UnsupportedSetupError, match=r"weight is laid out as .* leave out tensor"):
        Sharding(layer, torch.optim.SGD(layer.parameters(), lr=1.0), {"weight": layer.weight})


def test_fsdp1_is_refused_by_name(process_group, monkeypatch):
    class Wrapped(torch.distributed.fsdp.FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    model = nn.Sequential(nn.Linear(2, 2), Wrapped())
    with pytest.raises(UnsupportedSetupError, match="set fsdp_version to 2"):
        Sharding(model, torch.optim.SGD(model[0].parameters(), lr=1.0), {})


def test_other_deepspeed_optimizers_are_refused_by_name():
    bf16 = pytest.importorskip("deepspeed.runtime.bf16_optimizer", reason="DeepSpeed is not installed")
    with pytest.raises(UnsupportedSetupError, match="BF16_Optimizer is not supported; use zero_stage 1, 2 or 3"):
        innermost_optimizer(bf16.BF16_Optimizer.__new__(bf16.BF16_Optimizer))


def test_deepspeed_whose_insides_are_not_known_is_refused_with_the_version_to_install(monkeypatch):
    stage = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="DeepSpeed is not installed")
    zero = stage.DeepSpeedZeroOptimizer.__new__(stage.DeepSpeedZeroOptimizer)
    layer = nn.Linear(2, 2)
    zero.optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with pytest.raises(UnsupportedSetupError, match=r"no attribute 'zenflow'\); pip install deepspeed==0.19.8"):
        Sharding(layer, zero, {})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.18.2")
    with pytest.raises(UnsupportedSetupError, match=r"below 0.19.8 is not supported; pip install"):
        innermost_optimizer(zero)


def test_what_needs_whole_parameters_refuses_parts_of_them(process_group):
    layer = nn.Linear(4, 4)
    refuse_sharded(layer, "Lisa")
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
    with pytest.raises(UnsupportedSetupError, match="Lisa does not support sharded parameters, as weight is; launch"):
        refuse_sharded(layer, "Lisa")
