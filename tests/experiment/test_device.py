"""What an experiment runs on, and how that rounds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_advknn.experiment.device import arithmetic, find_device
from lightning_advknn.ranks import Ranks


def test_a_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert find_device("cpu", Ranks()) == torch.device("cpu")
    assert current == []

    def zeros(*_: Any, device: str, **__: Any) -> Any:  # as if there were such a GPU
        return SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr("torch.zeros", zeros)
    assert find_device("cuda:1", Ranks()) == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]


def test_keys_hold_the_precision_that_victims_decide_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    exact = {"limits": {}, "matmul": "ieee", "conv": "ieee", "dtype": "torch.float32"}
    for name in ("DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    backends: Any = torch.backends
    capability = backends.cpu.get_cpu_capability()
    before = backends.mkldnn.conv.fp32_precision
    for conv in ("none", "bf16"):
        backends.mkldnn.conv.fp32_precision = conv
        try:
            cpu, gpu = arithmetic(torch.device("cpu")), arithmetic(torch.device("cuda", 0))
        finally:
            backends.mkldnn.conv.fp32_precision = before
        assert cpu == {"device": "cpu", "instructions": capability, **exact}
        # Whatever torch's default for convolutions: TF32.
        assert gpu == {"device": "cuda", "instructions": "9.0", **exact}
