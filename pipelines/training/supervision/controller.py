"""What surrounds a worker group: how long Ray waits for what, why a group starts again, and what no new start would mend."""

import contextlib
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from threading import Event, Lock, Thread
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from pipelines.runtime.cluster.ray_internals import (
    ControllerCallback,
    TrainController,
    WorkerGroup,
    WorkerGroupCallback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from pipelines.runtime.environment import environment
from pipelines.runtime.errors import UserError, carried_by, in_one_line, origin_of
from pipelines.training.supervision.channel import PREEMPTED, RESIZED, TrainingChannel
from pipelines.training.supervision.messages import GroupFailed
from pipelines.training.supervision.watchdog import PATIENCE

# Errors that the next attempt would meet again: settings, files and code are what they were.
MISTAKES = (UserError, ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, AssertionError)
ROOM_SECONDS = 8  # for all workers to find room; then Ray looks anew at what the cluster has (its default: 60)
POLL_SECONDS = 0.5  # between Ray's looks at its workers (its default: 2)
PREEMPTION_POLL_SECONDS = 2  # between its looks for pre-emption notices (its default: 5)
START_SECONDS = 120  # that a group may take to begin once it has room, however short train.hang_seconds is
LONGEST_PAUSE_SECONDS = 60.0  # between starts that fail one after the other
PING_SECONDS = 1.0  # for a worker that is well to answer
SHUTDOWN_SECONDS = 5  # for what is left of a broken group to leave its process group (its default: 30)
LEAVING_SECONDS = 120.0  # for a group that is to change its size to write its checkpoint


def ray_train_waits(hang_seconds: int) -> AbstractContextManager[None]:
    """The environment variables by which Ray Train is told how long to wait; those that the person has set stay."""
    seconds = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": ROOM_SECONDS,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": PREEMPTION_POLL_SECONDS,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": hang_seconds,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": hang_seconds,
    }
    return environment({name: str(value) for name, value in seconds.items()})


class Supervision(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray Train's controller, which calls it at every turn of a worker group."""

    def __init__(self, channel: TrainingChannel, hang_seconds: int, restarts: int, fewest: int) -> None:
        self.channel, self.fewest = channel, fewest
        self.start_seconds, self.restarts = max(PATIENCE * hang_seconds, START_SECONDS), restarts
        self._running = self._noticed = self._waits = False
        self._failed_starts = 0  # in a row
        self._undecided: float | None = None  # since when Ray Train has found nothing to do

    def after_controller_start(self, train_run_context: object) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(SHUTDOWN_SECONDS))
        SupervisedWorkerGroup.supervision = self
        TrainController.worker_group_cls = SupervisedWorkerGroup

    def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
        """An elastic group is not tried without room for its fewest: Ray Train looks again and again, without a pause or a word."""
        if current_state is not previous_state:
            self._undecided = None
            return
        self._undecided = self._undecided or time.monotonic()
        time.sleep(POLL_SECONDS)
        if time.monotonic() - self._undecided > ROOM_SECONDS:
            self.finds_no_room(self.fewest)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._running = self._noticed = False
        self.channel.new_group()

    def finds_no_room(self, workers: int) -> None:
        """Said once; Ray Train looks anew until there is some."""
        if not self._waits:
            self.channel.say(f"the cluster has no room for {workers} workers at present: waiting for it")
        self._waits = True

    def start_failed(self, cause: str) -> None:
        """Waits a little longer each time. Raises RuntimeError when that was one time too many."""
        self._failed_starts += 1
        if 0 <= self.restarts < self._failed_starts:
            raise RuntimeError(f"the workers did not begin to train, {self._failed_starts} times in a row (train.failures): {cause}")
        self.channel.send(GroupFailed(f"{cause}; starting again", time.time()))
        if self._failed_starts > 1:
            time.sleep(min(2**self._failed_starts, LONGEST_PAUSE_SECONDS))

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._waits, self._failed_starts = False, 0
        self._running = True
        self.channel.group_works(True)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Raises what no restart would mend, which ends the run."""
        errors = worker_group_status.errors
        notice = worker_group_status.get_preemption_info()
        if notice is not None and not self._noticed and not errors:
            self._noticed = True
            self.channel.say(f"{_nodes(notice)} will be taken away: writing a checkpoint, to go on without")
            self.channel.ask(PREEMPTED)
        if not errors or not self._running:
            return
        self._running = False
        for error in errors.values():
            _end_at_mistake(error)
        self.channel.group_works(False)
        text = f"{cause_of(errors, len(worker_group_status.worker_statuses))}; starting again"
        self.channel.send(GroupFailed(text, time.time()))

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """A running group that is to change its size writes a checkpoint first, so that nothing is computed twice."""
        if not self._running:
            return
        self._running = False
        self.channel.say(f"the cluster has room for {resize_decision.num_workers} workers: writing a checkpoint, to go on with them")
        self.channel.ask(RESIZED)
        deadline = time.monotonic() + LEAVING_SECONDS
        while not self.channel.has_answer() and time.monotonic() < deadline:
            time.sleep(0.2)


class SupervisedWorkerGroup(WorkerGroup):
    """A worker group that begins to train in time, or is gone. Ray's own waits without a limit for a worker that hangs meanwhile; a
    worker that dies while the process group forms or its training is launched leaves the room of the others taken, or ends the run."""

    supervision: Supervision

    def _create_placement_group(self, *arguments: Any) -> Any:
        self._room = super()._create_placement_group(*arguments)
        return self._room

    def _create_workers(self, *arguments: Any, **options: Any) -> list[Any]:
        Thread(target=self._end_in_time, name="start of a group", daemon=True).start()
        self._workers = super()._create_workers(*arguments, **options)
        return self._workers

    def _start(self) -> None:
        self._deciding, self._over, self._hanging, self._workers = Lock(), Event(), "", []
        try:
            try:
                super()._start()
            finally:
                with self._deciding:
                    self._over.set()
        except WorkerGroupStartupTimeoutError as error:
            self.supervision.finds_no_room(error.num_workers)
            raise
        except (RayError, WorkerGroupStartupFailedError) as error:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            if not self._hanging:
                _end_at_mistake(error)
            cause = error.__cause__ or error
            if not getattr(cause, "preempted", False):
                self.supervision.start_failed(self._hanging or f"{_why(cause)} while the group started")
            raise WorkerGroupStartupFailedError(str(cause)) from error

    def _end_in_time(self) -> None:
        """On a thread, while the controller's own waits: what takes the room away ends all who are in it."""
        seconds = self.supervision.start_seconds
        if self._over.wait(seconds):
            return
        who = "a worker hangs"
        with contextlib.suppress(RayError):
            who = self._who_hangs()
        with self._deciding:
            if not self._over.is_set():
                self._hanging = f"{who}: {seconds:.0f} s after the start the group has not begun to train"
        while self._hanging and not self._over.is_set():
            with contextlib.suppress(Exception):  # for a while nobody may be there to hear of it
                self._room.shutdown()
            self._over.wait(PING_SECONDS)

    def _who_hangs(self) -> str:
        if not self._workers:
            return "a worker that has not come up hangs"
        asked = {worker.actor.get_metadata.remote(): worker for worker in self._workers}
        _, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=PING_SECONDS)
        silent = [asked[one] for one in waiting]
        if len(silent) in (0, len(asked)) and len(asked) > 1:  # who waits for another in the process group does not answer either
            return "a worker hangs, the others wait for it"
        names = [f"worker {one.distributed_context.world_rank} (process {one.metadata.pid} on {one.metadata.node_ip})" for one in silent]
        return f"{', '.join(names[:4]) or 'the worker'}{' …' if names[4:] else ''} hangs"


