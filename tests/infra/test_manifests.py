"""What is written for people and for clusters: commands that parse, links that lead somewhere, tables that agree with the settings,
manifests that are whole and open to nobody."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.config.load import load
from jobs.config.schema import RunConfig

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([PROJECT / "README.md", *PROJECT.glob("docs/*.md"), *PROJECT.glob("infra/**/*.md")])
MANIFESTS = sorted([*PROJECT.glob("infra/**/*.yaml"), *PROJECT.glob("infra/**/*.json")])
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))  # JSON is YAML


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [one for path in MANIFESTS for one in documents(path) if one.get("kind") == kind]
    return found


def quoted_commands(text: str) -> Iterator[str]:
    """`mar …` as it stands on lines of its own, between back quotes, or as a job's entry point."""
    text = text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    yield from (line.partition(" #")[0].partition(" >")[0] for line in lines if line.startswith("mar ") and line.split()[1] in COMMANDS)
    for command in re.findall(r"`(mar [^`\n]+)`", text):
        words = command.split()
        if words[1] in COMMANDS and len(words) > 2:
            yield command


def all_commands() -> list[tuple[str, str]]:
    written = [(page.name, command) for page in PAGES for command in quoted_commands(page.read_text())]
    return [*written, ("rayjob.yaml", manifest("RayJob")["spec"]["entrypoint"])]


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_that_is_written_down_parses(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *rest = shlex.split(command)[1:]
    for position, word in enumerate(rest):
        if word == "--config":
            (tmp_path / rest[position + 1]).write_text(load("demo").yaml())
    monkeypatch.chdir(tmp_path)
    known = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option for one in known.params for option in one.opts}
    if "--print-config" not in options or (name == "report" and rest):  # a report of a named run takes no configuration
        known.make_context(name, rest)
        return
    result = CliRunner().invoke(app, [name, "--print-config", *(word for word in rest if word != "--print-config")])
    assert result.exit_code == 0, f"{page}: {command}\n{result.output}{result.exception}"
    RunConfig.model_validate(yaml.safe_load(result.stdout))


def test_commands_were_found() -> None:
    """Of every kind: a page that is laid out in another way must not silence the test above."""
    assert {command.split()[1] for _, command in all_commands()} == COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_project(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []
    quoted = re.findall(r"`((?:infra|docs|tests)/[\w./-]+\.\w+)`", page.read_text())
    assert [one for one in quoted if not (PROJECT / one).exists()] == []


def test_tables_of_settings_are_those_of_the_code() -> None:
    """Every setting stands in one table, with its default and its kind."""
    rows = [
        line
        for page in PROJECT.glob("docs/*.md")
        for line in page.read_text().splitlines()
        if re.match(r"\| `[a-z]+(\.[a-z0-9_]+)?` \|.*\| (identity|operational) \|", line)
    ]
    found = {}
    for row in rows:
        key, default, kind = (cell.strip() for cell in row.split("|")[1:4])
        assert key not in found, f"{key} is in two tables"
        found[key] = (default, kind)
    expected = {"`seed`": ("`0`", "identity")}
    for section, field in RunConfig.model_fields.items():
        if dataclasses.is_dataclass(field.annotation):
            for one in dataclasses.fields(field.annotation):
                kind = "identity" if one.metadata.get("identity", True) else "operational"
                expected[f"`{section}.{one.name}`"] = (shown(getattr(field.annotation(), one.name)), kind)  # type: ignore[operator]
    assert found == expected


def shown(value: Any) -> str:
    """A default as the tables write it."""
    if value == "":
        return "empty"
    if isinstance(value, bool | list | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value:_}`" if isinstance(value, int) else f"`{value}`"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_are_whole(path: Path) -> None:
    for one in documents(path):
        assert isinstance(one, dict)
        if path.parent.name not in ("aws", "grafana"):
            assert {"apiVersion", "kind", "metadata"} <= one.keys()


def test_the_ray_up_file_is_one() -> None:
    """Against the schema that `ray up` itself checks with."""
    (ray,) = find_spec("ray").submodule_search_locations or []  # type: ignore[union-attr]
    schema = json.loads((Path(ray) / "autoscaler" / "ray-schema.json").read_text())
    (cluster,) = documents(PROJECT / "infra/aws/cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["available_node_types"]["gpu"]["min_workers"] <= cluster["max_workers"]
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_cluster_holds_the_published_presets() -> None:
    """Their 16 workers, each with a CPU and a GPU, on both clusters."""
    (group,) = manifest("RayCluster")["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    preset = load("mar_base")
    wanted = preset.train.workers * preset.cluster.gpus_per_worker
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]  # a stage refuses a cluster that would have to grow first
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) >= wanted
    assert group["replicas"] * int(limits["cpu"]) >= preset.train.workers
    gpu = documents(PROJECT / "infra/aws/cluster.yaml")[0]["available_node_types"]["gpu"]
    assert gpu["min_workers"] * 8 >= wanted


def test_nothing_is_open_to_the_network() -> None:
    """Tokens stay on; dashboards and servers on loopback or behind a ClusterIP."""
    services = [one for path in MANIFESTS for one in documents(path) if one.get("kind") == "Service"]
    assert services
    assert all(one["spec"]["type"] == "ClusterIP" for one in services)
    ray = manifest("RayCluster")["spec"]
    assert ray["authOptions"] == {"mode": "token"}
    assert ray["headGroupSpec"]["serviceType"] == "ClusterIP"
    (cluster,) = documents(PROJECT / "infra/aws/cluster.yaml")
    starts = [one for kind in ("head", "worker") for one in cluster[f"{kind}_start_ray_commands"] if "ray start" in one]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in one for one in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "RAY_AUTH_MODE=token" in (PROJECT / "infra/docker/Dockerfile").read_text()
    for page in PAGES:
        for line in page.read_text().splitlines():
            if re.search(r"mlflow (ui|server) ", line):
                assert "--host 127.0.0.1" in line, f"{page.name}: {line}"
            if re.search(r"ray start .*--head", line):
                assert "--dashboard-host=127.0.0.1" in line, f"{page.name}: {line}"


def test_images_pin_the_locks_versions_and_are_not_root() -> None:
    lock = (PROJECT / "requirements.lock").read_text()
    server = (PROJECT / "infra/mlflow/Dockerfile").read_text()
    for package in ("mlflow", "boto3"):
        (version,) = re.findall(rf"^{package}==(\S+)", lock, re.MULTILINE)
        assert f"{package}=={version}" in server
    (ray,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    assert manifest("RayCluster")["spec"]["rayVersion"] == ray
    for path in PROJECT.glob("infra/*/Dockerfile"):
        users = re.findall(r"^USER (\S+)", path.read_text(), re.MULTILINE)
        assert users, path
        assert users[-1] != "root"
    assert "--require-hashes -r requirements.lock" in (PROJECT / "infra/docker/Dockerfile").read_text()


def test_imports_in_the_documentation_resolve() -> None:
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    lines = [
        line for page in pages for line in page.read_text().splitlines() if re.match(r"from (jobs|pipelines|mar_model)\S* import ", line)
    ]
    assert len(lines) >= 4
    for line in lines:
        exec(line, {})
