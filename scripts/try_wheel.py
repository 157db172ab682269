"""Install a wheel or an sdist as a user would, in a new environment, and use it.

`python scripts/try_wheel.py FILE` needs nothing but Python and, for what the package depends on, a package
index. A wheel is tried without Rust on the PATH; an sdist needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

_USE = """
import sys
known = set(sys.modules)
import polyprag
others = {name.partition(".")[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names)
assert others == {"polyprag"}, others
assert "site-packages" in polyprag.__file__, polyprag.__file__

import numpy as np
from polyprag import Document, Module, Store, StoreSpec
spec = StoreSpec(modules=[Module("layers.0.up", 3, 5, 0)], experts=4, rank=2, alpha=8.0, codec="q8")
experts = {"layers.0.up.A": np.zeros((4, 2, 3), "f4"), "layers.0.up.B": np.zeros((5, 4, 2), "f4")}
with Store.create("s", spec, experts) as writer:
    documents = [Document("a", "The mill stands in Ost."), Document("b", "A fjord.")]
    writer.add(documents, np.zeros((2, 1, 4), "f4"))
with Store.open("s") as store:
    (hit,) = store.search("Where is the mill?")
    assert hit.id == "a"
    assert store.combined_route(["a", "b"]).shape == (1, 4)
    assert store.verify().documents == 2
print("polyprag", polyprag.__version__, "works on Python", sys.version.split()[0])
"""


def main(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        if file.suffix == ".whl":
            environment["PATH"] = os.pathsep.join(
                part
                for part in environment.get("PATH", "").split(os.pathsep)
                if not any((Path(part) / name).exists() for name in ("rustc", "cargo", "maturin"))
            )

        def run(*command: str, code: int = 0) -> str:
            done = subprocess.run(  # noqa: S603 - our own interpreter
                [str(python), *command],
                cwd=home,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != code:
                raise SystemExit(
                    f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
                )
            return done.stdout + done.stderr

        def install(what: str) -> None:
            run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", what)

        install(str(file))
        print(run("-c", _USE).strip())
        told = run("-c", "import polyprag; polyprag.Engine", code=1)
        if "pip install 'polyprag[train]'" not in told:
            raise SystemExit(f"without torch, this is said:\n{told}")
        told = run("-m", "polyprag", "inspect", "s", code=6)
        if "pip install 'polyprag[cli]'" not in told:
            raise SystemExit(f"without typer, this is said:\n{told}")
        install(f"{file}[cli]")
        shown = run("-m", "polyprag", "inspect", "s")
        if "2 documents" not in shown:
            raise SystemExit(shown)
        print(run("-m", "polyprag", "--version").strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
