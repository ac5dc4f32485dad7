"""Training goes on after a worker was killed, and ends as if nothing was."""

import signal
from dataclasses import replace
from pathlib import Path

from disturbed_run import RECIPE, assert_bitwise, meanwhile, signalled
from listening import Listening
from tiny_cache import ARCHITECTURE, TOKENIZER, write_latents

from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.training.stage import train


def test_a_killed_worker_changes_nothing(ray_local: ClusterSettings, tmp_path: Path) -> None:
    cache, undisturbed, killed = write_latents(tmp_path / "cache"), tmp_path / "undisturbed", tmp_path / "killed"
    stage = Listening(ray_local)
    train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(undisturbed)), Listening(ray_local))
    with meanwhile(killed, [(160, signalled(signal.SIGKILL))]):
        train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(killed)), stage)
    assert_bitwise(killed, undisturbed)
    text = "\n".join(stage.said)
    assert "died" in text
    assert text.count("2 workers running again") == 1
