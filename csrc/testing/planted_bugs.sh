#!/bin/bash
# Plants one bug at a time in a copy of a kernel and demands that the harness notices it.
# Usage: planted_bugs.sh BUILD_FOLDER COMPILER_COMMAND...
set -u
build=$1
shift
compile=("$@")
here=$(cd "$(dirname "$0")" && pwd)
kernel=$here/../cuda/derive_modalities.cu
failures=0

# plant NAME MODE SED_PROGRAM
plant() {
  local name=$1 mode=$2 program=$3 folder=$build/planted/$1
  mkdir -p "$folder"
  sed "$program" "$kernel" >"$folder/kernel.cu"
  if cmp -s "$kernel" "$folder/kernel.cu"; then
    echo "FAILED planted bug $name: there is nothing to change in the kernel any more"
    failures=$((failures + 1))
    return
  fi
  local flags=() link=()
  case $mode in
    asan) flags=(-fsanitize=address,undefined -fno-sanitize-recover=undefined) link=("${flags[@]}") ;;
    race) flags=(-fsanitize=thread -DIKEM_CHECK_RACES) ;;
  esac
  if ! "${compile[@]}" "${flags[@]}" -DKERNEL_SOURCE="\"$folder/kernel.cu\"" -c "$here/test_derive_modalities.cpp" \
    -o "$folder/test.o" || ! g++ "${link[@]}" "$folder/test.o" -o "$folder/test"; then
    echo "FAILED planted bug $name: it does not compile"
    failures=$((failures + 1))
    return
  fi
  if ASAN_OPTIONS=detect_leaks=0 "$folder/test" 2 >"$folder/log" 2>&1; then
    echo "FAILED planted bug $name: not noticed by $mode"
    failures=$((failures + 1))
  else
    echo "noticed by $mode: $name"
  fi
}

plant missing-barrier race '/__syncthreads();/d'
plant write-past-the-end asan '/if (place >= plane) return;/d'
plant read-past-the-last-frame asan 's/const bool has_next = .*/const bool has_next = true;/'
plant wrong-previous-bone plain 's/previous_bones\[number\]/bone_parents[number]/'
plant wrong-second-frame plain 's/t + 2 < shape.num_frames/t + 3 < shape.num_frames/'
exit $((failures != 0))
