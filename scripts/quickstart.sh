#!/usr/bin/env bash
# From a clean clone to an aligned language model: makes .venv (once), then runs the quickstart's pipeline.
# Arguments are Hydra overrides: scripts/quickstart.sh run_name=second seed=1
# Paths in them, and runs/, are relative to the checkout, wherever it is called from.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

make_env cpu,demo
cd "$root"
exec .venv/bin/alignkit pipeline +experiment=quickstart "$@" </dev/null
