#!/usr/bin/env bash
# Installs what the Node and the C++ client and their tests need, from Debian and npm, and builds the C++ client.
# Does nothing that is done already; ends with an error if anything is missing in the end.
set -euo pipefail
cd "$(dirname "$0")"

packages=(g++ make libzmq3-dev cppzmq-dev libmsgpack-cxx-dev nlohmann-json3-dev)
if ! dpkg --status "${packages[@]}" >/dev/null 2>&1; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
  "${as_root[@]}" apt-get -qq update
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get -qq install --yes --no-install-recommends "${packages[@]}" >/dev/null
fi

if [ ! node/node_modules/.package-lock.json -nt node/package-lock.json ]; then
  # The binary of zeromq is part of its package: no script has to run.
  (cd node && npm ci --ignore-scripts --no-audit --no-fund)
fi

make --silent -j2 -C cpp all tests
