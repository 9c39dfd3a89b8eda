#!/usr/bin/env bash
# llama-server from the host's own source, on the host's own libraries: the peer to compare with.
#
#   tests/gpu/build_server.sh SITE      leaves SITE/llama_server/llama-server
#
# SITE has llama_cpp (see run.sh); whatever backends it was built with, the server then has too, with
# the same flags and without a second build of them. Needs cmake and a C++ compiler; some 70 files,
# several minutes on 2 cores. The source is that of HOST (default llama-cpp-python==0.3.36) from PyPI, or the sdist that
# SDIST names, packed or unpacked; PYTHON can be set, and BUILD to a folder to go on in.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
site=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build=${BUILD:-$work/build}
sdist=${SDIST:-}
if [[ -z $sdist ]]; then
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary :all: --dest "$work" "${HOST:-llama-cpp-python==0.3.36}"
  sdist=$(ls "$work"/llama_cpp_python-*.tar.gz)
fi
if [[ -f $sdist ]]; then
  mkdir "$work/source" && tar -C "$work/source" --strip-components 1 -xf "$sdist"
  sdist=$work/source
fi

cmake -S "$here/server" -B "$build" -DLLAMA="$sdist/vendor/llama.cpp" \
  -DLIBRARIES="$site/llama_cpp/lib" -DLLAMA_SUBPROCESS=ON >"$work/cmake.log" || { cat "$work/cmake.log" >&2; exit 1; }
cmake --build "$build" --target llama-server --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
mkdir -p "$site/llama_server"
cmake --install "$build" --component server --strip --prefix "$site"
ls -l "$site/llama_server/llama-server"
