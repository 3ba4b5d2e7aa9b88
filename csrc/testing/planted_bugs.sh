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
  [ -e "$kernel" ] || kernel=$here/../cuda/$operator.h
  mkdir -p "$folder"
  sed "$program" "$kernel" >"$folder/kernel.cu"
  if cmp -s "$kernel" "$folder/kernel.cu"; then
    fail "$name" "there is nothing to change in the kernel any more"
    return
  fi
  local flags link=() words
  # What compiles fast, as each runs once: no optimisation where it costs more than it gives back, and of the sanitizers
  # that the mode asan has together only the one that must notice.
  case $mode in
    plain)
      flags=(-O0)
      words='^FAILED'
      ;;
    asan)
      flags=(-O0 -fsanitize=address) link=("${flags[@]}")
      words='ERROR: AddressSanitizer'
      ;;
    ubsan)
      flags=(-O0 -fsanitize=undefined -fno-sanitize-recover=undefined) link=("${flags[@]}")
      words='runtime error:'
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
plant derive_modalities missing-barrier-after-bones race '/if (previous_bones\[joint\] == number)/,/__syncthreads();/{/__syncthreads/d}'
plant derive_modalities places-past-the-frame asan 's/const bool is_inside =/const bool is_inside = true ||/'
plant derive_modalities frame-before-the-clip asan 's/if (!wants(modality) || frame < 0 ||/if (!wants(modality) ||/'
plant derive_modalities angle-of-the-frame-before-left-out plain 's/of_angle += /of_angle += T(0) * /'
plant derive_modalities wrong-second-frame plain 's/t + 2 < shape.num_frames/t + 3 < shape.num_frames/'

plant enqueue missing-barrier race '/__syncthreads();/d'
plant enqueue write-past-the-last-row asan 's/written \&\& row < input.size/written/'
plant enqueue wrapped-after-the-columns-here plain 's/column < input.queue_size ? column : column - input.queue_size/column < input.columns ? column : column - input.columns/'
plant enqueue forgotten-first-column plain 's/ - input.first_column;/;/'
plant enqueue pointer-moved-by-every-block race 's/^  Queue\* queue = .*/&\n  if (threadIdx.x == 0) *input.pointer = column;/'
plant momentum_update read-past-the-end asan 's/i < kValuesPerBlock<T> && i < size/i < kValuesPerBlock<T> \&\& i <= size/'
plant momentum_update unaligned-vectors ubsan 's/const bool aligned = .*/const bool aligned = true;/'
plant momentum_update next-pair plain 's/table.first_block\[middle\] <= static_cast<int>(blockIdx.x)/table.first_block[middle] < static_cast<int>(blockIdx.x)/'

plant queue_tiles columns-past-the-end plain 's/aligned \&\& column + 4 <= queue_size/aligned \&\& column < queue_size/'
plant queue_tiles wrong-segment plain 's|batch \* shape.segments + column / shape.segment_size|batch + column / shape.segment_size|'
plant queue_tiles unwritten-sums race 's/if (!added.first) sum = /sum = /'
plant queue_log_sum_exp maxima-overwritten race '/IKEM_SHARED(float, warp_sums/d;s/(sum, warp_sums,/(sum, warp_maxima,/'
plant queue_log_sum_exp read-past-a-row asan 's/if (column >= width) continue;/if (column > width) continue;/'
plant queue_log_sum_exp positive-left-out plain 's/is_first ? 1.0f : tile.sum/is_first ? 0.0f : tile.sum/'
plant queue_log_sum_exp maximum-not-rounded plain 's/fmaxf(maximum_before, __fmul_rn(largest, tile.scale))/fmaxf(maximum_before, float(double(largest) * tile.scale * (1 - 1e-7)))/'
plant pair_log_sum_exp missing-barrier-after-stage race '/load_stage(stage, stage_columns, tile, row, begin, count);/{n;/__syncthreads/d}'
plant pair_log_sum_exp missing-barrier-before-merge race '/^  __syncthreads();$/d'
plant pair_log_sum_exp mined-before-the-look race '/^  __syncwarp();$/d'
plant pair_log_sum_exp stage-past-a-row asan 's|const int fours = (count + 3) / 4;|const int fours = count / 4 + 3;|'
plant pair_log_sum_exp neighbour-past-the-list asan 's/if (i + low >= topk) continue;//'
plant pair_log_sum_exp later-of-equal-slots plain 's/(value == largest \&\& is_earlier)/(value == largest \&\& !is_earlier)/'
plant pair_log_sum_exp later-of-equal-neighbours plain 's/value_before(middle) >= value_of(here)/value_before(middle) > value_of(here)/'
plant pair_log_sum_exp gradient-of-the-wrong-pair plain 's/: out < partner ? pair_of(tile.num_x, out, partner)/: out < partner ? pair_of(tile.num_x, partner, out)/'

plant tile_product wrong-half-of-the-rows plain 's|lane / 16 \* 8) \* stride + lane / 8 % 2 \* 8|lane / 8 % 2 * 8) * stride + lane / 16 * 8|'
plant tile_product past-the-depth asan 's/for (int k = 0; k < depth; k += 4)/for (int k = 0; k <= depth; k += 4)/'
plant channel_statistics missing-barrier race '/^  __syncthreads();$/d'
plant channel_statistics read-past-the-channels asan 's/const bool is_inside = .*/const bool is_inside = true;/'
plant channel_statistics unweighted-means plain 's|share = other_count / sum;|share = 0.5;|'

