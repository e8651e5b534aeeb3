#!/usr/bin/env bash
# Cross-builds the C++ runtime for 64-bit ARM into FOLDER/cpp, against the ONNX Runtime of the wheels
# that fetch.sh put into FOLDER. DEPENDENCIES is what fetch_dependencies.sh made.
#
#   build.sh FOLDER DEPENDENCIES
set -euo pipefail

source=$(cd "$(dirname "$0")/../../runtime/cpp" && pwd)
folder=$(cd "$1" && pwd)
dependencies=$(cd "$2" && pwd)

# The headers are those that other tests build with; the library is the one in the wheel.
mkdir -p "$folder/onnxruntime/lib"
ln -sfn "$dependencies/include" "$folder/onnxruntime/include"
for name in libonnxruntime.so libonnxruntime.so.1; do
    ln -sfn "$folder"/python/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime.so.* \
        "$folder/onnxruntime/lib/$name"
done
export PATH="$folder/tools/usr/bin:$PATH"
# What the unpacked compiler is linked to.
export LD_LIBRARY_PATH="$folder/tools/usr/lib/x86_64-linux-gnu"
cmake -G Ninja --preset aarch64 -S "$source" -B "$folder/cpp/release" \
    -DCMAKE_SYSROOT="$folder/tools" -DCMAKE_PREFIX_PATH="$dependencies" \
    -DONNXRUNTIME_ROOT="$folder/onnxruntime" -DCMAKE_INSTALL_PREFIX="$folder/cpp/install" \
    -DSAM3RT_OPENSSL=OFF -DSAM3RT_TESTS=ON -DSAM3RT_EXAMPLES=ON -DSAM3RT_WARNINGS_AS_ERRORS=ON \
    > "$folder/cpp.log" || { cat "$folder/cpp.log"; exit 1; }
ninja -C "$folder/cpp/release" --quiet install > /dev/null
