"""metrics.jsonl: no interval twice, none missing, whenever the writer was killed."""

import json
from pathlib import Path

from full_disk import largest_file

from pipelines.metrics_log import MetricsLog


def rows(path: Path) -> list[int]:
    return [json.loads(line)["images_seen"] for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_go_and_those_the_kill_lost_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    for seen in (64, 128, 192):
        log.add({"images_seen": seen, "loss": 1 / seen})
    assert MetricsLog(str(path), 128).recovered == []
    assert rows(path) == [64, 128]  # 192 will be trained again
    checkpointed = [{"images_seen": seen, "loss": 0.0} for seen in (128, 192, 256)]
    again = MetricsLog(str(path), 256, checkpointed)
    assert rows(path) == [64, 128, 192, 256]  # also when nothing is left to train
    assert [row["images_seen"] for row in again.recovered] == [192, 256]
    again.add({"images_seen": 192, "loss": 0.5})  # a restarted worker group goes on from an older checkpoint
    assert rows(path) == [64, 128, 192]


def test_a_full_disk_is_told_once_and_costs_no_line(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0, say=said.append)
    log.add({"images_seen": 64, "loss": 1.0})
    with largest_file(path.stat().st_size + 5):
        for seen in (128, 192):
            log.add({"images_seen": seen, "loss": 0.5})
    assert len(said) == 1
    assert f"{path} can't be written" in said[0]
    log.add({"images_seen": 256, "loss": 0.25})
    assert rows(path) == [64, 128, 192, 256]
