"""Ctrl-C and SIGTERM in the driver: the work is asked to end, and is waited for."""

from collections.abc import Callable
from threading import Event, Thread

ANSWER_SECONDS = 1.0  # between looks at whether anybody is left who could end as he was asked to
LAST_WORD_SECONDS = 5.0  # for work that is just giving up to say why


def finish_when_asked(
    work: Callable[[], object], ask: Callable[[], None] | None = None, somebody_works: Callable[[], bool] = lambda: True
) -> BaseException | None:
    """Run `work` on a thread. Ctrl-C or SIGTERM calls `ask`, once, and waits for the work to end of its own accord, as long as there is
    somebody who works and so can hear of it; a second one leaves at once, as the first does without `ask`. Returns the first
    (KeyboardInterrupt, SystemExit), None if there was none; raises what the work raised.

    On the main thread Ray Train's `fit` would put a handler of its own in the place of Ctrl-C's, and leave it there.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        ended.set()

    ended = Event()  # a join that a signal interrupts takes the thread for ended from then on
    Thread(target=run, name="training", daemon=True).start()
    interruption: BaseException | None = None
    try:
        ended.wait()
    except (KeyboardInterrupt, SystemExit) as signal:
        if ask is None:
            raise
        interruption = signal
        ask()
        while not ended.wait(ANSWER_SECONDS):
            if not somebody_works():
                ended.wait(LAST_WORD_SECONDS)
                break
    if errors:
        raise errors[0]
    return interruption
