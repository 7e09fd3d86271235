#!/usr/bin/env bash
# Generates the Python code beside the .proto files. `--check` fails if what is committed differs.
set -euo pipefail
cd "$(dirname "$0")"
out=.
if [[ "${1:-}" == "--check" ]]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
python=${PYTHON:-python3}
# google/rpc/status.proto comes with googleapis-common-protos.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m grpc_tools.protoc -I. -I"$site" --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" \
    --mypy_grpc_out=quiet:"$out" baton/v1/*.proto
if [[ "$out" != . ]]; then
    for f in "$out"/baton/v1/*; do diff -q "$f" "baton/v1/$(basename "$f")"; done
fi
