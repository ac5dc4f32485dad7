"""What `mar generate` is told in short is what its settings say, here and in a submitted job."""

import shlex

import typer
from command_line import Mar

from jobs import cli
from jobs.config import load
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
