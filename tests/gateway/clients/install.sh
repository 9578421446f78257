#!/usr/bin/env bash
# Installs unchanged clients of OpenAI's API, in Python and in Node, which tests run against the gateway.
# Does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")"

if [ ! .venv/.installed -nt requirements.txt ]; then
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.txt
  touch .venv/.installed
fi

if [ ! node_modules/.package-lock.json -nt package-lock.json ]; then
  npm ci --ignore-scripts --no-audit --no-fund
fi
