#!/usr/bin/env bash
# Puts what building and testing the C++ runtime needs into one folder, without installing anything:
# headers from Debian's packages, and ONNX Runtime's library from its Python wheel.
#
#   fetch_dependencies.sh FOLDER PYTHON
#
# PYTHON is an interpreter that has onnxruntime installed. Who has ONNX Runtime, nlohmann/json and
# stb already (a release of ONNX Runtime, or packages of Debian 13) needs none of this.
set -euo pipefail

folder=$1
python=$2
# The oldest release of Debian that has ONNX Runtime. Its headers also fit later libraries.
suite=trixie
packages=(libonnxruntime-dev nlohmann-json3-dev libstb-dev)

fail() {
    echo "fetch_dependencies.sh: $*" >&2
    echo "Install ${packages[*]} yourself and set ONNXRUNTIME_ROOT and CMAKE_PREFIX_PATH." >&2
    exit 1
}

library=$("$python" - <<'END'
import importlib.util
import pathlib

spec = importlib.util.find_spec("onnxruntime")
found = sorted(pathlib.Path(spec.origin).parent.glob("capi/libonnxruntime.so.*")) if spec else []
print(found[0] if found else "")
END
)
[ -n "$library" ] || fail "$python has no onnxruntime with a shared library"
command -v apt-get > /dev/null && command -v dpkg > /dev/null || fail "this is not a Debian system"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{sources,lists/partial,cache/archives/partial,unpacked}
chmod 755 "$work"

# The machine's own sources, for that release.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
for source in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources
do
    [ -f "$source" ] && grep -q debian "$source" || continue
    sed "s/\b${codename:-none}\b/$suite/g" "$source" > "$work/sources/$(basename "$source")"
done
apt=(apt-get -qq
    -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources"
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
    -o APT::Sandbox::User=)
"${apt[@]}" update || fail "the package lists of Debian $suite cannot be downloaded"
(cd "$work" && "${apt[@]}" download "${packages[@]}") || fail "${packages[*]} cannot be downloaded"
for package in "$work"/*.deb; do
    dpkg -x "$package" "$work/unpacked"
done

rm -rf "$folder"
mkdir -p "$folder"/{include,lib,share/cmake}
cp -r "$work"/unpacked/usr/include/{onnxruntime,nlohmann,stb} "$folder/include"
cp -r "$work/unpacked/usr/share/cmake/nlohmann_json" "$folder/share/cmake"
ln -s "$library" "$folder/lib/libonnxruntime.so"
# The name that programs linked against it look for.
ln -s "$library" "$folder/lib/libonnxruntime.so.1"
