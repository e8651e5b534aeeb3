# For cmake --toolchain: Linux on 64-bit ARM, such as a Jetson, with Debian's cross compiler
# (g++-aarch64-linux-gnu). ONNXRUNTIME_ROOT names an aarch64 build of ONNX Runtime.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Programs are this machine's; libraries and headers are the target's or named outright.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
