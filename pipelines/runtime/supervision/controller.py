"""Supervision of worker groups: Ray's timeouts, restarts after failures, and errors that end the run because they would repeat."""

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
from pipelines.runtime.supervision.channel import PREEMPTED, RESIZED, TrainingChannel
from pipelines.runtime.supervision.messages import GroupFailed
from pipelines.runtime.supervision.watchdog import PATIENCE

# Errors that a restart would repeat, with the same settings, files and code.
MISTAKES = (UserError, ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, AssertionError)
ROOM_SECONDS = 8  # to place all workers; then Ray checks the cluster's resources again (default: 60)
POLL_SECONDS = 0.5  # interval of Ray's worker polls (default: 2)
PREEMPTION_POLL_SECONDS = 2  # interval of Ray's checks for pre-emption notices (default: 5)
START_SECONDS = 120  # minimum time for a placed group to start training, however short hang_seconds is
LONGEST_PAUSE_SECONDS = 60.0  # between consecutive failed starts
PING_SECONDS = 1.0  # for a healthy worker to answer
SHUTDOWN_SECONDS = 5  # for the rest of a failed group to leave its process group (default: 30)
LEAVING_SECONDS = 120.0  # for a group to write its checkpoint before it is resized


def ray_train_waits(hang_seconds: int) -> AbstractContextManager[None]:
    """Set the timeouts of Ray Train through its environment variables; values set by the user are kept."""
    seconds = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": ROOM_SECONDS,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": PREEMPTION_POLL_SECONDS,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": hang_seconds,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": hang_seconds,
    }
    return environment({name: str(value) for name, value in seconds.items()})


class Supervision(ControllerCallback, WorkerGroupCallback):
    """Callbacks in Ray Train's controller for the life cycle of worker groups."""

    def __init__(self, channel: TrainingChannel, hang_seconds: int, restarts: int, fewest: int) -> None:
        self.channel, self.fewest = channel, fewest
        self.start_seconds, self.restarts = max(PATIENCE * hang_seconds, START_SECONDS), restarts
        self._running = self._noticed = self._waits = False
        self._failed_starts = 0  # consecutive
        self._undecided: float | None = None  # time since which Ray Train has had no decision to take

    def after_controller_start(self, train_run_context: object) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(SHUTDOWN_SECONDS))
        SupervisedWorkerGroup.supervision = self
        TrainController.worker_group_cls = SupervisedWorkerGroup

    def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
        """Report missing resources for an elastic group: without room for the minimum, Ray Train polls silently and without a pause."""
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
        """Report missing resources once; Ray Train retries until they are available."""
        if not self._waits:
            self.channel.say(f"the cluster has no resources for {workers} workers: waiting")
        self._waits = True

    def start_failed(self, cause: str) -> None:
        """Wait, longer after each consecutive failure. Raises RuntimeError after too many."""
        self._failed_starts += 1
        if 0 <= self.restarts < self._failed_starts:
            raise RuntimeError(f"the workers failed to start {self._failed_starts} times in a row (setting failures): {cause}")
        self.channel.send(GroupFailed(f"{cause}; restarting", time.time()))
        if self._failed_starts > 1:
            time.sleep(min(2**self._failed_starts, LONGEST_PAUSE_SECONDS))

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._waits, self._failed_starts = False, 0
        self._running = True
        self.channel.group_works(True)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Raises errors that a restart would repeat, which ends the run."""
        errors = worker_group_status.errors
        notice = worker_group_status.get_preemption_info()
        if notice is not None and not self._noticed and not errors:
            self._noticed = True
            self.channel.say(f"{_nodes(notice)} will be pre-empted: writing a checkpoint before the group restarts without it")
            self.channel.ask(PREEMPTED)
        if not errors or not self._running:
            return
        self._running = False
        for error in errors.values():
            _end_at_mistake(error)
        self.channel.group_works(False)
        text = f"{cause_of(errors, len(worker_group_status.worker_statuses))}; restarting"
        self.channel.send(GroupFailed(text, time.time()))

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ask a running group to write a checkpoint before it is resized, so that no step is repeated."""
        if not self._running:
            return
        self._running = False
        self.channel.say(
            f"the cluster has resources for {resize_decision.num_workers} workers: writing a checkpoint before the group is resized"
        )
        self.channel.ask(RESIZED)
        deadline = time.monotonic() + LEAVING_SECONDS
        while not self.channel.has_answer() and time.monotonic() < deadline:
            time.sleep(0.2)


