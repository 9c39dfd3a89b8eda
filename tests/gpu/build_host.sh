#!/usr/bin/env bash
# A CUDA build of llama-cpp-python, made on a machine that need not have a card.
#
#   tests/gpu/build_host.sh FOLDER      leaves the wheel in FOLDER
#
# Needs nvcc 13 and a C++ compiler; about 15 minutes on 2 cores. cuBLAS comes from PyPI: it is
# overlaid on the toolkit with symbolic links. HOST (a requirement; default llama-cpp-python==0.3.36),
# CUDA_ARCH (default 90), EXTRA_CMAKE_ARGS and PYTHON can be set.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
host=${HOST:-llama-cpp-python==0.3.36}
python=${PYTHON:-python3}
nvcc=$(command -v "${NVCC:-nvcc}") || { echo "nvcc is not on PATH. Install the CUDA 13 toolkit, or set NVCC." >&2; exit 2; }
toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\),.*/\1/p')

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
overlay=$work/cuda
"$python" -m pip install --quiet --target "$work/cublas" "nvidia-cublas==$release.*"
cublas=$work/cublas/nvidia/cu13

cp -rs "$toolkit" "$overlay"
rm -rf "$overlay/lib64" && ln -s lib "$overlay/lib64"
mkdir -p "$overlay"/{lib,include} "$overlay"/targets/x86_64-linux/{lib,include}
for folder in "$overlay" "$overlay/targets/x86_64-linux"; do
  ln -sf "$cublas"/include/* "$folder/include/"
  for library in "$cublas"/lib/*.so.*; do
    name=$(basename "$library")
    ln -sf "$library" "$folder/lib/$name"
    ln -sf "$library" "$folder/lib/${name%%.so.*}.so"
  done
done

# NO_VMM avoids linking to the driver's library; the target's CPU is unknown, so nothing beyond AVX2.
export CUDACXX=$overlay/bin/nvcc CUDAToolkit_ROOT=$overlay
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON \
-DGGML_F16C=ON -DGGML_BMI2=ON -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-90} -DCUDAToolkit_ROOT=$overlay \
-DCMAKE_CUDA_FLAGS=-I$cublas/include -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF ${EXTRA_CMAKE_ARGS:-}"
"$python" -m pip wheel --no-deps --no-cache-dir --no-binary llama-cpp-python --wheel-dir "$out" "$host"
ls -l "$out"/llama_cpp_python-*.whl
