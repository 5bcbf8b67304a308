"""Build the wheel, install it in an empty environment, and import it there: only with the library's own dependencies.

The environment sees no package but those that the wheel asks for, so a forgotten dependency or file shows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys
import torch
import memmeta as mm

net = torch.nn.Linear(2, 1)
batch = torch.ones(3, 2), torch.zeros(3, 1)
learner = mm.maml(net, loss=torch.nn.functional.mse_loss, optimizer=mm.SGD(lr=0.1), steps=2)
report = learner.accumulate([(batch, batch)])
assert net.weight.grad is not None and report.loss > 0
extras = {"ray", "matplotlib", "learn2learn", "jsonargparse", "rich", "safetensors"} & set(sys.modules)
assert not extras, extras
import memmeta_workers
print("memmeta", memmeta_workers.__name__, mm.__file__)
"""


def run(*command: str | Path, cwd: str | Path = ROOT) -> None:
    """Run a command, and stop with its exit code if it fails."""
    print("+", *command, flush=True)
    code = subprocess.run([str(part) for part in command], cwd=cwd, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Build, install, import."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
        wheel = next(Path(folder).glob("memmeta-*.whl"))
        venv.create(Path(folder) / "env", with_pip=True)
        python = Path(folder) / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
        run(python, "-W", "error", "-c", CHECK, cwd=folder)
        # The command says in one line what it needs.
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[service,plots]")
        run(Path(folder) / "env" / "bin" / "memmeta", "--version", cwd=folder)


if __name__ == "__main__":
    main()
