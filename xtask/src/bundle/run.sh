#!/usr/bin/env bash
# Runs a program of this bundle on NVIDIA's libraries, as pip or the CUDA toolkit installed them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)

if [ $# -eq 0 ] || [ ! -x "$here/bin/$1" ]; then
  echo "usage: run.sh PROGRAM [ARGUMENT...], where PROGRAM is one of:" >&2
  ls "$here/bin" >&2 || true
  exit 2
fi
program=$1
shift
# Benches measure only when told to, as `cargo bench` tells them.
case $program in bench) set -- --bench "$@" ;; esac

# Every folder where this machine's Python looks for packages and has NVIDIA's.
nvidia=$(python3 - <<'PYTHON' || true
import os, site, sys
folders = list(sys.path)
try:
    folders += site.getsitepackages() + [site.getusersitepackages()]
except AttributeError:
    pass
found = [os.path.join(f, "nvidia") for f in folders if f]
print("\n".join(f for f in dict.fromkeys(found) if os.path.isdir(f)))
PYTHON
)

libraries=$here/mlx/lib
headers=
while read -r folder; do
  [ -n "$folder" ] || continue
  for part in "$folder"/*/; do
    [ ! -d "${part}lib" ] || libraries+=:${part}lib
    if [ -z "$headers" ] && [ -f "${part}include/cuda_fp16.h" ]; then headers=${part%/}; fi
  done
done <<<"$nvidia"
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/nvidia/lib64; do
  [ ! -d "$folder" ] || toolkit=${toolkit:-}:$folder
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}${toolkit:-}

# MLX compiles kernels at run time and looks for CUDA's headers here.
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ]; then export CUDA_HOME=${headers:-/usr/local/cuda}; fi
# With the default, MLX fails where shapes change a lot.
export MLX_CUDA_GRAPH_CACHE_SIZE=${MLX_CUDA_GRAPH_CACHE_SIZE:-20000}

exec "$here/bin/$program" "$@"
