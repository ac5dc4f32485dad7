"""metrics.jsonl: no interval twice, none missing, whenever the writer was killed."""

import json
import math
from pathlib import Path

import pandas
import polars
from full_disk import largest_file

from pipelines.training.metrics.log import MetricsLog


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


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_again_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    log.add({"images_seen": 64, "loss": math.nan, "skipped_share": 1.0})
    log.add({"images_seen": 128, "loss": 0.5, "skipped_share": 0.0})
    assert path.read_text().splitlines()[0] == '{"images_seen": 64, "loss": null, "skipped_share": 1.0}'
    for read in (lambda: pandas.read_json(path, lines=True), lambda: polars.read_ndjson(path).to_pandas()):  # strict readers
        assert read()["loss"].isna().tolist() == [True, False]
        assert read()["loss"].mean() == 0.5
    for again in (MetricsLog(str(path), 128), MetricsLog(str(tmp_path / "lost"), 128, [{"images_seen": 64, "loss": None}])):
        assert math.isnan(again.rows[0]["loss"])
    path.write_text('{"images_seen": 64, "loss": NaN}\n')  # as earlier versions wrote it
    assert math.isnan(MetricsLog(str(path), 128).rows[0]["loss"])
