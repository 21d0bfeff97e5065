import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spf.lab.analysis import clusters


def planted(count, width, gap, seed=0):
    """Two standard Gaussians whose means are `gap` apart."""
    torch.manual_seed(seed)
    safe, unsafe = torch.randn(count, width), torch.randn(count, width)
    safe[:, 0] += gap / 2
    unsafe[:, 0] -= gap / 2
    return safe, unsafe


@given(st.integers(0, 10**6))
def test_tau_changes_sign_when_safe_and_unsafe_are_swapped(seed):
    A, mean_safe, mean_unsafe = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))
    for measure in (clusters.tau, clusters.tau_cosine):
        found = measure(A, mean_safe[0], mean_unsafe[0])
        torch.testing.assert_close(found, -measure(A, mean_unsafe[0], mean_safe[0]))


def test_tau_by_hand():
    A = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = clusters.tau(A, torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([5.0 - 4.0, 0.0 - 3.0]))
    cosines = clusters.tau_cosine(A[:1], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(cosines, torch.tensor([0.6 - 0.8]))


def test_tau_of_two_planted_gaussians_is_the_closed_form():
    # far means: |a - mu_U| - |a - mu_S| with |a - mu_S|^2 ~ chi^2(d), |a - mu_U|^2 ~ noncentral chi^2(d, gap^2);
    # for large d both concentrate at sqrt(d - 1/2) and sqrt(d + gap^2 - ...)
    width, gap = 400, 40.0
    safe, unsafe = planted(4000, width, gap)
    mean_safe, mean_unsafe = torch.zeros(2, width)
    mean_safe[0], mean_unsafe[0] = gap / 2, -gap / 2
    expected = math.sqrt(width + gap**2) - math.sqrt(width)
    assert float(clusters.tau(safe, mean_safe, mean_unsafe).mean()) == pytest.approx(expected, rel=0.01)
    assert float(clusters.tau(unsafe, mean_safe, mean_unsafe).mean()) == pytest.approx(-expected, rel=0.01)


def test_means_come_from_the_other_half_so_that_noise_makes_no_cluster():
    safe, unsafe = planted(20, 2000, 0.0)
    found = clusters.held_out({"safe": safe, "unsafe": unsafe})
    naive = clusters.tau(safe, safe.mean(0), unsafe.mean(0))
    # the released code took means of the very samples it measured: pure noise then looks clustered
    assert float((naive > 0).float().mean()) == 1.0
    assert 0.2 < clusters.side_accuracy(found["safe"], found["unsafe"]) < 0.8
    by_hand = clusters.tau(safe[::2], safe[1::2].mean(0), unsafe[1::2].mean(0))
    torch.testing.assert_close(found["safe"][::2], by_hand)


def test_a_jailbreak_never_meets_the_prompt_it_is_made_of():
    safe, unsafe = planted(6, 3, 4.0)
    found = clusters.held_out({"safe": safe, "unsafe": unsafe, "jailbreak": unsafe})
    torch.testing.assert_close(found["jailbreak"], found["unsafe"])
    moved = unsafe.clone()
    moved[2] += 100
    again = clusters.held_out({"safe": safe, "unsafe": moved, "jailbreak": unsafe})
    assert float(again["jailbreak"][2]) == float(found["jailbreak"][2])
    assert float(again["jailbreak"][3]) != float(found["jailbreak"][3])


def test_fisher_ratio_concentration_and_two_means_of_planted_gaussians():
    safe, unsafe = planted(3000, 10, 6.0)
    assert clusters.fisher_ratio(safe, unsafe) == pytest.approx(36 / 20, rel=0.05)
    assert clusters.two_means_accuracy(safe, unsafe) > 0.99
    assert clusters.two_means_accuracy(unsafe, safe) > 0.99
    same = planted(3000, 10, 0.0)
    assert clusters.fisher_ratio(*same) < 0.002
    assert clusters.two_means_accuracy(*same) < 0.55
    stretched = safe * torch.tensor([3.0, *[1.0] * 9])
    assert clusters.concentration(stretched) == pytest.approx(9 / 18, rel=0.05)
    assert clusters.concentration(safe[:, :1]) == pytest.approx(1.0)


def test_what_cannot_be_measured_is_refused():
    one = torch.ones(1, 3)
    with pytest.raises(ValueError, match="1 safe and 2 unsafe"):
        clusters.held_out({"safe": one, "unsafe": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="do not vary"):
        clusters.concentration(torch.ones(4, 3))
