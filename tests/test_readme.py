"""What the README tells people to type, or to hand to a cluster, is taken."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagenet_sync
import jft_async
import jsonschema
import pytest
import yaml

from tests.clusters import ROOT
from xdist import invocation

README = (ROOT / "README.md").read_text().replace("\\\n", " ")
PRESETS = {
    "imagenet_sync": (imagenet_sync.PRESETS, "cifar"),
    "jft_async": (jft_async.PRESETS, "demo"),
}
COMMAND = re.compile(r"(imagenet_sync|jft_async)\.py((?: +--[^\s`]+(?: +(?!#)[^\s`]+)*)?)")


def commands() -> list[tuple[str, str]]:
    """A job, and what it is given."""
    found = {(job, " ".join(options.split())) for job, options in COMMAND.findall(README)}
    return sorted((job, options) for job, options in found if options)


@pytest.mark.parametrize(("job", "options"), commands())
def test_a_command_of_a_job_is_taken(job: str, options: str) -> None:
    presets, default = PRESETS[job]
    invocation.parse(presets, default=default, description="", arguments=shlex.split(options))


def test_commands_are_found() -> None:
    assert ("imagenet_sync", "--preset paper") in commands()
    assert len(commands()) > 10


def test_who_submits_leaves_a_job_the_time_to_save() -> None:
    lines = [line for line in README.splitlines() if line.startswith("    ray job submit")]
    assert lines
    assert all("RAY_JOB_STOP_WAIT_TIME_S" in line for line in lines)


def cluster_job() -> Any:
    """The RayJob in the README."""
    _, _, after = README.partition("    apiVersion: ray.io/v1\n")
    lines = iter(["    apiVersion: ray.io/v1", *after.splitlines()])
    return yaml.safe_load("\n".join(_indented(lines)))


def _indented(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("    "):
            return
        yield line


def closed(schema: Any) -> Any:
    """The same schema, where no object may have fields that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(item) for name, item in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        inner["additionalProperties"] = False
    return inner


@pytest.fixture(scope="module")
def ray_job_schema() -> Any:
    file = Path(os.environ.get("XDIST_SHARED", ROOT.parent / "shared")) / "kuberay/RayJob.v1.json"
    if not file.is_file():
        pytest.skip(f"no {file}; set XDIST_SHARED to the directory above it")
    return closed(json.loads(file.read_text()))


def test_kuberay_takes_the_job(ray_job_schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(ray_job_schema)
    assert [error.message for error in validator.iter_errors(cluster_job())] == []
    misspelt = cluster_job()
    misspelt["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 8
    [error] = validator.iter_errors(misspelt)
    assert "'maxReplica' was unexpected" in error.message


def test_the_job_of_the_cluster_runs_with_the_ray_that_was_tested() -> None:
    spec = cluster_job()["spec"]
    version = spec["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    job, options = COMMAND.findall(spec["entrypoint"])[0]
    presets, default = PRESETS[job]
    parsed = invocation.parse(
        presets, default=default, description="", arguments=shlex.split(options)
    )
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert parsed.run.cluster.max_world_size == group["maxReplicas"]
    assert parsed.run.num_workers == "auto"
