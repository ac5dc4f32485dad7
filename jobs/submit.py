"""Send a `mar` command to a Ray cluster through Ray's Jobs API, follow its log, and exit with its status."""

import asyncio
import difflib
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.shortcuts import SHORTCUTS, as_assignments
from jobs.stage_commands import STAGES
from jobs.stages import value_at
from pipelines.runtime.cluster.connection import auth_token, unreachable
from pipelines.runtime.cluster.host_memory import ENVIRONMENT
from pipelines.runtime.errors import UserError
from pipelines.runtime.tracking import without_password

if TYPE_CHECKING:
    from jobs.config.load import ConfigurationFile
    from jobs.config.schema import RunConfig

CONFIGURATION = ("config", "preset", "assignments")  # parameters of every command that uses a configuration
PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("jobs", "pipelines", "mar_model", "pyproject.toml")  # everything that a job imports; no runs, data or virtual environments
# Ray reads .gitignore patterns. Exclude everything at the top level (but not the top level itself), except PARTS and their contents.
EXCLUDES = ["/[!.]*", "/.?*", *(f"!/{part}{inside}" for part in PARTS for inside in ("", "/**")), "__pycache__"]
AGENT_SECONDS = 60.0  # how long to wait for the agent of a head that is starting
LOST_LOG_SECONDS = 120.0  # how long to retry when the head does not answer


@dataclass(frozen=True)
class Job:
    """A `mar` command to run on a cluster: its name, its arguments, and the sources of its configuration, if it uses one."""

    name: str
    arguments: list[str]
    config: "ConfigurationFile | None"
    preset: str | None
    assignments: list[str]
    configured: bool = True

    def entrypoint(self) -> str:
        """The shell command that runs it in the job's working directory. A configuration file is passed as --set options."""
        from jobs.config.load import file_as_assignments

        assignments = [*(file_as_assignments(self.config) if self.config else []), *self.assignments]
        configuration = ["--preset", self.preset] if self.preset else []
        configuration += [word for text in assignments for word in ("--set", text)]
        return shlex.join(["python", "-m", "jobs.cli", self.name, *configuration, *self.arguments])


def job_command(group: Any, words: Sequence[str], config: str | None, preset: str | None, assignments: list[str]) -> Job:
    """Parse `train --preset …` with the rules of the command line. Options of `mar submit` itself have lower precedence.

    Raises UserError for a command that does not exist or cannot be a job, for an unreadable configuration file, and for a
    configuration that the command does not use.
    """
    from jobs.config.load import read_file

    name, *rest = words[1:] if words[0] == "mar" and len(words) > 1 else words
    possible = [one for one in group.commands if one not in ("submit", "help")]
    if name not in possible:
        close = difflib.get_close_matches(name, possible, n=1)
        raise UserError(
            f"submit got the command {name!r}, expected one of {', '.join(possible)}" + (f"; nearest: {close[0]}" if close else "")
        )
    context = group.commands[name].make_context(name, list(rest))
    given = context.params
    arguments = _arguments(context, skipped={*CONFIGURATION, *(SHORTCUTS if name == "generate" else ())})
    if "config" not in given or given.get("run"):
        unused = [option for option, value in {"--config": config, "--preset": preset, "--set": assignments}.items() if value]
        if unused:
            raise UserError(f"{shlex.join([name, *arguments])} uses no configuration, but {unused[0]} is given", remedy="leave it out")
        return Job(name, arguments, None, None, [], configured=False)
    if given["config"] and config:
        raise UserError(f"--config is given twice, {config!r} and {given['config']!r}", remedy="give one")
    preset = given["preset"] if _is_given(context, "preset") or preset is None else preset
    assignments = [*assignments, *(given["assignments"] or []), *(as_assignments(given) if name == "generate" else [])]
    file = given["config"] or config
    return Job(name, arguments, read_file(file) if file is not None else None, preset, assignments)


def _is_given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _arguments(context: Any, skipped: set[str]) -> list[str]:
    """The command-line words that reproduce the command's options and arguments, without the `skipped` parameters."""
    options, arguments = list[str](), list[str]()
    for one in context.command.params:
        if one.name in skipped or not _is_given(context, one.name):
            continue
        value = context.params[one.name]
        values = [getattr(each, "value", each) for each in (value if isinstance(value, list | tuple) else [value])]
        if not one.opts[0].startswith("-"):
            arguments += [str(each) for each in values]
        elif isinstance(value, bool):
            options.append(one.opts[0] if value else one.secondary_opts[0])
        else:
            options += [f"{one.opts[0]}={each}" for each in values]
    return [*options, *(["--"] if any(word.startswith("-") for word in arguments) else []), *arguments]


def environment(pairs: Sequence[str]) -> dict[str, str]:
    """Parse KEY=VALUE texts into a mapping. Raises UserError for a text without key or `=`."""
    variables = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--env {pair!r} is not a variable, expected KEY=VALUE, e.g. --env AWS_REGION=eu-central-1")
        variables[key] = value
    return variables


