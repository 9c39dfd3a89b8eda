#!/usr/bin/env bash
# Identity and speed on a CUDA build of the host, against llama-server on the same libraries.
#
#   tests/gpu/run.sh [options] [HOST.whl] [-- MODEL.gguf...]
#
# HOST.whl       a CUDA wheel of llama-cpp-python; without it one is built (see build_host.sh)
# --site FOLDER  where the host, llama-mtp, llama-server and what they need are put together (default
#                build/gpu/site); a folder that has them already is used as it is, so it can be carried
#                to a machine without a network or a compiler
# --pack FILE    make the site, pack it for carrying (.tar.xz), and stop
# --small FILE   a small model with a NextN head, to make the large one of; packed with the site.
#                Default: the demo model where SmolLM2 is installed, else a constructed hybrid
# --size GB      how large the large one gets (default 8); one of that size that is there is used again
# --parts A,B    what to run, where time is short: check (identity), bench (nine classes, every depth),
#                peers, traffic (where a round's time goes). Default: all four
# --attach-only  on a machine without a card: everything is done on the CPU, and little of it; the
#                plugin attaches to the CUDA build and the tokens are right. Say --size as well
# MODEL.gguf     models with a NextN head to use besides the constructed ones
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
site=$repo/build/gpu/site
pack=
wheel=
small=
size=8
parts=check,bench,peers,traffic
mode=()
layers=-1
while (($#)); do
  case $1 in
    --attach-only) mode=(--attach-only) && layers=0 ;;
    --small) small=$2 && shift ;;
    --size) size=$2 && shift ;;
    --parts) parts=$2 && shift ;;
    --site) mkdir -p "$2" && site=$(cd "$2" && pwd) && shift ;;
    --pack) pack=$2 && shift ;;
    --) shift && break ;;
    *.whl) wheel=$1 ;;
    *) sed -n '2,22s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
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
if [[ ! -x $site/llama_server/llama-server ]]; then
  "$here/build_server.sh" "$site" || echo "There will be no llama-server to compare with." >&2
fi
[[ -z $small ]] || cp "$small" "$site/small.gguf"
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
if [[ -e $site/llama_cpp/lib/libggml-cuda.so ]] && ! has_cublas "$libraries"; then  # a toolkit without cuBLAS, as on a machine that only builds
  cublas=$repo/build/gpu/cublas
  [[ -d $cublas ]] || "$python" -m pip install --quiet --target "$cublas" 'nvidia-cublas>=13,<14'
  libraries=$libraries:$(echo "$cublas"/nvidia/*/lib | tr ' ' :)
fi
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$site
status=0
part() { [[ ,$parts, == *,$1,* ]]; }
if part check; then
  "$python" "$here/check.py" "${mode[@]}" "$@" || status=$?
fi
[[ $parts != check ]] || exit "$status"

mkdir -p "$repo/build/gpu"
big=$repo/build/gpu/big-$size.gguf
small=$site/small.gguf
if [[ ! -f $big && ! -f $small ]]; then
  small=$repo/build/gpu/small.gguf
  PYTHONPATH=$site:$repo/tests "$python" - "$small" <<'PY'
import sys
from pathlib import Path
from llama_mtp.demo.model import demo_model
from llama_mtp.errors import LlamaMtpError
import models
file = Path(sys.argv[1])
file.unlink(missing_ok=True)
try:
    demo_model(weight_type="BF16", file=file)
except LlamaMtpError as why:
    print(f"a constructed hybrid instead of the demo model: {why}")
    models.build(file, "qwen35")
PY
fi
[[ -f $big ]] || "$python" "$repo/examples/inflate/inflate.py" "$small" "$big" --size "$size"

long=(--repeats 3 --minutes 8)
sweep=(--repeats 2)
count=()
if ((${#mode[@]})); then
  long=(--threads 1 --repeats 1 --classes code_python,qa_factual --max-tokens 24)
  sweep=("${long[@]}" --depths 2,adaptive)
  count=(--threads 1 --tokens 24)
fi
if part bench; then
  "$python" -m llama_mtp bench "$big" --n-gpu-layers "$layers" "${sweep[@]}" || status=$?
fi
if part peers; then
  "$python" "$repo/tests/bench/peers.py" "$big" --gpu-layers "$layers" "${long[@]}" \
    --peers stock,ours,ours-default,llama-server-plain,llama-server,llama-server-default \
    --llama-server "$site/llama_server/llama-server" || status=$?
fi
if part traffic; then
  traffic=("$python" "$here/traffic.py" "$big" --gpu-layers "$layers" "${count[@]}")
  "${traffic[@]}" || status=$?
  if command -v nsys >/dev/null; then
    profile=$repo/build/gpu/rounds
    nsys profile --trace cuda --force-overwrite true --output "$profile" "${traffic[@]}" --times-only &&
      nsys stats --report cuda_api_sum,cuda_gpu_mem_time_sum,cuda_gpu_mem_size_sum "$profile.nsys-rep" || status=$?
  else
    echo "nsys is not here: no profile beside the counts."
  fi
fi
exit "$status"
