#!/usr/bin/env bash
# Puts what running sam3rt on 64-bit ARM under emulation takes into one folder, and installs nothing:
#
#   tools/      QEMU and the cross compiler, from Debian's packages
#   system/     Debian for arm64: the C and C++ libraries and Python
#   python/     a virtual environment with the aarch64 wheels of the runtime; bin/python starts QEMU
#   run         starts a program of arm64
#
#   fetch.sh FOLDER PYTHON
#
# PYTHON is an interpreter with pip. Packages are those of the machine's own release of Debian. Exits
# with 77 where they cannot be had.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=$2

absent() {
    echo "tests/aarch64/fetch.sh: $*" >&2
    exit 77
}
[ "$(uname -m)" = x86_64 ] || absent "this is no x86-64 machine; on aarch64 run the tests themselves"
command -v apt-get > /dev/null && command -v dpkg > /dev/null || absent "this is no Debian system"

# Both architectures' packages, with lists and a cache apart from the machine's.
rm -f "$folder/.done"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work"/{lists/partial,cache/archives/partial}
touch "$work/nothing-installed"
apt=(apt-get -qq --yes
    -o "Dir::State=$work" -o "Dir::State::status=$work/nothing-installed"
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
    -o APT::Sandbox::User= -o Acquire::Languages=none -o Debug::NoLocking=1
    -o APT::Install-Recommends=0 -o APT::Architectures::=amd64 -o APT::Architectures::=arm64)
"${apt[@]}" update || absent "Debian's package lists cannot be downloaded"

# unpack FOLDER ARCHITECTURE PACKAGES...: these and all that they need.
unpack() {
    local target=$1 architecture=$2
    shift 2
    "${apt[@]}" -o "APT::Architecture=$architecture" --download-only install "$@" \
        || absent "$* cannot be downloaded for $architecture"
    rm -rf "$target"
    mkdir -p "$target"
    local package
    for package in "$work"/cache/archives/*.deb; do
        case $package in
            # Of the emulators of all processors, 300 MB, one.
            */qemu-user*) dpkg --fsys-tarfile "$package" | tar -x -C "$target" --wildcards \
                './usr/bin/qemu-aarch64*' ;;
            # Programs of this machine run on its own C library.
            */libc6_*_amd64.deb) ;;
            *) dpkg -x "$package" "$target" ;;
        esac
        rm "$package"
    done
}

unpack "$folder/tools" amd64 g++-aarch64-linux-gnu qemu-user-static
unpack "$folder/system" arm64 python3 libstdc++6
# Since Debian 13 all libraries lie under /usr.
[ -e "$folder/system/lib" ] || ln -s usr/lib "$folder/system/lib"
emulators=("$folder"/tools/usr/bin/qemu-aarch64*)
# QEMU shows files of `system` in the place of the machine's. ONNX Runtime cannot be loaded where
# /proc/cpuinfo describes an x86 processor.
mkdir "$folder/system/proc"
cp "$root/tests/aarch64/cpuinfo_orin.txt" "$folder/system/proc/cpuinfo"

# Wheels for the C library of `system`, whose version manylinux tags are made of.
version=$(cd "$folder/system/usr/bin" && ls python3.* | grep -x 'python3\.[0-9]*')
glibc=$(grep -aoE 'GNU C Library .* release version 2\.[0-9]+' \
    "$folder"/system/lib/aarch64-linux-gnu/libc.so.6 | grep -oE '[0-9]+$')
platforms=()
for minor in $(seq "$glibc" -1 17); do
    platforms+=(--platform "manylinux_2_${minor}_aarch64")
done
site="$folder/python/lib/$version/site-packages"
rm -rf "$folder/python"
mkdir -p "$folder/python/bin"
"$python" -m pip --quiet --disable-pip-version-check install --target "$site" \
    "${platforms[@]}" --platform manylinux2014_aarch64 --only-binary=:all: --no-compile \
    --python-version "${version#python}" --constraint "$root/constraints.txt" \
    msgspec numpy pillow safetensors onnxruntime openvino \
    filelock hypothesis onnx pycocotools pytest \
    || absent "wheels for aarch64 cannot be downloaded"
echo "home = /usr/bin" > "$folder/python/pyvenv.cfg"
# A Cortex-A76 has the instructions of a Jetson Orin's A78AE that libraries choose kernels by.
cat > "$folder/run" <<END
#!/bin/sh
exec "${emulators[0]}" -cpu "\${SAM3RT_AARCH64_CPU:-cortex-a76}" -L "$folder/system" "\$@"
END
cat > "$folder/python/bin/python" <<END
#!/bin/sh
exec "$folder/run" -0 "$folder/python/bin/python" "$folder/system/usr/bin/$version" "\$@"
END
chmod +x "$folder/run" "$folder/python/bin/python"
touch "$folder/.done"