plant partial_sums missing-barrier race '/^  __syncthreads();$/d'
plant partial_sums read-past-the-columns asan 's/const bool is_inside = .*/const bool is_inside = true;/'
plant temporal_convolution missing-barrier-before-tile race '/if (!kWide \&\& pass == 0) {/{n;d}'
plant temporal_convolution missing-barrier-before-exchange race '/for (int group = 1; group < tiling.row_groups; ++group) {/{n;d}'
plant temporal_convolution rows-past-the-tile asan 's/if (row >= num_rows || channel >= channels) continue;/if (channel >= channels) continue;/'
plant temporal_convolution phases-mixed plain 's/tap % shape.stride \* tile.phase_frames/tap % shape.stride/'
plant temporal_convolution taps-at-the-edge-left-out plain 's/tile.first + last_u \* step + from < 0/tile.first + first_u * step + from < 0/'
plant temporal_convolution gradient-where-nothing-passed plain 's/activate\[i\].before(before) > 0.0f/true/'
plant spectral_transform missing-barrier race '/^  __syncthreads();$/d'
plant spectral_transform read-past-the-last-frame asan 's/frame >= 0 \&\& frame < shape.frames;/frame >= 0;/'
plant spectral_transform window-one-frame-late plain 's/tile \* shape.tile_frames - shape.lead/& + 1/'
plant spectral_transform imaginary-part-with-the-wrong-sign plain 's/narrow<T>(-imaginary)/narrow<T>(imaginary)/'
plant spectral_transform means-without-their-counts plain 's/const float share = other_count .*,/const float share = 0.5f,/'
plant graph_convolution missing-barrier-before-product race '/^                count);$/{n;/__syncthreads/d}'
plant graph_convolution write-past-the-columns asan 's/if (column + k < columns) to\[k\] = from\[k\];/to[k] = from[k];/'
plant graph_convolution statistics-of-empty-rows plain 's/moments.add(sums, rows - warp_row)/moments.add(sums, 16 * kM)/'
plant graph_convolution_backward missing-barrier-after-gathering race '/plan.frames.frames_per_tile, count);/{n;/__syncthreads/d}'
plant graph_convolution_backward write-past-the-last-frame asan 's/const int covered = .*/const int covered = shape.stride;/'
plant graph_convolution_backward variance-without-the-mean plain 's/of_mean - of_variance \* gradients.mean\[place\]/of_mean/'
plant graph_convolution_backward chunks-not-swapped plain 's/chunk_end - chunk_begin == 2) {/chunk_end - chunk_begin == 3) {/'

plant clip_views missing-barrier-before-stores race '/^      write(Modality::kAngularVelocity,/,/^    __syncthreads();/{/__syncthreads/d}'
plant clip_views missing-barrier-after-angles race '/math::norm(math::cross(bone, before))/,/__syncthreads/{/__syncthreads/d}'
plant clip_views store-past-a-region asan 's/from + kPerStore <= count/true/'
plant clip_views sums-of-two-blocks-in-one-place race 's/static_cast<int64_t>(blockIdx.x) \* 2 \* size/0/'
plant clip_views crop-not-mirrored plain 's/math::cropped_frame(t, sample.crop_start, input.crop_padding, input.clip_frames)/(t + sample.crop_start) % input.clip_frames/'
plant clip_views squares-of-unrounded-values plain 's/const float written = widen(rounded);/const float written = coordinates[c];/'

plant draw_views write-past-the-end asan 's/i >= num_draws/i >= num_draws + 1/'
plant draw_views epoch-past-the-end asan 's/\*epoch)/epoch[1])/'
plant draw_views sample-of-another-draw plain 's|indices\[i % num_samples\]|indices[i / num_samples]|'

plant residual_activation missing-barrier-between-copies race 's/^    __syncthreads();$//'
plant residual_activation missing-barrier-between-warps race 's/^  __syncthreads();$//'
plant residual_activation sums-of-two-blocks-in-one-place race 's/(channels.stream \* plan.chunks + blockIdx.x) \* kSums/channels.stream * plan.chunks * kSums/'
plant residual_activation rows-past-the-last asan 's/? first + plan.rows_of_block : input.rows/? first + plan.rows_of_block : first + plan.rows_of_block/'
plant residual_activation channels-past-the-last asan 's/copy < plan.copies \&\& channel < input.channels/copy < plan.copies/'
plant residual_activation unaligned-vectors ubsan 's/reinterpret_cast<uintptr_t>(pointer) % 16 == 0/pointer == pointer/'
plant residual_activation mask-of-another-stream plain 's/static_cast<uint32_t>(stream), element/0u, element/'
plant residual_activation odd-copy-left-out plain 's|const int half = (count + 1) / 2;|const int half = count / 2;|'
plant batch_norm_coefficients write-past-the-end asan 's/i >= input.count/i > input.count/'
plant batch_norm_coefficients weight-for-bias plain 's/input.weight\[i\], input.bias\[i\]/input.bias[i], input.weight[i]/'

printf '__global__ void draw_views_kernel();\n__global__ void\n__launch_bounds__((1 + 1) * 2) forgotten_kernel();\n' \
  >"$build/planted/forgotten.cu"
echo draw_views_kernel >"$build/planted/launched"
said=$("$here/all_launched.sh" "$build/planted/launched" "$build/planted/forgotten.cu") &&
  fail forgotten-kernel "a kernel that no test launches is not noticed"
[ "$said" == "FAILED $build/planted/forgotten.cu: no test launches forgotten_kernel" ] ||
  fail forgotten-kernel "said was: $said"
wait
[ ! -e "$failed" ]
