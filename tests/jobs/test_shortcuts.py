"""What `mar generate` is told in short is what its settings say, here and in a submitted job."""

import os
import shlex
import threading
from pathlib import Path

import pytest
import typer
from command_line import Mar

from jobs import cli
from jobs.config.load import load
from jobs.submit import job_command

SHORT = ["--label", "3", "--label", "cat", "--image", "a photo.png", "--mask", "mask.png", "--film", "--out", "runs/edited"]
LONG = [
    'generate.labels=[3, "cat"]', "generate.image=a photo.png", "generate.mask=mask.png", "generate.film=true", "generate.path=runs/edited",
]  # fmt: skip


def test_options_stand_for_settings(mar: Mar) -> None:
    shown = mar("generate", "--preset", "demo", *SHORT, "--print-config")
    assert shown.status == 0
    assert shown.out.partition("\n")[2] == load("demo", None, LONG).yaml()


def test_a_job_is_told_the_settings() -> None:
    group = typer.main.get_command(cli.app)
    job = job_command(group, ["generate", *SHORT, "--set", "seed=5"], None, "demo", ["seed=4"])
    assert job.assignments == ["seed=4", "seed=5", *LONG]
    assert load(job.preset, None, job.assignments) == load("demo", None, ["seed=5", *LONG])
    assert shlex.split(job.entrypoint())[3] == "generate"
    assert job.arguments == []


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--gpus=4", "--gpu=l4", "--efficiency=0.5", "--json"],
        ["verify", "--sample=3", "runs/cache"],
        ["inspect", "--tokenizer=runs/tokenizer", "runs/cache"],
        ["import", "--out=there", "--raw", "--latent-scale=0.5", "--heads=12,16", "--", "-odd.pth"],
        ["export", "--out=there", "--format=released", "runs/checkpoint"],
        ["report", "runs/demo"],
        ["train", "--print-config"],
    ],
)
def test_every_option_travels(words: list[str]) -> None:
    job = job_command(typer.main.get_command(cli.app), words, None, None, [])
    assert shlex.split(job.entrypoint()) == ["python", "-m", "jobs.cli", *words]


def test_a_pipe_travels(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("seed: 3\n",), daemon=True).start()
    job = job_command(typer.main.get_command(cli.app), ["train"], str(pipe), None, [])
    assert load(job.preset, job.config).seed == 3
    assert "--set seed=3" in job.entrypoint()
