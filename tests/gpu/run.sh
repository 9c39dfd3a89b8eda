#!/usr/bin/env bash
# Identity and speed on a CUDA build of the host.
#
#   tests/gpu/run.sh [--attach-only] [--site FOLDER] [--pack FILE.tar.xz] [HOST.whl] [-- MODEL.gguf...]
#
# HOST.whl       a CUDA wheel of llama-cpp-python; without it one is built (see build_host.sh)
# --site FOLDER  where the host, llama-mtp and what they need are put together (default build/gpu/site);
#                a folder that has them already is used as it is, so it can be carried to a machine
#                without a network or a compiler
# --pack FILE    make the site, pack it for carrying, and stop
# --attach-only  on a machine without a card: the plugin attaches to the CUDA build and the tokens are
#                right with everything on the CPU
# MODEL.gguf     models with a NextN head to use besides the constructed ones
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
site=$repo/build/gpu/site
pack=
wheel=
mode=()
while (($#)); do
  case $1 in
    --attach-only) mode=(--attach-only) ;;
    --site) mkdir -p "$2" && site=$(cd "$2" && pwd) && shift ;;
    --pack) pack=$2 && shift ;;
    --) shift && break ;;
    *.whl) wheel=$1 ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
  esac
  shift
done

if [[ ! -d $site/llama_cpp || -n $wheel ]]; then
  if [[ -z $wheel ]]; then
    "$here/build_host.sh" "$repo/build/gpu"
    wheel=$(ls -t "$repo"/build/gpu/llama_cpp_python-*.whl | head -1)
  fi
  rm -rf "$site"
  "$python" -m pip install --quiet --no-warn-conflicts --target "$site" "$wheel" "$repo"
  # A wheel cannot hold links, so each library is in it under three names.
  rm -rf "$site"/{bin,lib,include,share}
  (cd "$site/llama_cpp/lib" && for long in *.so.*.*.*; do
    short=${long%.so.*}.so
    for name in "$short" "$short".*; do
      [[ $name == "$long" ]] || { cmp -s "$name" "$long" && ln -sf "$long" "$name"; }
    done
  done)
fi
if [[ -n $pack ]]; then
  # numpy is large, and wherever there is a GPU it is there already.
  tar -C "$site" --exclude='./numpy*' -cJf "$pack" . && ls -l "$pack"
  exit
fi

# cuBLAS and the CUDA runtime, from wherever this machine has them.
libraries=$("$python" - <<'PY'
import glob, site, sys
roots = [*sys.path, *site.getsitepackages()]
found = [p for root in dict.fromkeys(roots) for p in glob.glob(f"{root}/nvidia/*/lib")]
print(":".join(found + glob.glob("/usr/local/cuda*/lib64")))
PY
)
has_cublas() { find ${1//:/ } -maxdepth 1 -name 'libcublas.so.*' 2>/dev/null | grep -q .; }
if ! has_cublas "$libraries"; then  # a toolkit without cuBLAS, as on a machine that only builds
  cublas=$repo/build/gpu/cublas
  [[ -d $cublas ]] || "$python" -m pip install --quiet --target "$cublas" 'nvidia-cublas>=13,<14'
  libraries=$libraries:$(echo "$cublas"/nvidia/*/lib | tr ' ' :)
fi
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$site
exec "$python" "$here/check.py" "${mode[@]}" "$@"
