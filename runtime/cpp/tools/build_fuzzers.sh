#!/usr/bin/env bash
# Builds with clang, warnings as errors: everything, as `clang`; and the libFuzzer targets of
# tests/fuzz with AddressSanitizer and UndefinedBehaviorSanitizer, as `fuzz`. tests/cpp/
# test_cpp_tidy.py runs clang-tidy as both were compiled. test_cpp_fuzz.py runs the targets for a few
# seconds each; for longer, run FOLDER/fuzz/tests/fuzz/fuzz_* with a folder of seeds.
#
#   build_fuzzers.sh FOLDER      (FOLDER/dependencies is what fetch_dependencies.sh made)
set -euo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(cd "$1" && pwd)
export CC=clang CXX=clang++

configure() {
    cmake -G Ninja -S "$source" -B "$folder/$1" "${@:2}" -DCMAKE_BUILD_TYPE=None \
        -DCMAKE_PREFIX_PATH="$folder/dependencies" -DONNXRUNTIME_ROOT="$folder/dependencies" \
        -DSAM3RT_WARNINGS_AS_ERRORS=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
        > "$folder/$1.log" || { cat "$folder/$1.log"; exit 1; }
    ninja -C "$folder/$1" --quiet
}

configure clang -DCMAKE_CXX_FLAGS=-O0 -DSAM3RT_TESTS=ON -DSAM3RT_EXAMPLES=ON \
    -DSAM3RT_TENSORRT=ON "-DSAM3RT_NVINFER_SOURCE=$source/tests/stand_in/nvinfer.cpp"
configure fuzz -DCMAKE_CXX_FLAGS=-O1 -DSAM3RT_FUZZERS=ON -DSAM3RT_SANITIZE=address,undefined
