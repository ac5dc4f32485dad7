"""`mar plan`: its figures in closed form, the published run, known and unknown GPUs, what does not fit."""

import json
import math
from typing import Any

import pytest
from command_line import Mar

from jobs.config.load import load
from jobs.estimate import model_config
from jobs.planning import Assumptions, gpu, images_and_classes, plain
from mar_model.flops import training_flops
from mar_model.training.gpus import KNOWN
from pipelines.runtime.errors import UserError

LARGE = 478_326_304  # parameters, published
IMAGENET = 1_281_167


def planned(
    preset: str = "mar_large", name: str = "h100", gpus: int = 16, assignments: tuple[str, ...] = (), **given: Any
) -> dict[str, Any]:
    config = load(preset, assignments=list(assignments))
    sections = plain(config, Assumptions(gpu(name), gpus, **given))
    assumptions = sections.pop("assumptions")
    assert assumptions["gpus"] == gpus
    return {f"{section}: {figure}": one["value"] for section, figures in sections.items() for figure, one in figures.items()}


def test_the_release_s_measured_speed_gives_the_published_hours() -> None:
    found = planned(images_per_second_per_gpu=254)
    assert found["time: hours"] == pytest.approx(400 * IMAGENET / (16 * 254) / 3600)
    assert found["time: hours"] == pytest.approx(35.0, abs=0.05)
    assert found["time: GPU-hours"] == pytest.approx(16 * found["time: hours"])
    assert found["time: a step"] == pytest.approx(2048 / (16 * 254))
    assert found["time: MFU"] == pytest.approx(0.23, abs=0.005)  # what the default efficiency is taken from
    assert planned()["time: hours"] == pytest.approx(35.0, abs=0.5)


def test_speed_comes_from_the_arithmetic_and_the_peak() -> None:
    found = planned(efficiency=0.4, epochs=800, images=1000, name="l40s", gpus=4)
    flops = training_flops(model_config(load("mar_large"), 1000), 128, math.ceil(256 * 0.867)) / 128
    assert found["time: an image"] == pytest.approx(flops / 1e9)
    assert found["time: speed of a GPU"] == pytest.approx(0.4 * 362e12 / flops)
    assert found["time: steps"] == math.ceil(800 * 1000 / 2048)
    assert found["time: hours"] == pytest.approx(800 * 1000 / (4 * 0.4 * 362e12 / flops) / 3600)


def test_memory_in_closed_form() -> None:
    found = {name.removeprefix("memory a GPU: "): value * 1e9 for name, value in planned().items()}
    assert found["weights"] == found["moving averages (EMA)"] == found["gradients"] == 4 * LARGE
    assert (found["Adam's moments"], found["bf16 weights"]) == (8 * LARGE, 2 * LARGE)
    held = (5 * 4 + 2) * LARGE + 1.5e9
    assert found["in all"] == pytest.approx(held + found["activations"])
    assert found["in all, checkpointed"] == pytest.approx(held + found["activations, checkpointed"])
    deeper = planned(assignments=("model.decoder_depth=17",))["memory a GPU: activations"] * 1e9
    # bytes a token of one more block of width W in bf16: the norms' inputs 8W, six matrix inputs 12W, GELU and MLP 16W, masks 6W
    assert deeper - found["activations"] == pytest.approx(128 * (64 + 256) * 42 * 1024)
    wider = planned(assignments=("model.decoder_depth=17", "train.precision=float32"))["memory a GPU: activations"] * 1e9
    assert wider - planned(assignments=("train.precision=float32",))["memory a GPU: activations"] * 1e9 == pytest.approx(
        128 * (64 + 256) * (8 + 24 + 32 + 6) * 1024
    )
    alone = planned(gpus=1)
    two_more = planned(assignments=("train.ema_decays=[0.999, 0.99995]",))
    assert two_more["memory a GPU: moving averages (EMA)"] == 3 * planned()["memory a GPU: moving averages (EMA)"]
    assert alone["network a GPU: a step"] == 0


