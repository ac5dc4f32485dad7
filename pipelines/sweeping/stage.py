"""Stage *sweep*: Ray Tune over training or over generation."""

import math
import time
import traceback
from dataclasses import replace
from functools import partial
from typing import Any

from mar_model.checkpoints.checkpoint import STATE, weights_file
from pipelines.checkpoints.directory import ANOTHER_CHECKPOINT, Weights
from pipelines.checkpoints.released import chosen_checkpoint
from pipelines.evaluation import stage as evaluation
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.record import check_count, metric_name
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import cluster_resources, require_workers, set_up_ray_data
from pipelines.runtime.errors import DamagedFileError, UserError, in_one_line, mistake_of, origin_of
from pipelines.runtime.plots import sweep_plot
from pipelines.runtime.records import null_for_nan
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.table import Row, row_of, write_table
from pipelines.sweeping.trials import Sections, Trial, _is_scored, grid
from pipelines.sweeping.tune import run_trials
from pipelines.training import stage as training
from pipelines.training.metrics.divergence import diverged
from pipelines.training.metrics.log import MetricsLog
from pipelines.training.settings import LOSS_COLUMNS


def sweep(sections: Sections, sweep: SweepSettings, stage: Stage) -> dict[str, Any]:
    """Run every combination of `sweep.parameters` as a Tune trial; trials that an earlier attempt finished are not run again.

    Returns the summary: `rows` (trial, parameters, metric, metrics, seconds, caution, error), `best` (trial, parameters, metric).
    A failed trial is a row with its reason, and is run again when the sweep is. Raises UserError for a parameter or metric that
    does not exist, a trial that the cluster can't hold, or when every trial failed.
    """
    check_metric(sweep, sections.evaluate)
    if _is_scored(sweep):
        check_count("sweep.images", sweep.images)
    if sweep.over == "generate":
        generate = sections.generate
        checkpoint = chosen_checkpoint(generate.checkpoint, sections.train.path, stage.say)
        # one checkpoint for all trials, also while a training writes more
        sections = replace(sections, generate=replace(generate, checkpoint=checkpoint))
    trials = grid(sections, sweep)
    identity = sweep_identity(sections, sweep, stage.seed, stage.cluster)
    summary = stage.begin(sweep.path, identity, enough=lambda found: found.get("failed") == 0)
    if summary is not None:
        return summary
    concurrent = concurrency(trials, sweep, stage.cluster)
    if _is_scored(sweep):
        metrics = sorted({"fid", *sections.evaluate.metrics})
        shared = replace(sections.evaluate, path=storage.join(sweep.path, "reference"), metrics=metrics)
        shared = evaluation.with_reference(sections.images, sections.tokenizer_path, shared, stage)
        trials = grid(replace(sections, evaluate=shared), sweep)
    rows = finished_rows(trials, sweep, stage)
    left = [trial for trial in trials if trial.name not in rows]
    stage.say(f"{len(trials)} trials ({len(rows)} finished before), {min(concurrent, len(left)) or 1} at a time")
    with stage.progress(len(trials), "trials", done=len(rows)) as bar:

        def ended(trial: Trial, outcome: dict[str, Any]) -> None:
            row = rows[trial.name] = row_of(trial, outcome, sweep.metric)
            _track(trial, row, stage)
            if row["error"] is None:
                storage.write_json(_record(trial), null_for_nan(row))
            else:
                stage.say(f"{trial.name} failed: {row['error']}")
            found = best_of(list(rows.values()), sweep.mode)
            bar.update(len(rows), **({f"best_{sweep.metric}": found["metric"]} if found else {}))

        if left:
            run = partial(run_trial, trials={trial.name: trial for trial in left}, sweep=sweep, seed=stage.seed, cluster=stage.cluster)
            run_trials(left, run, sweep.path, concurrent, ended)
    ordered = [rows[trial.name] for trial in trials]
    best = best_of(ordered, sweep.mode)
    if best is None:
        reasons = "; ".join(f"{row['trial']}: {row['error']}" for row in ordered)
        raise UserError(f"every trial of {sweep.path} failed ({reasons})", remedy="mend the cause, then run the sweep again")
    write_table(sweep.path, ordered)
    storage.write_bytes(storage.join(sweep.path, "sweep.png"), sweep_plot(ordered, sweep.metric, best["trial"]))
    stage.artifact(storage.join(sweep.path, "table.csv"))
    stage.artifact(storage.join(sweep.path, "sweep.png"))
    stage.say(f"best: {best['trial']} with {sweep.metric} {best['metric']:.4g}")
    if caution := best.get("caution"):
        stage.say(caution)
    return stage.complete(
        sweep.path,
        identity,
        {
            "over": sweep.over,
            "metric": sweep.metric,
            "mode": sweep.mode,
            "trials": len(ordered),
            "failed": sum(row["error"] is not None for row in ordered),
            "best": {key: best[key] for key in ("trial", "parameters", "metric")},
            **({"caution": caution} if caution else {}),
            "rows": ordered,
        },
    )


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


