#!/usr/bin/env bash
# Installs memmeta from this source tree into a virtual environment, everything at the version of constraints.txt:
#
#   docker/install.sh dependencies FOLDER   what memmeta needs; reads pyproject.toml and constraints.txt only
#   docker/install.sh source FOLDER         memmeta itself, into the same environment
#   docker/install.sh all FOLDER            both
#
# PYTHON: the interpreter of the new environment (python3). TORCH_INDEX: where PyTorch comes from, if not from pip's
# own index. No other package is ever taken from there.
set -euo pipefail

usage="usage: $0 dependencies|source|all FOLDER"
what=${1:?$usage}
target=${2:?$usage}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

dependencies() {
    "${PYTHON:-python3}" -m venv "$target"
    # --no-deps: what PyTorch needs comes from pip's own index, in the next step.
    if [[ -n "${TORCH_INDEX:-}" ]]; then
        "$target/bin/pip" install -c constraints.txt --no-deps --index-url "$TORCH_INDEX" torch
    fi
    # Not `pip install .[...]`: the source is not here yet, so that changing it does not install PyTorch again.
    "$target/bin/python" - >"$work/requirements.txt" <<'LIST'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["service"], *extras["plots"], sep="\n")
LIST
    "$target/bin/pip" install -c constraints.txt -r "$work/requirements.txt"
}

source_tree() {
    # The build backend stays outside of the environment, and is pinned like the rest.
    "$target/bin/pip" install -c constraints.txt --target "$work/tools" hatchling
    PYTHONPATH="$work/tools" "$target/bin/pip" wheel --no-build-isolation --no-deps --wheel-dir "$work" .
    "$target/bin/pip" install -c constraints.txt "$(echo "$work"/memmeta-*.whl)[service,plots]"
    "$target/bin/pip" check
    # From a folder without the source: what is imported is what was installed.
    bin=$(cd "$target/bin" && pwd)
    cd "$work"
    "$bin/memmeta" --version
    "$bin/python" -c "import ray, torch, memmeta_workers"
}

case $what in
dependencies) dependencies ;;
source) source_tree ;;
all)
    dependencies
    source_tree
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
