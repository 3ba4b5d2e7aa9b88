#!/bin/bash
# Demands that every kernel of some sources has run.
# Usage: all_launched.sh FILE SOURCE...    FILE holds the names of the kernels that ran, one a line.
set -u
launched=$1
shift
status=0
# A kernel's name is what follows __global__, void and launch bounds, which may hold parentheses of their own.
declaration='__global__\s+(?:(?:void|__launch_bounds__\s*(\((?:[^()]++|(?1))*\)))\s*)+\K\w+(?=\s*\()'
for source in "$@"; do
  text=$(sed 's|//.*||' "$source" | tr '\n' ' ')
  kernels=$(grep -oP "$declaration" <<<"$text")
  if [ "$(wc -w <<<"$kernels")" -ne "$(grep -o '\b__global__\b' <<<"$text" | wc -l)" ]; then
    echo "FAILED $source: cannot tell the names of its kernels: write \`__global__ void NAME(\`, launch bounds before NAME"
    status=1
  fi
  for kernel in $kernels; do
    grep -qxF "$kernel" "$launched" && continue
    echo "FAILED $source: no test launches $kernel"
    status=1
  done
done
[ $status -eq 0 ] && echo "passed every kernel in $# files has run"
exit $status
