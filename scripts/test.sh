#!/usr/bin/env bash
# Every check of the project: style, format, types and tests. Makes .venv (once). Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

make_env cpu,demo,dev
cd "$root"
export WANDB_MODE=offline HF_HUB_OFFLINE=1 # no account and no hub: a model id that is not there is refused at once
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests' models are too small to share out; launched ranks set their own

slurm/cluster.sh install || echo "$0: the tests in tests/slurm are skipped" >&2

.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/pytest -n 2 --dist loadfile "$@" # two processes, each a file at a time
