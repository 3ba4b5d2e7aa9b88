#!/bin/bash
# Plants one bug at a time in a copy of a kernel and demands that the harness notices it, in the words of the mode that
# must; as many at once as there are cores. A kernel that no test launches must be noticed, too.
# Usage: planted_bugs.sh BUILD_FOLDER COMPILER_COMMAND...
set -u
build=$1
shift
compile=("$@")
here=$(cd "$(dirname "$0")" && pwd)
failed=$build/planted/failed
mkdir -p "$build/planted"
rm -f "$failed"

fail() {
  echo "FAILED planted bug $1: $2"
  touch "$failed"
}

# plant OPERATOR NAME MODE SED_PROGRAM
plant() {
  while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
  try "$@" &
}

try() {
  local operator=$1 name=$1-$2 mode=$3 program=$4
  local kernel=$here/../cuda/$operator.cu folder=$build/planted/$name
  mkdir -p "$folder"
  sed "$program" "$kernel" >"$folder/kernel.cu"
  if cmp -s "$kernel" "$folder/kernel.cu"; then
    fail "$name" "there is nothing to change in the kernel any more"
    return
  fi
  local flags=() link=() words='^FAILED'
  case $mode in
    asan)
      flags=('-fsanitize=address,undefined' -fno-sanitize-recover=undefined) link=("${flags[@]}")
      words='ERROR: AddressSanitizer|runtime error:'
      ;;
    race)
      flags=(-fsanitize=thread -DIKEM_CHECK_RACES)
      words='cuda_emulator: .*: (race|read of uninitialised)'
      ;;
  esac
  if ! "${compile[@]}" "${flags[@]}" -DKERNEL_SOURCE="\"$folder/kernel.cu\"" -c "$here/test_$operator.cpp" \
    -o "$folder/test.o" || ! g++ "${link[@]}" "$folder/test.o" -o "$folder/test"; then
    fail "$name" "it does not compile"
  elif ASAN_OPTIONS=detect_leaks=0 "$folder/test" 2 >"$folder/log" 2>&1; then
    fail "$name" "not noticed by $mode"
  elif ! grep -qE "$words" "$folder/log"; then
    fail "$name" "noticed, but not by $mode: $(head -n 1 "$folder/log")"
  else
    echo "noticed by $mode: $name"
  fi
}

plant derive_modalities missing-barrier race '/__syncthreads();/d'
plant derive_modalities write-past-the-end asan '/if (place >= plane) return;/d'
plant derive_modalities read-past-the-last-frame asan 's/const bool has_next = .*/const bool has_next = true;/'
plant derive_modalities wrong-previous-bone plain 's/previous_bones\[number\]/bone_parents[number]/'
plant derive_modalities wrong-second-frame plain 's/t + 2 < shape.num_frames/t + 3 < shape.num_frames/'

plant clip_views missing-barrier-before-stores race '/^      write(Modality::kAngularVelocity,/,/^    __syncthreads();/{/__syncthreads/d}'
plant clip_views missing-barrier-after-angles race '/math::norm(math::cross(bone, before))/,/__syncthreads/{/__syncthreads/d}'
plant clip_views store-past-a-region asan 's/from + kPerStore <= count/true/'
plant clip_views sums-of-two-blocks-in-one-place race 's/static_cast<int64_t>(blockIdx.x) \* 2 \* size/0/'
plant clip_views crop-not-mirrored plain 's/math::cropped_frame(t, sample.crop_start, input.crop_padding, input.clip_frames)/(t + sample.crop_start) % input.clip_frames/'
plant clip_views squares-of-unrounded-values plain 's/const float written = widen(rounded);/const float written = coordinates[c];/'

plant draw_views write-past-the-end asan 's/i >= num_draws/i >= num_draws + 1/'
plant draw_views sample-of-another-draw plain 's|indices\[i % num_samples\]|indices[i / num_samples]|'

printf '__global__ void draw_views_kernel();\n__global__ void\n__launch_bounds__((1 + 1) * 2) forgotten_kernel();\n' \
  >"$build/planted/forgotten.cu"
echo draw_views_kernel >"$build/planted/launched"
said=$("$here/all_launched.sh" "$build/planted/launched" "$build/planted/forgotten.cu") &&
  fail forgotten-kernel "a kernel that no test launches is not noticed"
[ "$said" == "FAILED $build/planted/forgotten.cu: no test launches forgotten_kernel" ] ||
  fail forgotten-kernel "said was: $said"
wait
[ ! -e "$failed" ]
