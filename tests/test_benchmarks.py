"""What of the benchmarks can go wrong unseen: those for a GPU on machines that have none."""

import subprocess
import sys

import pytest
import torch

from beit import cpu_attention
from benchmarks import attention, gpu

# What must run on a GPU machine where no cluster is installed; precompute is a job of Ray.
WITHOUT_CLUSTER = [part for part in gpu.PARTS if part not in ("tests", "precompute")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--results", str(tmp_path)])
    assert gpu.main() == 2
    assert "finds no CUDA device here; run this on a machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_part_has_its_section_also_when_it_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--results", str(tmp_path), "--only", "tests", "model"]
    )
    parts = {"tests": ["-c", "print('begun'); 1 / 0"], "model": ["-c", "print('# Steps')"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main() == 1
    text = (tmp_path / "gpu-nvidia-h100-80gb-hbm3.md").read_text()
    assert text.startswith("2 x NVIDIA H100 80GB HBM3, torch ")
    assert "FAILED" in text.partition("# model")[0]
    assert "begun" in text
    assert "ZeroDivisionError" in text
    assert text.endswith("\n# Steps\n")
    assert capsys.readouterr().out.endswith("failed: tests\n")


def test_every_benchmark_of_the_gpu_is_there():
    for arguments in gpu.PARTS.values():
        if arguments[1] != "pytest":
            assert (gpu.ROOT / (arguments[1].replace(".", "/") + ".py")).is_file()


def test_what_needs_no_cluster_imports_none():
    names = ["tests.gpu.test_gpu", *(gpu.PARTS[part][1] for part in WITHOUT_CLUSTER)]
    code = f"import sys; sys.modules.update(ray=None, mlflow=None); import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("way", [attention.sdpa, cpu_attention.attention])
def test_ways_of_attention_compute_the_same(way, biased):
    size = attention.Size(images=2, heads=2, biased=biased)
    assert attention.error_of(way, size, torch.device("cpu")) < 1e-5
