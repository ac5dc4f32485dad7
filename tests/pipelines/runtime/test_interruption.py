"""What Ctrl-C and SIGTERM do: where they are raised, and while workers are at work."""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.runtime.cluster.interruption import Terminated, finish_when_asked, held_back, raised

pytestmark = pytest.mark.usefixtures("interruptible")


def ctrl_c(seconds: float = 0.1) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_asked_to_end_the_work_ends_of_its_own_accord() -> None:
    asked, done = threading.Event(), []

    def work() -> None:
        assert asked.wait(10)
        done.append("checkpoint")

    ctrl_c()
    assert isinstance(finish_when_asked(work, asked.set), KeyboardInterrupt)
    assert done == ["checkpoint"]
    assert finish_when_asked(lambda: done.append("more"), asked.clear) is None
    assert asked.is_set()  # nobody asked


def test_a_second_ctrl_c_leaves_at_once_and_so_does_the_first_where_nothing_can_be_asked() -> None:
    never = threading.Event()
    for ask in (ctrl_c, None):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            finish_when_asked(never.wait, ask)
    never.set()


def test_where_nobody_works_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANSWER_SECONDS", "LAST_WORD_SECONDS"):
        monkeypatch.setattr(f"pipelines.runtime.cluster.interruption.{name}", 0.05)
    never, looks = threading.Event(), iter([True, True, False])
    ctrl_c()
    assert isinstance(finish_when_asked(never.wait, lambda: None, lambda: next(looks)), KeyboardInterrupt)
    assert not list(looks)
    never.set()


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        finish_when_asked(lambda: 1 / 0)


def test_a_signal_during_an_import_is_raised_when_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swallowing = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    whole = True
except BaseException:
    whole = False
"""
    (tmp_path / "swallowing.py").write_text(swallowing)
    monkeypatch.syspath_prepend(str(tmp_path))

    @raised()
    def work() -> None:
        importlib.import_module("swallowing")
        time.sleep(10)

    with pytest.raises(Terminated) as leaving:
        work()
    assert leaving.value.code == 143
    assert sys.modules.pop("swallowing").whole


def test_a_signal_that_is_held_back_is_raised_in_the_part_that_allows_it_or_at_the_end() -> None:
    steps = []

    def stage(during_start: list[int], during_end: list[int]) -> None:
        with held_back() as waiting:
            for number in during_start:
                signal.raise_signal(number)
            steps.append("started")
            try:
                with raised(waiting):
                    steps.append("worked")
            finally:
                for number in during_end:
                    signal.raise_signal(number)
                steps.append("stopped")

    stage([], [])
    assert steps == ["started", "worked", "stopped"]
    steps.clear()
    with pytest.raises(Terminated), raised():
        stage([signal.SIGTERM], [])
    assert steps == ["started", "stopped"]
    steps.clear()
    with pytest.raises(KeyboardInterrupt), raised():
        stage([], [signal.SIGINT])
    assert steps == ["started", "worked", "stopped"]
    steps.clear()
    with pytest.raises(KeyboardInterrupt), raised():
        stage([], [signal.SIGINT, signal.SIGINT])
    assert steps == ["started", "worked"]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raised(), held_back():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