def test_disk_and_network_in_closed_form() -> None:
    found = planned(images_per_second_per_gpu=254)
    assert found["storage: latent cache"] * 1e9 == pytest.approx(IMAGENET * 2 * 32 * 16 * 16 * 2)
    assert found["storage: read from the cache"] * 1e6 == pytest.approx(16 * 254 * 32 * 16 * 16 * 2)
    assert found["storage: a checkpoint"] * 1e9 == pytest.approx(16 * LARGE)
    assert found["storage: checkpoints"] * 1e9 == pytest.approx(4 * 16 * LARGE)
    assert found["network a GPU: a step"] * 1e9 == pytest.approx(2 * 15 / 16 * 4 * LARGE)
    assert found["network a GPU: a second"] * 1e9 == pytest.approx(2 * 15 / 16 * 4 * LARGE * 16 * 254 / 2048)


def test_sharded_models_divide_what_they_hold_and_gather_blocks() -> None:
    found = planned(gpus=8, assignments=("train.strategy=fsdp",))
    assert found["memory a GPU: Adam's moments"] * 1e9 == pytest.approx(8 * LARGE / 8)
    block = 12 * 1024**2 + 13 * 1024  # qkv, projection, MLP; their biases and two norms
    in_residual_block = 5 * 1280**2 + 7 * 1280
    outside = LARGE - 32 * block - 8 * in_residual_block
    assert found["memory a GPU: gathered weights"] * 1e9 == pytest.approx(2 * block * 2 + 4 * outside)
    assert found["network a GPU: a step"] * 1e9 == pytest.approx(7 / 8 * LARGE * (4 + 2 * 2 * 2))  # two micro-batches a GPU
    assert found["memory a GPU: activations"] == planned()["memory a GPU: activations"]


def test_micro_batches_that_the_gpus_do_not_divide_cost_time() -> None:
    even, uneven = planned(gpus=16, images_per_second_per_gpu=100), planned(gpus=12, images_per_second_per_gpu=100)
    assert even["time: speed"] == 1600
    assert uneven["time: speed"] == 800  # four of twelve run two of the 16 micro-batches, the others wait
    with pytest.raises(UserError, match=r"--gpus is 32, but train\.batch 2048 has only 16 micro-batches of 128.*train\.micro_batch=64"):
        planned(gpus=32)
    assert planned(gpus=32, assignments=("train.micro_batch=64",))["time: speed"] == pytest.approx(2 * planned()["time: speed"], rel=1e-3)


def test_known_gpus_and_others() -> None:
    assert (gpu("H100").tflops, gpu("h200").memory_gb, gpu("a100-40gb").tflops) == (989, 141, 312)
    assert all(one.source.startswith("NVIDIA") for one in KNOWN.values())
    assert gpu("mi300x", 1307, 192).source == "as given"
    assert (gpu("h100", memory_gb=96).tflops, gpu("h100", memory_gb=96).memory_gb) == (989, 96)
    with pytest.raises(
        UserError, match=r"--gpu 'a100' is not known, expected one of h200, h100, .*nearest: a100-80gb or a100-40gb; for another"
    ):
        gpu("a100")
    with pytest.raises(UserError, match=r"--gpu 'mi300x' is not known.*--peak-tflops \(dense bf16\) and --memory-gb"):
        gpu("mi300x", peak_tflops=1307)


@pytest.mark.parametrize(
    ("given", "said"), [({"epochs": 0}, "--epochs is 0"), ({"efficiency": 23}, "--efficiency is 23"), ({"gpus": 0}, "--gpus is 0")]
)
def test_impossible_assumptions_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(**given)


def test_the_command_prints_a_table_and_json(mar: Mar) -> None:
    arguments = ("plan", "--preset", "mar_large", "--gpus", "16", "--gpu", "h100", "--images-per-second-per-gpu", "254")
    result = mar(*arguments)
    assert result.status == 0
    assert result.out.startswith("16 × h100 (989 TFLOP/s dense bf16, 80 GB; NVIDIA H100 data sheet, SXM), 400 epochs of 1,281,167 images")
    [hours] = [line for line in result.out.splitlines() if line.split()[:1] == ["hours"]]
    assert hours.split()[1:3] == ["35.0", "h"]
    as_json = json.loads(mar(*arguments, "--json").out)
    assert as_json["time"]["hours"]["value"] == pytest.approx(400 * IMAGENET / (16 * 254) / 3600)
    assert as_json["assumptions"]["gpu"]["tflops"] == 989
    assert mar("plan", "--gpu", "abacus").status == 2


def test_without_a_cache_imagenet_is_assumed() -> None:
    assert images_and_classes(load("mar_base", assignments=["cache.path=/nowhere"])) == (IMAGENET, 1000)