def refuse_password(config: "RunConfig") -> None:
    """Raise UserError if the job's command line would contain a password: everyone who can list the cluster's jobs could read it."""
    shown = without_password(config.tracking.uri)
    if shown != config.tracking.uri:
        raise UserError(
            f"tracking.uri {shown!r} contains a password, which the cluster would show to everyone who can list its jobs",
            remedy="remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the cluster's environment",
        )


def outputs_lost_with_the_job(job: Job, config: "RunConfig") -> list[str]:
    """Warnings if the job writes to relative paths: they lie in Ray's working directory, which is deleted with the job."""
    stages = [STAGES[job.name]] if job.name in STAGES else list(STAGES.values()) if job.name == "quickstart" else []
    if not stages:
        return []
    paths = {one.writes: value_at(config, one.writes) for one in stages}
    paths["tracking.uri"] = config.tracking.uri.removeprefix("sqlite:///")
    relative = [key for key, path in paths.items() if "://" not in path and not path.startswith(("/", "~"))]
    if not relative:
        return []
    return [
        f"{', '.join(f'{key} ({paths[key]})' for key in relative)}: a job's relative paths lie in Ray's copy of the project "
        f"on one node and are deleted with it; use a path that all nodes share, e.g. --set {relative[0]}=s3://bucket/… or /shared/…"
    ]


def send(address: str, job: Job, variables: dict[str, str], detach: bool) -> int:
    """Submit the job. With `detach` print its id and return 0, otherwise stream its log and return its exit status.

    Raises UserError for an address that does not answer or rejects the token.
    """
    client = _client(address)
    runtime = {"working_dir": str(PROJECT), "excludes": EXCLUDES, "env_vars": ENVIRONMENT | variables}
    job_id = _submitted(client, job.entrypoint(), runtime)
    if detach:
        print(job_id)
        print(f"follow: ray job logs --address {address} --follow {job_id}", file=sys.stderr)
        return 0
    print(f"job {job_id} at {address}", file=sys.stderr)
    try:
        return _follow(client, job_id, address)
    except KeyboardInterrupt:
        print(f"\nmar: job {job_id} keeps running; to stop it: ray job stop --address {address} {job_id}", file=sys.stderr)
        return 130


def _submitted(client: Any, entrypoint: str, runtime: dict[str, Any]) -> str:
    """Submit and return the job's id. A head that has just started answers before its agent accepts jobs, so retry for a while."""
    give_up = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > give_up:
                raise UserError(
                    f"the Ray head accepts no jobs ({str(error).strip()}): its agent is not running",
                    remedy="dashboard_agent.log on the head has the reason, "
                    "often a port in use by another Ray (`ray start --dashboard-agent-listen-port=…`)",
                ) from error
            time.sleep(1.0)


def _client(address: str) -> Any:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address is {address!r}, expected the http:// address of a Ray dashboard, e.g. http://127.0.0.1:8265")
    if reason := unreachable(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)):
        raise UserError(
            f"--address {address!r} does not answer ({reason}), expected the dashboard of a running Ray head",
            remedy="check with `ray status` on the head node that it runs, and that the port forward to it is open",
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(variable, None)  # they would override the given address
    token = _token()
    try:
        client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
        client.list_jobs()  # the constructor only requests the version, which needs no token
    except AuthenticationError as error:
        found = "the token found here is rejected" if token else "no token was found"
        raise UserError(
            f"--address {address!r} requires Ray's token: {found}",
            remedy="put the cluster's token (`ray get-auth-token` on its head "
            "node) into RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token",
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--address {address!r} is not a Ray dashboard: {reason[:200]}") from error
    return client


def _token() -> str:
    """Ray's token, looked up where Ray does and in the same order; empty if there is none or authentication is disabled."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return ""
    return auth_token()


def _follow(client: Any, job_id: str, address: str) -> int:
    """Print the job's log as it grows, reconnecting if necessary. Returns the exit status of the job's command."""
    printed, heard = 0, time.monotonic()
    while True:
        try:
            printed, before = asyncio.run(_print_log(client, job_id, printed)), printed
            info = client.get_job_info(job_id)
            heard = time.monotonic()
        except Exception as error:
            if time.monotonic() - heard > LOST_LOG_SECONDS:
                raise UserError(
                    f"--address {address!r} has not answered for {LOST_LOG_SECONDS:.0f} s ({error})",
                    remedy=f"the job may still run: ray job logs --address {address} --follow {job_id}",
                ) from error
            time.sleep(2.0)
            continue
        if info.status.is_terminal():
            break
        if printed == before:
            time.sleep(1.0)
    print(f"job {job_id}: {info.status.value}", file=sys.stderr)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None and info.message:
        print(f"mar: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


async def _print_log(client: Any, job_id: str, printed: int) -> int:
    """Print the log after its first `printed` characters. Returns the total number of characters printed."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        seen += len(text)
        if seen > printed:
            sys.stdout.write(text[len(text) - (seen - printed) :])
            sys.stdout.flush()
            printed = seen
    return printed
