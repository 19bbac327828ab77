#!/usr/bin/env bash
# Known vulnerabilities of the pinned dependencies. Without the tool or its database nothing is known, and that is said.
set -uo pipefail
cd "$(dirname "$0")/.."
python -m pip_audit --version > /dev/null 2>&1 || { echo "pip-audit is not installed: dependencies not audited"; exit 0; }
report=$(python -m pip_audit --no-deps --disable-pip --requirement constraints.txt 2>&1)
status=$?
echo "$report"
if [ $status -ne 0 ] && ! grep -q "Found .* vulnerabilit" <<< "$report"; then
  echo "the database cannot be reached: dependencies not audited"
  exit 0
fi
exit $status
