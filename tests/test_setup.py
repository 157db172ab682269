"""What `make` says on a machine that lacks something, by running its check with a PATH of our own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CHECK = REPOSITORY / "scripts" / "check.sh"
SHELL = shutil.which("sh") or "/bin/sh"


class Machine:
    """A folder of commands that is all that the check finds on its PATH."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.bin.mkdir()
        self.command("python3", f'exec "{sys.executable}" "$@"')
        self.command("rustc", 'echo "rustc 1.88.0 (6b00bc388 2025-06-23)"')
        self.command("cargo", 'echo "cargo 1.88.0 (873a06493 2025-05-10)"')
        self.command("cc", "exit 0")

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{SHELL}\n{script}\n")
        path.chmod(0o755)

    def without(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def python(self, name: str, version: str, *, environments: bool = True) -> None:
        """An interpreter that only tells its version, and whether it can make environments."""
        can = 0 if environments else 1
        self.command(name, f'case "$2" in *ensurepip*) exit {can} ;; esac; echo {version}')

    def check(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SHELL, str(CHECK)],
            env={"PATH": str(self.bin), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def complaint(self, **environment: str) -> str:
        """The one sentence of a check that fails."""
        result = self.check(**environment)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    def chosen(self, **environment: str) -> str:
        """The name of the Python that a check which passes prints."""
        result = self.check(**environment)
        assert (result.returncode, result.stderr) == (0, "")
        return Path(result.stdout.rstrip("\n")).name


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_with_everything(machine: Machine) -> None:
    assert machine.chosen() == "python3"


def test_no_python(machine: Machine) -> None:
    machine.without("python3")
    complaint = machine.complaint()
    assert "Python 3.10 or newer" in complaint
    assert "found none" in complaint
    assert "https://www.python.org/downloads" in complaint


@pytest.mark.parametrize("version", ["2.7.18", "3.9.25", "3.6.15"])
def test_python_too_old(machine: Machine, version: str) -> None:
    machine.python("python3", version)
    complaint = machine.complaint()
    assert f"found only {version} ({machine.bin / 'python3'})" in complaint
    assert "make PYTHON=" in complaint


@pytest.mark.parametrize("version", ["3.10.0", "3.13.1", "3.20.0", "4.0.0"])
def test_python_new_enough(machine: Machine, version: str) -> None:
    machine.python("python3", version)
    assert machine.chosen() == "python3"


def test_a_newer_python_beside_an_old_python3(machine: Machine) -> None:
    machine.python("python3", "3.8.10")
    machine.python("python3.12", "3.12.3")
    assert machine.chosen() == "python3.12"


def test_a_python_that_is_only_a_shim_is_passed_over(machine: Machine) -> None:
    machine.command("python3.13", 'echo "python3.13: command not found" >&2; exit 127')
    assert machine.chosen() == "python3"


def test_a_python_without_environments_is_passed_over(machine: Machine) -> None:
    machine.python("python3.12", "3.12.3", environments=False)
    assert machine.chosen() == "python3"


def test_no_python_that_can_make_environments(machine: Machine) -> None:
    machine.python("python3", "3.11.2", environments=False)
    complaint = machine.complaint()
    assert f"3.11.2 ({machine.bin / 'python3'})" in complaint
    assert "apt install python3-venv" in complaint


def test_the_python_that_is_named_is_taken(machine: Machine) -> None:
    machine.python("python3.13", "3.13.0")
    machine.python("mine", "3.11.0")
    assert machine.chosen(PYTHON=str(machine.bin / "mine")) == "mine"


def test_the_python_that_is_named_is_not_replaced_by_another(machine: Machine) -> None:
    machine.python("mine", "3.9.0")
    assert "found only 3.9.0" in machine.complaint(PYTHON="mine")
    assert "PYTHON=nowhere does not run" in machine.complaint(PYTHON="nowhere")


@pytest.mark.parametrize("name", ["rustc", "cargo"])
def test_no_rust(machine: Machine, name: str) -> None:
    machine.without(name)
    complaint = machine.complaint()
    assert "Rust 1.88 or newer" in complaint
    assert f"found no {name}" in complaint
    assert "https://rustup.rs" in complaint


@pytest.mark.parametrize("name", ["rustc", "cargo"])
@pytest.mark.parametrize("version", ["1.87.0", "1.9.0", "0.99.0", "1.87.0-nightly"])
def test_rust_too_old(machine: Machine, name: str, version: str) -> None:
    machine.command(name, f'echo "{name} {version} (17067e9ac 2025-05-09)"')
    complaint = machine.complaint()
    assert f"found {name} {version}" in complaint
    assert "rustup update stable" in complaint
    assert "https://rustup.rs" in complaint


@pytest.mark.parametrize("version", ["1.88.0", "1.100.1", "2.0.0", "1.91.0-nightly", "1.88.0-beta.3"])
def test_rust_new_enough(machine: Machine, version: str) -> None:
    machine.command("rustc", f'echo "rustc {version} (6b00bc388 2025-06-23)"')
    machine.command("cargo", f'echo "cargo {version}"')
    assert machine.chosen() == "python3"


def test_rustup_without_a_toolchain(machine: Machine) -> None:
    machine.command("rustc", 'echo "error: rustup could not choose a version of rustc to run" >&2; exit 1')
    complaint = machine.complaint()
    assert "rustc is there but does not run" in complaint
    assert "rustup default stable" in complaint


def test_a_version_that_cannot_be_read(machine: Machine) -> None:
    machine.command("cargo", 'echo "cargo of some sort"')
    assert "found cargo" in machine.complaint()


def test_no_c_compiler(machine: Machine) -> None:
    machine.without("cc")
    assert "found no cc" in machine.complaint()
    machine.command("clang", "exit 0")
    assert machine.chosen(CC="clang -m64") == "python3"


def test_all_that_is_missing_is_told_at_once(machine: Machine) -> None:
    machine.without("python3", "rustc", "cargo", "cc")
    result = machine.check()
    assert result.returncode == 1
    assert [line.split()[2] for line in result.stderr.splitlines()] == ["Python", "Rust", "a"]


def test_the_versions_are_those_that_the_packages_ask_for() -> None:
    script = CHECK.read_text()
    python = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (REPOSITORY / "pyproject.toml").read_text())
    rust = re.search(r'rust-version = "(\d+)\.(\d+)"', (REPOSITORY / "Cargo.toml").read_text())
    assert python
    assert rust
    assert "python_major={} python_minor={}".format(*python.groups()) in script
    assert "rust_major={} rust_minor={}".format(*rust.groups()) in script


def test_make_refuses_a_path_with_spaces(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")
    folder = tmp_path / "two words"
    folder.mkdir()
    shutil.copy(REPOSITORY / "Makefile", folder)
    result = subprocess.run(
        [make, "test"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert f'path has spaces, and this one is "{folder}"' in result.stderr
