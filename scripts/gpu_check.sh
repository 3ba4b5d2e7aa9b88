#!/usr/bin/env bash
# Checks ikem_fast on a machine with a GPU and writes one results file. Needs no network and installs nothing outside a
# temporary folder.
#
#   scripts/gpu_check.sh [--quick] [--out DIR] [--wheels DIR] [--python PYTHON] [--commit NAME]
#
#   --quick          leave out the tests that need no GPU; benchmarks of small sizes only, without torch.compile
#   --out DIR        folder of the results file gpu_check_GPU_DATE.md; default: benchmarks/results
#   --wheels DIR     wheels of Python packages that this machine lacks
#   --python PYTHON  an interpreter with torch, setuptools, pip and pytest; default: python3
#   --commit NAME    what is being checked, where there is no git to ask
#
# Steps: Python packages; build for this GPU; doctor; tests marked `cuda`; compute-sanitizer (memcheck, racecheck,
# synccheck, initcheck) on planted bugs and on the tests marked `cuda` and not `slow`; the benchmarks on the GPU and a
# report of them; the other tests. A step that fails, or takes longer than its limit, does not keep the others from
# running. Exits with 0 if all passed, 1 if one did not, 2 if there is nothing to check with. docs/developer/gpu_check.md
# says more. The results file is complete after every step, so an interrupted check leaves what there is.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

python=python3
arguments=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --python) python="${2:-}" ;;
        --python=*) python="${1#*=}" ;;
    esac
    shift
done
if ! command -v "$python" >/dev/null; then
    echo "gpu_check: there is no '$python': name an interpreter with --python" >&2
    exit 2
fi
exec "$python" "$here/gpu_check.py" "${arguments[@]}"
