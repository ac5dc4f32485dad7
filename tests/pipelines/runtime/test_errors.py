"""What is behind an error that came through Ray."""

from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from pipelines.runtime.errors import UserError, carried_by, causes_of, mistake_of, origin_of


def after(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def through_ray(error: Exception) -> Exception:
    """As the driver gets what a worker raised while its group started."""
    raised = RayTaskError("train", "its traceback", error).as_instanceof_cause()
    return after(WorkerGroupStartupFailedError("the group did not start"), raised)


def test_a_worker_has_raised_what_it_raised_and_not_what_that_came_of() -> None:
    lost = after(ConnectionError("the store is gone"), ValueError("not an address"))
    for error in (lost, through_ray(lost)):
        assert carried_by(error) == [lost]
        assert lost.__cause__ in causes_of(error)
        assert origin_of(error) is lost.__cause__


def test_a_persons_mistake_is_found_behind_whatever() -> None:
    mistake = UserError("train.batch is 3")
    assert mistake_of(mistake) is mistake
    assert mistake_of(through_ray(mistake)) is mistake
    assert carried_by(through_ray(mistake)) == [mistake]
    assert mistake_of(through_ray(after(RuntimeError("it failed"), mistake))) is mistake
    assert mistake_of(through_ray(RuntimeError("it failed"))) is None
