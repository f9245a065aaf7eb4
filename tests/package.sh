#!/usr/bin/env bash
# Builds what users install, and the documentation's site, and tries them:
#
#   bash tests/package.sh
#
# The sdist and the wheel from it are built and checked. The wheel is installed with MPICH into a fresh
# environment for every Python from 3.11 on that is there. With the newest Python two ranks train,
# with each of the others one rank takes a step. The site is built strictly, and the recipes in launch/ for conda,
# Spack and containers are read. Images are built where docker runs. The summary names what was not
# there.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
pythons=(3.14 3.13 3.12 3.11)
work=$PWD/.test-env/package
unset PYTHONPATH # it would show the checkout to what is installed
unset PYTHONDONTWRITEBYTECODE # many a container sets it; each program would compile its packages anew
summary=()

main() {
    local version found try=train
    rm -rf "$work"
    mkdir -p "$work"
    step "tools" set_up_tools
    step "sdist and wheel" build
    for version in "${pythons[@]}"; do
        found=$(find_python "$version")
        if [[ $found ]]; then
            step "Python $version" try_wheel "$found" "$work/env-$version" "$try"
            try=take_a_step # it takes a minute to compile what training needs
        else
            note "Python $version" "not there"
        fi
    done
    step "site" "$work/tools/bin/mkdocs" build --quiet --site-dir "$work/site"
    step "recipes" read_recipes
    if docker info >/dev/null 2>&1; then
        step "image" docker build --quiet --file launch/Dockerfile --tag shardopt:test .
    else
        note "image" "docker is not there, or does not run"
    fi
    printf '\n==== package ====\n'
    printf '%s\n' "${summary[@]}"
}

# step TITLE COMMAND...: run a command; its output is shown if it fails, which ends all.
step() {
    local title=$1 start_s=$SECONDS log="$work/log"
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log"
        echo "package: $title failed"
        exit 1
    fi
    note "$title" "well, $((SECONDS - start_s)) s"
}

note() { summary+=("$(printf '%-16s %s' "$1" "$2")"); }

set_up_tools() {
    # The documentation is made from the sources, without what they import.
    "$python" -m venv "$work/tools" && "$work/tools/bin/python" - >"$work/tools/list" <<'END' &&
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())
print(*project["project"]["optional-dependencies"]["docs"], *project["build-system"]["requires"],
      "build", "twine", "wheel", sep="\n")
END
        "$work/tools/bin/pip" install --no-compile -r "$work/tools/list"
}

build() {
    # From a copy: a build leaves folders behind, and what git ignores must not matter.
    mkdir "$work/tree" && git ls-files -z | xargs -0 cp --parents -t "$work/tree" &&
        "$work/tools/bin/python" -m build --no-isolation --outdir "$work/dist" "$work/tree" &&
        "$work/tools/bin/twine" check --strict "$work"/dist/*
}

find_python() {
    local candidate
    for candidate in "python$1" ~/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# try_wheel PYTHON ENV TRY: install the wheel alone, and try it outside of the checkout.
try_wheel() {
    local wheels=("$work"/dist/*.whl) python=$1 env=$2
    "$python" -m venv --without-pip "$env" &&
        "$work/tools/bin/pip" --python "$env/bin/python" install --no-compile \
            "${wheels[0]}[mpich,cli]" &&
        NUMBA_CACHE_DIR=$env/numba "$3" "$env/bin" &&
        (cd "$work" && "$env/bin/shardopt" plan --params 1e9 --memory-bandwidth 20GB/s)
}

# train BIN: let two ranks train.
train() {
    local example=$PWD/launch/examples/numpy_logistic.py
    (cd "$work" && "$1/mpirun" -n 2 "$1/python" "$example")
}

# take_a_step BIN: let one rank take a step, which must move the parameter by about lr.
take_a_step() {
    (cd "$work" && "$1/python" -) <<'END'
import numpy as np

from shardopt.numpy import NAdam, Parameter

param = Parameter(np.ones(5, np.float32), "weight")
with NAdam([param], lr=0.5) as opt:
    param.grad += 1
    opt.step()
    assert (abs(param.data - 0.5) < 0.1).all(), param.data
END
}

read_recipes() {
    "$work/tools/bin/python" - <<'END'
import ast
from pathlib import Path

import yaml

launch = Path("launch")
ast.parse((launch / "spack/packages/py_shardopt/package.py").read_text())
assert yaml.safe_load((launch / "spack/repo.yaml").read_text())["repo"]["namespace"] == "shardopt"
packages = yaml.safe_load((launch / "environment.yml").read_text())["dependencies"]
named = {str(each).partition(">")[0].partition("=")[0] for each in packages}
assert {"numpy", "numba", "mpi4py", "ml_dtypes", "python-xxhash"} <= named, named
for line in (launch / "Dockerfile").read_text().replace("\\\n", "").splitlines():
    assert not line or line.split()[0] in {"#", *"FROM RUN ARG WORKDIR COPY ENV CMD".split()}, line
END
}

main "$@"
