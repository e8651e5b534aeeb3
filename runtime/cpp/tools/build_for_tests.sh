#!/usr/bin/env bash
# Builds the C++ runtime for its tests: `release`, installed to `install`; `address`, with
# AddressSanitizer and UndefinedBehaviorSanitizer; `thread`, with ThreadSanitizer; `tensorrt`,
# without ONNX Runtime. The last three run engines in a stand-in for TensorRT and the GPU.
#
#   build_for_tests.sh FOLDER      (FOLDER/dependencies is what fetch_dependencies.sh made)
set -euo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

configure() {
    cmake -G Ninja -S "$source" -B "$folder/$1" "${@:2}" \
        -DCMAKE_PREFIX_PATH="$folder/dependencies" -DONNXRUNTIME_ROOT="$folder/dependencies" \
        -DSAM3RT_TESTS=ON -DSAM3RT_WARNINGS_AS_ERRORS=ON \
        > "$folder/$1.log" || { cat "$folder/$1.log"; exit 1; }
}

# With -O1, compiling for `address` takes 24 s of processor time more than with -O0, and its tests
# take more than 100 s less. Of `thread`, one program is run, so that compiling is what counts.
sanitized() {
    echo -DCMAKE_BUILD_TYPE=None "-DCMAKE_C_FLAGS=$1" "-DCMAKE_CXX_FLAGS=$1"
}
stand_in="-DSAM3RT_TENSORRT=ON -DSAM3RT_NVINFER_SOURCE=$source/tests/stand_in/nvinfer.cpp"
configure release -DSAM3RT_EXAMPLES=ON -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_INSTALL_PREFIX="$folder/install"
# One build takes SHA-256 from OpenSSL where that is installed; this one has the portable code.
configure address $stand_in -DSAM3RT_EXAMPLES=ON $(sanitized -O1) \
    -DSAM3RT_SANITIZE=address,undefined -DSAM3RT_OPENSSL=OFF
configure thread $stand_in $(sanitized -O0) -DSAM3RT_SANITIZE=thread
# The stand-in has graphs computed by ONNX Runtime, which the library knows nothing of.
configure tensorrt $stand_in -DSAM3RT_ONNXRUNTIME=OFF -DCMAKE_BUILD_TYPE=None \
    "-DCMAKE_CXX_FLAGS=-O0 -isystem $folder/dependencies/include/onnxruntime"
ninja -C "$folder/release" --quiet install > /dev/null
ninja -C "$folder/address" --quiet
ninja -C "$folder/thread" --quiet threads stand_in_libcuda stand_in_libnvrtc
ninja -C "$folder/tensorrt" --quiet driver threads stand_in_libcuda stand_in_libnvrtc sam3rt_shared