def _end_at_mistake(error: BaseException) -> None:
    """Raises what a worker has raised, where the next start would only meet it again."""
    for one in carried_by(error):
        if isinstance(one, MISTAKES):
            if one is not error:
                one.add_note(str(error))  # the worker's traceback
            raise one


def _nodes(notice: Any) -> str:
    names = ", ".join(one[:8] for one in notice.preempted_node_ids)
    seconds = f" in {max(notice.deadline_ms / 1000 - time.time(), 0):.0f} s" if notice.deadline_ms else ""
    return f"node {names} (workers {', '.join(map(str, notice.preempted_ranks))}){seconds}"


def cause_of(errors: Mapping[int, BaseException], workers: int) -> str:
    """Why a group of `workers` broke, from the errors of its workers: a lost one first, for the others only miss it."""
    for worker, error in errors.items():
        failure = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
        if isinstance(failure, RayActorError):
            reason = _reason(str(failure))
            hint = "; so NCCL ends one that has waited train.hang_seconds for another" if "SIGABRT" in reason else ""
            return f"worker {worker} was lost ({reason}{hint})"
    for worker, error in errors.items():
        if isinstance(error, WorkerHealthCheckTimeoutError):
            return f"worker {worker} hangs: it has not answered since {_seconds()} s"
    for worker, error in errors.items():
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            silent = sorted(set(range(workers)) - set(errors))
            hanging = f"worker {', '.join(map(str, silent))} hangs: " if silent else ""
            return f"{hanging}worker {worker} has waited {_seconds()} s for the others (train.hang_seconds)"
    worker, error = next(iter(errors.items()))
    return f"worker {worker} failed ({type(error).__name__}: {in_one_line(error)[:300]})"


def _why(error: BaseException) -> str:
    """Why a start failed, of which it is not known whose error it is."""
    if isinstance(error, RayActorError):
        return f"a worker was lost ({_reason(str(error))})"
    origin, hangs = origin_of(error), "timed out" in str(error).lower()
    return f"a worker {'hangs or is out of reach' if hangs else 'failed'} ({type(origin).__name__}: {in_one_line(origin)[:300]})"


def _seconds() -> str:
    return os.environ.get("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "?")


def _reason(text: str) -> str:
    """The line of Ray's report that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    telling = [line for line in lines if "because" in line or "SIG" in line or "exit" in line.lower()]
    return (telling or lines)[-1].partition(" Some common causes")[0][:300]
