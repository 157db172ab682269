"""What is released: the workflows pin what they run, and the packaging says what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_may_do_little(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.search(rf"{re.escape(action)} # v\d+\.\d+\.\d+", text), f"{action}: which version is that?"
    assert set(workflow["permissions"].values() if workflow["permissions"] else ()) <= {"read"}
    writing = [
        (name, right)
        for name, job in workflow["jobs"].items()
        for right, may in job.get("permissions", {}).items()
        if may == "write"
    ]
    assert writing in ([], [("publish", "id-token")])
    assert "secrets." not in text, "publishing needs none"


def test_nothing_is_published_that_was_not_tried() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "release.yml").read_text())
    jobs = workflow["jobs"]
    assert set(jobs["publish"]["needs"]) == {"wheel", "free-threaded", "sdist"}
    for name in jobs["publish"]["needs"]:
        runs = " ".join(step.get("run", "") for step in jobs[name]["steps"])
        assert "scripts/try_wheel.py" in runs, name


def test_the_table_of_extras_is_whole() -> None:
    table = (REPOSITORY / "docs" / "installation.md").read_text()
    listed = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert listed == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_the_lowest_python_is_the_same_everywhere() -> None:
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"abi3-py{lowest.replace('.', '')}" in (REPOSITORY / "rust/python/Cargo.toml").read_text()
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["classifiers"]
    assert f"Python {lowest} or newer" in (REPOSITORY / "docs" / "installation.md").read_text()


def test_the_version_is_one() -> None:
    version = re.search(r'^version = "([^"]+)"', (REPOSITORY / "Cargo.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == version[1]
    assert re.search(
        rf"^## \[{re.escape(version[1])}\] - ", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_issue_forms_can_be_read() -> None:
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(form)
        assert all(part["attributes"]["label"] for part in form["body"])


def test_contributing_names_what_is_there() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:rust|python|tests|docs|benches)/[\w./-]+)`", text):
        assert (REPOSITORY / name).exists(), name
