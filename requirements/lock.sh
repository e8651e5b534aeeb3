#!/usr/bin/env bash
# Writes the lock files anew:  requirements/lock.sh [OPTION_OF_UV ...]
#
# Options say where uv finds PyTorch's CPU build, such as --find-links FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() {
    local output=$1
    shift
    # Nothing but versions and hashes goes into the file: no index, no folder of this machine.
    uv pip compile pyproject.toml --constraint constraints.txt --generate-hashes --quiet \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
        --output-file "$output" "$@" >/dev/null
}

lock requirements/cpu.lock --extra cpu --universal --python-version 3.11
lock requirements/test.lock --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --extra cpu --extra openvino --extra export --extra mobile-sam --extra bench --extra docs --extra test "$@"
