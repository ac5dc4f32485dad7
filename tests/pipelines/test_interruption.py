"""What a person's Ctrl-C does while workers are at work."""

import os
import signal
import threading

import pytest

from pipelines.interruption import finish_when_asked

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
        monkeypatch.setattr(f"pipelines.interruption.{name}", 0.05)
    never, looks = threading.Event(), iter([True, True, False])
    ctrl_c()
    assert isinstance(finish_when_asked(never.wait, lambda: None, lambda: next(looks)), KeyboardInterrupt)
    assert not list(looks)
    never.set()


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        finish_when_asked(lambda: 1 / 0)
