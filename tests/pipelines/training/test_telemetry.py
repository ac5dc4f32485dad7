"""What a worker says of itself: MFU and shares in closed form, communication that is not hidden, devices by their names."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mar_model.config import MARConfig
from mar_model.flops import training_flops
from mar_model.training.gpus import of_device
from pipelines.training.metrics import telemetry
from pipelines.training.metrics.prometheus import run_label
from pipelines.training.metrics.telemetry import ExposedCommunication, Telemetry, in_short

CPU = torch.device("cpu")
CONFIG = MARConfig(
    encoder_depth=1, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, denoiser_width=32
)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_mfu_and_shares_in_closed_form() -> None:
    one = Telemetry(CONFIG, 4, nn.Linear(1, 1), CPU, worker=0, workers=1, peak_tflops=0.5, run="demo/train")
    began = time.perf_counter()
    for masked in (200, 256):
        one.stepped(3, masked)
    time.sleep(0.2)
    row = one.close({"images_seen": 24, "loss": 0.5, "images_per_second": 60.0}, 0.05, 0.02)
    seconds = time.perf_counter() - began
    flops = 3 * (training_flops(CONFIG, 4, 200) + training_flops(CONFIG, 4, 256))
    assert row["mfu"] == pytest.approx(flops / seconds / 0.5e12, rel=0.1)
    assert row["tflops_per_worker"] == pytest.approx(0.5 * row["mfu"])
    assert (row["data_wait_share"], row["checkpoint_share"]) == pytest.approx((0.05 / seconds, 0.02 / seconds), rel=0.1)
    assert (row["communication_share"], row["images_per_second_per_worker"]) == (0.0, 60.0)
    assert 0.05 < row["memory_gb"] < 50
    assert "gpu_memory_gb" not in row
    assert row["loss"] == 0.5
    assert in_short(row).keys() == {"loss", "mfu", "data", "communication", "checkpoints"}
    again = one.close({"images_per_second": 0.0}, 0.0, 0.0)
    assert (again["mfu"], again["data_wait_share"]) == (0.0, 0.0)  # a new interval


def test_without_a_known_peak_there_is_no_mfu() -> None:
    one = Telemetry(CONFIG, 4, nn.Linear(1, 1), CPU, worker=0, workers=1, peak_tflops=0, run="demo/train")
    row = one.close({"images_per_second": 1.0}, 0.0, 0.0)
    assert "mfu" not in row
    assert row["tflops_per_worker"] == 0.0


def test_communication_is_what_the_backward_pass_waits_for(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        threading.Timer(0.1, lambda: done.set_result(bucket.buffer())).start()
        return done

    monkeypatch.setattr(telemetry, "allreduce_hook", slow)
    module = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    communication = ExposedCommunication(module, CPU)
    for _ in range(2):
        with module.no_sync():
            module(torch.ones(2, 8)).sum().backward()  # gradients stay here
        module(torch.ones(2, 8)).sum().backward()
        communication.ended()
    assert communication.seconds() == pytest.approx(0.2, abs=0.05)
    assert communication.seconds() == 0.0


def test_gradients_are_averaged_as_without_the_measurement(group: None) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    module = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    module.module.load_state_dict(plain.state_dict())
    ExposedCommunication(module, CPU)
    for one in (plain, module):
        one(torch.ones(2, 8)).square().sum().backward()
    assert torch.equal(plain.weight.grad, module.module.weight.grad)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
    ],
)
def test_gpus_are_known_by_their_own_names(device: str, name: str) -> None:
    found = of_device(device)
    assert found is not None
    assert found.name == name
    assert of_device(f"not {device.replace(' ', '')}") is None


def test_runs_are_told_apart_by_the_end_of_their_path() -> None:
    assert run_label("/shared/runs/mar_large/train/") == "mar_large/train"
    assert run_label("s3://bucket/mar/train") == "mar/train"
