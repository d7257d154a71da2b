"""Measured ceilings: which kernels there are, that rates count what they say, and that one that fails is told."""

import torch

from training.parallel import ceilings

CPU = torch.device("cpu")


def test_a_kernels_rate_is_its_operations_over_its_time(monkeypatch):
    monkeypatch.setattr(ceilings, "best_seconds", lambda run, device, repeats: (run(), 0.5)[1])
    (kernel,) = ceilings.attention_kernels([16, 8], heads=2, head_dim=8, device=CPU, dtype=torch.float32)
    operations = 4 * 2 * 8 * (16 * 16 + 8 * 8)
    assert kernel == ("flash", operations / 0.5 / 1e12, 2 * operations / 0.5 / 1e12, None)
    assert ceilings.matmul_tflops(4, 8, 16, CPU, torch.float32) == 2 * 4 * 8 * 16 / 0.5 / 1e12
    assert ceilings.copy_gb_s(1000, CPU) == 2 * 1000 / 0.5 / 1e9
    assert ceilings.host_gb_s(1000, CPU) == {}


def test_the_bare_kernel_computes_what_the_model_does():
    torch.manual_seed(0)
    lengths = (5, 3)
    q, k, v = (torch.randn(8, 2, 8) for _ in range(3))
    from waver_core.dit.attention import AttentionPlan, attention

    expected = attention(q, k, v, AttentionPlan(lengths, lengths))
    run = ceilings._by_sdpa(q, k, v, lengths, ceilings.ATTENTION_KERNELS["flash"])
    torch.testing.assert_close(run(), expected)


def test_a_kernel_that_does_not_run_here_is_told_and_comes_last(monkeypatch):
    monkeypatch.setattr(ceilings, "ATTENTION_KERNELS", {"flash": ceilings.ATTENTION_KERNELS["cudnn"]})
    (kernel,) = ceilings.attention_kernels([16], heads=2, head_dim=8, device=CPU, dtype=torch.float32)
    assert kernel.forward_tflops is None
    assert "RuntimeError" in kernel.error
    assert ceilings._whole_time(kernel) == float("inf")


def test_what_takes_long_is_repeated_less(monkeypatch):
    ticks = iter([0.0, 1.0] * 20)
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(ticks))
    runs = []
    times = ceilings.patient_seconds(lambda: runs.append(1), CPU, repeats=10, patience_s=3.0, prepare=lambda: runs.append(0))
    assert times == [1.0] * 3
    assert runs == [0, 1] * 3
    assert ceilings.patient_seconds(lambda: None, CPU, repeats=10, patience_s=0.1) == [1.0]
    assert ceilings.best_seconds(lambda: runs.append(2), CPU, repeats=2) == 1.0
    assert runs.count(2) == 3  # the first does not count
