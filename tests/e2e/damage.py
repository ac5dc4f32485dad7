"""A finished run whose files are damaged one after the other, and `mar …` run on it in this process."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs import cli
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.runtime.storage import read_json

Damage = Callable[[bytes], bytes]
BINARY: dict[str, Damage] = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\xfe\x00no file of ours\x93\n" * 40,
}
JSON = BINARY | {"list": lambda data: b"[]\n", "null": lambda data: b"null\n"}
OBJECTS: dict[str, Damage] = {"no keys": lambda data: b"{}\n", "other keys": lambda data: b'{"rows": "x"}\n'}
RUN = Path("runs/demo")  # in the working directory
NEWEST = "train/checkpoints/images-000000002560"
ANY_OBJECT = ("identity.json", "configuration.json")  # their keys are those of the settings


def kinds(file: str) -> dict[str, Damage]:
    """What can happen to a file of this name."""
    if not file.endswith((".json", ".jsonl")):
        return BINARY
    if file.endswith("attempts.json"):  # a list, whatever it holds
        return BINARY | OBJECTS
    return JSON if file.endswith(ANY_OBJECT) else JSON | OBJECTS


@dataclass(frozen=True)
class Ended:
    status: int
    text: str  # of both outputs


def mar(*arguments: str) -> Ended:
    text, before = io.StringIO(), sys.argv
    sys.argv = ["mar", *arguments]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            cli.main()
        return Ended(0, text.getvalue())
    except SystemExit as leaving:
        return Ended(int(leaving.code or 0), text.getvalue())
    finally:
        sys.argv = before


def commands(settings: list[str]) -> dict[str, tuple[str, ...]]:
    """Every command that reads a run, by name. The stages that begin something new write into the folder `other`."""
    changed = [word for one in settings for word in ("--set", one)]
    configured = ("--preset", "demo", *changed)
    judged = (*configured, "--set", f"evaluate.classifier={RUN}/classifier", "--set", f"evaluate.reference={RUN}/{reference()}")
    begun = ("--set", "train.path=other/train", "--set", "generate.path=other/samples", "--set", "evaluate.path=other/evaluation")
    checkpoint = ("--set", f"generate.checkpoint={RUN}/{NEWEST}")
    return {
        "report": ("report", str(RUN)),
        "verify": ("verify", str(RUN / "cache")),
        "verify --sample": ("verify", str(RUN / "cache"), "--sample", "2"),
        "inspect": ("inspect", str(RUN / "cache")),
        "export": ("export", str(RUN / NEWEST), "--out", "other/exported"),
        "plan": ("plan", *configured, "--gpus", "1"),
        "doctor": ("doctor", *judged, *checkpoint),
        "tokenize": ("tokenize", *configured),
        "cache": ("cache", *configured),
        "train": ("train", *configured),
        "train anew": ("train", *configured, *begun),
        "train from": ("train", *configured, *begun, "--set", f"train.init_from={RUN}/{NEWEST}"),
        "generate": ("generate", *configured, *begun, *checkpoint),
        "evaluate": ("evaluate", *judged, *begun, *checkpoint),
        "sweep": ("sweep", *judged),
        "quickstart": ("quickstart", *changed),
    }


def reference() -> str:
    """The statistics that the run's evaluation was compared with."""
    expected = read_json(str(RUN / "evaluation/evaluation.json"))["reference"]["digest"]
    files = (RUN / "evaluation").glob("reference-*.npz")
    return next(str(file.relative_to(RUN)) for file in files if FeatureStatistics.load(str(file)).identity()["digest"] == expected)


class Copy:
    """A copy of the run, from which it is restored. MLflow's database stays as it is: this process has it open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(RUN, folder, ignore=self._ignored)
        self.files = self._files()

    @contextmanager
    def damaged(self, damages: dict[str, Damage]) -> Iterator[None]:
        """The run with these files damaged, restored afterwards."""
        for file, damage in damages.items():
            (RUN / file).write_bytes(damage((RUN / file).read_bytes()))
        try:
            yield
        finally:
            shutil.rmtree("other", ignore_errors=True)
            after = self._files()
            for file in after.keys() - self.files.keys():
                file.unlink()
            for file in self.files:
                if after.get(file) != self.files[file]:
                    shutil.copy2(self.folder / file.relative_to(RUN), file)

    @staticmethod
    def _ignored(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name == "digits" or name.startswith("mlflow.db")]

    def _files(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for root, folders, names in os.walk(RUN):
            folders[:] = [name for name in folders if name != "digits"]
            for file in (Path(root) / name for name in names if not name.startswith("mlflow.db")):
                found[file] = (file.stat().st_mtime_ns, file.stat().st_size)
        return found
