"""SIGINT and SIGTERM to every command, at moments drawn at random: one line, an exit status of its own, and the same command resumes."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from commands import STAGES, Command, assert_interrupted, outcome, prepare
from tiny_cache import write_latents

SEED = int(os.environ.get("MAR_SEED", time.time_ns() % 10**6))  # printed with each failure
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def draw(request: pytest.FixtureRequest) -> random.Random:
    print(f"MAR_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.mark.parametrize("number", SIGNALS)
def test_during_the_imports(tmp_path: Path, draw: random.Random, number: signal.Signals) -> None:
    prepare(tmp_path)
    command = Command("tokenize", tmp_path)
    command.wait_until_it_answers()
    time.sleep(draw.uniform(0, 0.5))
    command.send(number)
    assert_interrupted(command, number, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_while_ray_starts(tmp_path: Path, draw: random.Random, number: signal.Signals) -> None:
    prepare(tmp_path)
    command = Command("tokenize", tmp_path)
    command.wait_for("Ray's own messages go to")
    time.sleep(draw.uniform(0, 3))
    started = command.send(number)
    assert_interrupted(command, number, tmp_path)
    assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


class Undisturbed:
    """The folders in which the stages have ended, and the seconds that each took; run when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.seconds = root, dict[str, float]()
        self.folder("").mkdir()
        prepare(self.folder(""))

    def folder(self, stage: str) -> Path:
        return self.root / ("quickstart" if stage == "quickstart" else "stages")

    def run(self, stage: str) -> None:
        stages = list(STAGES)
        if stage == "quickstart" and stage not in self.seconds:
            self.folder(stage).mkdir()
            prepare(self.folder(stage), stage, self.folder(""))
        for one in [stage] if stage == "quickstart" else stages[: stages.index(stage) + 1]:
            if one not in self.seconds:
                began = time.monotonic()
                command = Command(one, self.folder(one))
                assert command.end() == 0, command.err
                self.seconds[one] = time.monotonic() - began


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(Path(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_at_any_moment_and_the_same_command_ends_with_the_same_result(
    undisturbed: Undisturbed, tmp_path: Path, draw: random.Random, stage: str, number: signal.Signals
) -> None:
    undisturbed.run(stage)
    prepare(tmp_path, before=stage, made_in=undisturbed.folder(""))
    command = Command(stage, tmp_path)
    command.wait_until_it_answers()
    moment = draw.uniform(0, 0.9 * undisturbed.seconds[stage])
    time.sleep(moment)
    if command.process.poll() is None:
        started = command.send(number)
        assert_interrupted(command, number, tmp_path)
        assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], moment
    again = Command(stage, tmp_path)
    assert again.end() == 0, again.err
    assert outcome(stage, tmp_path) == outcome(stage, undisturbed.folder(stage))


def test_before_the_first_step_no_checkpoint_is_announced(tmp_path: Path) -> None:
    write_latents(tmp_path / "cache")
    command = Command("train", tmp_path)
    command.wait_for("starting a new run")
    command.send(signal.SIGTERM)
    assert_interrupted(command, signal.SIGTERM, tmp_path)
    assert "write a checkpoint" not in command.err
    assert not list((tmp_path / "train").rglob("state.json"))
