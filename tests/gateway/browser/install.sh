#!/usr/bin/env bash
# Installs what the page's test needs: Debian's chromium (some 300 MB with what it needs) and playwright-core.
# Does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")"

if ! dpkg --status chromium >/dev/null 2>&1; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
  "${as_root[@]}" apt-get -qq update
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get -qq install --yes --no-install-recommends chromium >/dev/null
fi

if [ ! node_modules/.package-lock.json -nt package-lock.json ]; then
  npm ci --ignore-scripts --no-audit --no-fund
fi
