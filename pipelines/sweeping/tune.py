"""Trials on Ray Tune."""

import os
import time
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from pipelines.evaluation import stage as evaluation
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import set_up_ray_data
from pipelines.runtime.environment import environment
from pipelines.runtime.errors import in_one_line, mistake_of, origin_of
from pipelines.runtime.stage import Stage
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.trials import Trial, _is_scored
from pipelines.training import stage as training
from pipelines.training.metrics.divergence import diverged

Ended = Callable[[Trial, dict[str, Any]], None]  # called with what a trial returned

TUNE_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths may be relative
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled by the stage
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no log files of its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output prints its headings even with verbose=0
}
LOST_ACTORS = 3  # times a trial starts again whose own process was lost (its errors end it at once)


def run_trial(
    config: dict[str, Any], trials: dict[str, Trial], sweep: SweepSettings, seed: int, cluster: ClusterSettings
) -> dict[str, Any]:
    """What Tune runs, in a process of its own: train, evaluate, or both, as untracked stages. An error is part of the outcome; a training
    that diverged is one, whatever the metric is."""
    trial = trials[config["trial"]]
    set_up_ray_data()
    began = time.monotonic()
    outcome: dict[str, Any] = {"metrics": {}, "error": None}
    try:
        stage = Stage(trial.name, cluster, seed=seed)
        one = trial.sections
        if sweep.over == "train":
            outcome["metrics"] |= training.train(one.tokenizer_path, one.cache, one.model, one.train, stage)
            outcome["error"] = diverged(outcome["metrics"]) or None
        if _is_scored(sweep) and outcome["error"] is None:
            outcome["metrics"] |= evaluation.evaluate(one.images, one.tokenizer_path, one.train.path, one.generate, one.evaluate, stage)
    except Exception as error:  # a failed trial is a row of the table, never the end of the sweep
        storage.write_bytes(storage.join(trial.path, "error.txt"), traceback.format_exc().encode())
        mistake, origin = mistake_of(error), origin_of(error)
        outcome["error"] = str(mistake) if mistake else f"{type(origin).__name__}: {in_one_line(origin)[:500]}"
    return {"outcome": {**outcome, "seconds": round(time.monotonic() - began, 3)}}


def run_trials(left: list[Trial], sweep: SweepSettings, stage: Stage, concurrent: int, ended: Ended) -> None:
    """Give the trials to Tune; `ended(trial, outcome)` is called in this process as each one ends."""
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

    storage_path = storage.join(sweep.path, "ray")
    storage.delete(storage_path)  # what a killed attempt left: trials resume from their own directories
    run = partial(run_trial, trials=by_name, sweep=sweep, seed=stage.seed, cluster=stage.cluster)
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