def finished_rows(trials: list[Trial], sweep: SweepSettings, stage: Stage) -> dict[str, dict[str, Any]]:
    """The rows of the trials that an earlier attempt finished, by name. A trial whose row cannot be read runs again, which is logged. A
    training that diverged is judged again: earlier versions kept its row."""
    rows = {}
    for trial in trials:
        if storage.exists(record := _record(trial)):
            try:
                row: dict[str, Any] = storage.read_json(record, Row, "the trial runs again; what it has made is kept")
            except DamagedFileError as error:
                stage.say(str(error))
                continue
            if sweep.over != "train" or not diverged(row["metrics"]):
                rows[trial.name] = row
    return rows


def sweep_identity(sections: Sections, sweep: SweepSettings, seed: int, cluster: ClusterSettings) -> dict[str, Any]:
    """What decides the table: the grid, and every setting that the trials share."""
    if sweep.over == "train":
        train = replace(sections.train, precision=resolved(sections.train.precision, cluster))
        found = {**training.training_identity(sections.cache, sections.model, train, seed), "train.images": train.images}
    else:
        state_file = storage.join(sections.generate.checkpoint, STATE)
        if not storage.exists(state_file):
            raise UserError(f"generate.checkpoint {sections.generate.checkpoint!r} is no checkpoint: it holds no {STATE}")
        state = storage.read_json(state_file, Weights, ANOTHER_CHECKPOINT)
        found = {"checkpoint": state["files"][weights_file(state, sections.generate.ema, sections.generate.ema_decay)], "seed": seed}
    if _is_scored(sweep):
        digest = network_digest(sections.evaluate.features, sections.evaluate.weights)
        reference = find_reference(sections.images, sections.tokenizer_path, sections.evaluate, digest)
        generate = replace(sections.generate, precision=resolved(sections.generate.precision, cluster))
        found |= evaluation.scoring_identity(reference, generate, sections.evaluate, digest)
    overridden = {*sweep.parameters, "generate.images", "evaluate.images"}
    return {**{name: value for name, value in found.items() if name not in overridden}, **identity_of(sweep=sweep)}


def concurrency(trials: list[Trial], sweep: SweepSettings, cluster: ClusterSettings) -> int:
    """Trials at a time that the cluster holds, at most `sweep.concurrent`. A trial itself takes no CPU, its workers do.

    Raises UserError for a trial whose workers the cluster does not hold, since it would wait for ever.
    """
    cpus, gpus = cluster_resources()
    fitting = float(len(trials))
    for trial in trials:
        one = trial.sections
        drawing = {"generate.actors": one.generate.actors} if _is_scored(sweep) else {}
        trained = {"train.workers": one.train.workers} if sweep.over == "train" else {}
        judging = {"evaluate.actors": one.evaluate.actors} if _is_scored(sweep) else {}  # take no CPU
        for wanted, cpus_each in ((trained, 1), (drawing, 1), (drawing | judging, 0)):  # training first, then drawing and judging
            require_workers(wanted, cluster, cpus_each)
            fitting = min(fitting, cpus // max(sum(wanted.values()) * cpus_each, 1))
            if gpus_wanted := sum(wanted.values()) * cluster.gpus_per_worker:
                fitting = min(fitting, gpus // gpus_wanted)
    return max(1, min(int(fitting), sweep.concurrent or len(trials)))


def best_of(rows: list[dict[str, Any]], mode: str) -> dict[str, Any] | None:
    """The row with the lowest ("min") or highest ("max") finite metric; None when no trial has one."""
    valid = [row for row in rows if row["metric"] is not None and math.isfinite(row["metric"])]
    return (min if mode == "min" else max)(valid, key=lambda row: row["metric"]) if valid else None


def check_metric(sweep: SweepSettings, evaluate: EvaluateSettings) -> None:
    """Raise UserError for a metric that this sweep's trials don't measure."""
    known = ["frechet_distance", metric_name(evaluate.features), *(["label_agreement"] if evaluate.classifier else [])]
    known += LOSS_COLUMNS if sweep.over == "train" else []
    if sweep.metric not in known:
        classifier = "" if evaluate.classifier else " (label_agreement needs evaluate.classifier)"
        raise UserError(f"sweep.metric is {sweep.metric!r}; a sweep over {sweep.over} measures {', '.join(known)}{classifier}")


def _record(trial: Trial) -> str:
    return storage.join(trial.path, "trial.json")


def _track(trial: Trial, row: dict[str, Any], stage: Stage) -> None:
    """An MLflow run of the trial's own, with its training curve where it has one."""
    if stage.tracker is None:
        return
    configuration = trial.sections.configuration()
    tracker = stage.tracker.child(trial.name, configuration, trial.path)
    if tracker is None:
        return
    log = MetricsLog(storage.join(trial.path, "metrics.jsonl"), 2**63)
    for line in log.rows:
        tracker.log({name: value for name, value in line.items() if name != "images_seen"}, line["images_seen"])
    tracker.log({**row["metrics"], "seconds": row["seconds"]}, log.rows[-1]["images_seen"] if log.rows else 0)
    tracker.close("FAILED" if row["error"] else "FINISHED")