class SupervisedWorkerGroup(WorkerGroup):
    """A worker group that starts training within a time limit or is removed. Ray waits without a limit for a hung worker during the start;
    and if a worker dies during process group setup or launch, Ray keeps the other workers' resources reserved, or ends the run."""

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
        """Runs on a thread, while the controller's thread waits: removing the placement group ends all its workers."""
        seconds = self.supervision.start_seconds
        if self._over.wait(seconds):
            return
        who = "a worker hangs"
        with contextlib.suppress(RayError):
            who = self._who_hangs()
        with self._deciding:
            if not self._over.is_set():
                self._hanging = f"{who}: {seconds:.0f} s after its start the group is not training"
        while self._hanging and not self._over.is_set():
            with contextlib.suppress(Exception):  # the placement group may not be ready yet
                self._room.shutdown()
            self._over.wait(PING_SECONDS)

    def _who_hangs(self) -> str:
        if not self._workers:
            return "a worker hangs before its process has started"
        asked = {worker.actor.get_metadata.remote(): worker for worker in self._workers}
        _, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=PING_SECONDS)
        silent = [asked[reference] for reference in waiting]
        if len(silent) in (0, len(asked)) and len(asked) > 1:  # workers that wait for another one in a collective do not answer either
            return "a worker hangs, the others wait for it"
        names = [
            f"worker {worker.distributed_context.world_rank} (process {worker.metadata.pid} on {worker.metadata.node_ip})"
            for worker in silent
        ]
        return f"{', '.join(names[:4]) or 'the worker'}{' …' if names[4:] else ''} hangs"


def _end_at_mistake(error: BaseException) -> None:
    """Raise the exception of a worker if a restart would repeat it."""
    for reason in carried_by(error):
        if isinstance(reason, MISTAKES):
            if reason is not error:
                reason.add_note(str(error))  # the worker's traceback
            raise reason


def _nodes(notice: Any) -> str:
    names = ", ".join(node[:8] for node in notice.preempted_node_ids)
    seconds = f" in {max(notice.deadline_ms / 1000 - time.time(), 0):.0f} s" if notice.deadline_ms else ""
    return f"node {names} (workers {', '.join(map(str, notice.preempted_ranks))}){seconds}"


def cause_of(errors: Mapping[int, BaseException], workers: int) -> str:
    """Why a group of `workers` failed, from the errors of its workers. A dead worker comes first: the others' errors follow from it."""
    for worker, error in errors.items():
        failure = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
        if isinstance(failure, RayActorError):
            reason = _reason(str(failure))
            hint = "; NCCL aborts a worker that has waited for another for the setting hang_seconds" if "SIGABRT" in reason else ""
            return f"worker {worker} died ({reason}{hint})"
    for worker, error in errors.items():
        if isinstance(error, WorkerHealthCheckTimeoutError):
            return f"worker {worker} hangs: no answer for {_seconds()} s"
    for worker, error in errors.items():
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            silent = sorted(set(range(workers)) - set(errors))
            hanging = f"worker {', '.join(map(str, silent))} hangs: " if silent else ""
            return f"{hanging}worker {worker} has waited {_seconds()} s for the others (setting hang_seconds)"
    worker, error = next(iter(errors.items()))
    return f"worker {worker} failed ({type(error).__name__}: {in_one_line(error)[:300]})"


def _why(error: BaseException) -> str:
    """Why a start failed, if the failed worker is unknown."""
    if isinstance(error, RayActorError):
        return f"a worker died ({_reason(str(error))})"
    origin, hangs = origin_of(error), "timed out" in str(error).lower()
    return f"a worker {'hangs or is unreachable' if hangs else 'failed'} ({type(origin).__name__}: {in_one_line(origin)[:300]})"


def _seconds() -> str:
    return os.environ.get("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "?")


def _reason(text: str) -> str:
    """The line of Ray's report that contains the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    telling = [line for line in lines if "because" in line or "SIG" in line or "exit" in line.lower()]
    return (telling or lines)[-1].partition(" Some common causes")[0][:300]
