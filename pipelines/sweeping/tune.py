"""Trials on Ray Tune."""

import os
import uuid
from collections.abc import Callable
from typing import Any

from pipelines.runtime import storage
from pipelines.runtime.environment import environment
from pipelines.sweeping.trials import Trial

Ended = Callable[[Trial, dict[str, Any]], None]  # called with what a trial returned

TUNE_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths may be relative
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled by the stage
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no log files of its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output prints its headings even with verbose=0
}
LOST_ACTORS = 3  # times a trial starts again whose own process was lost (its errors end it at once)


def run_trials(left: list[Trial], run: Callable[[dict[str, Any]], Any], path: str, concurrent: int, ended: Ended) -> None:
    """Run the trials with Tune. `run` is called in a process per trial with `{"trial": name}`, and returns `{"outcome": …}`; `ended(trial,
    outcome)` is called in this process as each trial ends. Tune keeps its own files in `path` meanwhile."""
    from ray import tune

    by_name = {trial.name: trial for trial in left}

    class OnEnd(tune.Callback):  # type: ignore[misc]
        def __init__(self, call: Any) -> None:
            self.call = call

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks for a resume that we don't use; this one's run in MLflow can't be

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.call(trial.config["trial"], trial.last_result["outcome"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            lost = f"its process was lost {LOST_ACTORS + 1} times"
            self.call(trial.config["trial"], {"metrics": {}, "error": lost, "seconds": 0.0})

    storage_path = storage.join(path, "ray")
    storage.delete(storage_path)  # what a killed attempt left: trials resume from their own directories
    with environment(TUNE_ENVIRONMENT, override=True):
        tune.Tuner(
            tune.with_resources(run, {"cpu": 0, "memory": 1}),  # one byte: Tune refuses an empty request
            param_space={"trial": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent, reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id
            ),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=os.path.abspath(storage_path) if storage.is_local(storage_path) else storage_path,
                failure_config=tune.FailureConfig(max_failures=LOST_ACTORS),
                callbacks=[OnEnd(lambda name, outcome: ended(by_name[name], outcome))],
                verbose=0,
            ),
        ).fit()
    storage.delete(storage_path)
