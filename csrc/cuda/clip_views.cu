#include "cuda/clip_views.h"

#include "cuda/kernel.h"
#include "math/augmentation.h"

namespace ikem_fast::cuda {

namespace {

using Vector = math::Vector3<float>;

struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kRowsPerThread = 2;    // of a tile: a row is one person in one frame
  static constexpr int kTilesPerBlock = 3;    // a block's sums leave it once
  static constexpr int kStoreBytes = 16;      // of a store to the views
  static constexpr int kReduceColumns = 32;   // of the second stage of the sums
  static constexpr int kReduceParts = 8;
};

// A tile is some frames of some persons of one view of one sample. A thread stays with one joint and goes through rows,
// so that sums over rows stay in its registers.
struct Tiling {
  int persons;           // of a tile: 2, so that one load brings a joint of both, or 1
  int frames;            // of a tile
  int tiles_per_person;  // tiles of all frames
  int num_tiles;         // of a sample
  int blocks;            // of a sample
  int region_bytes;      // a tile's values of one person and modality, with room to share the views' alignment
  int scaled_offset;     // shared memory, in floats: coordinates come first, then ...
  int bones_offset;
  int angles_offset;
  int values_offset;
  int shared_bytes;
};

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

bool pairs_fit(const ClipViewsInput& input) {
  const size_t pair_bytes = input.clip_element == StoredElement::kFloat ? 8 : 4;
  return input.num_persons % 2 == 0 && input.clip_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(input.clips) % pair_bytes == 0;
}

Tiling make_tiling(const ClipViewsInput& input, int view_bytes) {
  Tiling tiling{};
  tiling.persons = pairs_fit(input) ? 2 : 1;
  const int rows_per_pass = Traits::kThreads / input.num_joints;
  const int most_frames = Traits::kRowsPerThread * rows_per_pass / tiling.persons;
  tiling.frames = divide_up(input.clip_frames, divide_up(input.clip_frames, most_frames < 1 ? 1 : most_frames));
  tiling.tiles_per_person = divide_up(input.clip_frames, tiling.frames);
  tiling.num_tiles = tiling.tiles_per_person * (input.num_persons / tiling.persons);
  tiling.blocks = divide_up(tiling.num_tiles, Traits::kTilesPerBlock);
  const int frame_size = tiling.persons * input.num_joints;
  const int values = tiling.frames * input.num_joints * 3 * view_bytes;
  tiling.region_bytes = divide_up(values, Traits::kStoreBytes) * Traits::kStoreBytes + Traits::kStoreBytes;
  // Frames around the tile: two after it are derived from, and one on either side scales motion.
  tiling.scaled_offset = 3 * (tiling.frames + 4) * frame_size;
  tiling.bones_offset = tiling.scaled_offset + (input.motion_scale ? 3 * (tiling.frames + 2) * frame_size : 0);
  tiling.angles_offset = tiling.bones_offset + 3 * (tiling.frames + 1) * frame_size;
  tiling.values_offset = divide_up(tiling.angles_offset + (tiling.frames + 1) * frame_size, 4) * 4;
  const int values_bytes = input.num_outputs * tiling.persons * tiling.region_bytes;
  const int sums_bytes = input.num_outputs * 3 * Traits::kThreads * static_cast<int>(sizeof(float));
  tiling.shared_bytes =
      tiling.values_offset * static_cast<int>(sizeof(float)) + (values_bytes > sums_bytes ? values_bytes : sums_bytes);
  return tiling;
}

// What all threads of a block need of their sample.
struct Sample {
  math::Matrix3<float> matrix;
  int64_t clip_offset;
  int64_t crop_start;
  float time_scale;
  float motion_scale;
  bool has_matrix;
  bool is_valid;
};

// Field by field: the emulator does not see copies of whole structures.
__device__ void load_sample(const ClipViewsInput& input, int view, int number, Sample& sample) {
  const int64_t drawn = static_cast<int64_t>(view) * input.num_samples + number;
  const int64_t clip = input.indices ? input.indices[number] : number;
  const int64_t crop_start = input.crop_start ? input.crop_start[drawn] : 0;
  const bool is_valid =
      clip >= 0 && clip < input.num_clips && crop_start >= 0 && crop_start <= 2 * input.crop_padding;
  const math::Matrix3<float> matrix = math::view_matrix(input.shear ? input.shear + 6 * drawn : nullptr,
                                                        input.camera_scale ? input.camera_scale + drawn : nullptr,
                                                        input.camera_angles ? input.camera_angles + 3 * drawn : nullptr);
  for (int i = 0; i < 9; ++i) sample.matrix.rows[i / 3][i % 3] = matrix.rows[i / 3][i % 3];
  sample.has_matrix = input.shear || input.camera_scale || input.camera_angles;
  sample.is_valid = is_valid;
  sample.crop_start = crop_start;
  sample.clip_offset = is_valid ? clip * input.clip_stride : 0;
  sample.time_scale = is_valid ? math::time_scale<float>(input.num_frames[clip]) : 0.0f;
  sample.motion_scale = input.motion_scale ? input.motion_scale[drawn] : 0.0f;
}

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

// kPersons neighbouring values as float, in one load.
template <int kPersons, typename Stored>
__device__ void load_values(const Stored* stored, float (&values)[2]) {
  if constexpr (kPersons == 2) {
    const Pair<Stored> pair = *reinterpret_cast<const Pair<Stored>*>(stored);
    values[0] = widen(pair.values[0]);
    values[1] = widen(pair.values[1]);
  } else {
    values[0] = widen(*stored);
  }
}

template <int kPersons>
__device__ void load_values(const ClipViewsInput& input, int64_t offset, float (&values)[2]) {
  switch (input.clip_element) {
    case StoredElement::kFloat:
      return load_values<kPersons>(static_cast<const float*>(input.clips) + offset, values);
    case StoredElement::kHalf:
      return load_values<kPersons>(static_cast<const __half*>(input.clips) + offset, values);
    default:
      return load_values<kPersons>(static_cast<const __nv_bfloat16*>(input.clips) + offset, values);
  }
}

__device__ void round_to(float& rounded, float value) { rounded = value; }
__device__ void round_to(__half& rounded, float value) { rounded = __float2half_rn(value); }
__device__ void round_to(__nv_bfloat16& rounded, float value) { rounded = __float2bfloat16_rn(value); }

// Vectors in shared memory: three planes of coordinates by frame and lane, a person's joints together.
struct Planes {
  float* values;
  int plane;
  int frame_size;

  __device__ Vector load(int frame, int lane) const {
    const float* const x = values + frame * frame_size + lane;
    return {x[0], x[plane], x[2 * plane]};
  }
  __device__ void store(int frame, int lane, const Vector& vector) const {
    float* const x = values + frame * frame_size + lane;
    x[0] = vector.x;
    x[plane] = vector.y;
    x[2 * plane] = vector.z;
  }
};

// Reads a thread's joint in `count` frames from `begin` on, cropped and with the matrix applied, one row after another.
template <int kPersons>
__device__ void load_frames(const ClipViewsInput& input, const Sample& sample, int first_person, int begin, int count,
                            int joint, int first_row, int row_step, const Planes& planes) {
  const int64_t frame_size = static_cast<int64_t>(input.num_joints) * input.num_persons;
  const int64_t plane = frame_size * input.clip_frames;
  for (int row = first_row; row < count; row += row_step) {
    const int t = begin + row;
    const int64_t stored =
        input.crop_start ? math::cropped_frame(t, sample.crop_start, input.crop_padding, input.clip_frames) : t;
    const int64_t offset =
        sample.clip_offset + stored * frame_size + static_cast<int64_t>(joint) * input.num_persons + first_person;
    const float nan = __int_as_float(0x7fc00000);
    float coordinates[3][2] = {{nan, nan}, {nan, nan}, {nan, nan}};
    if (sample.is_valid) {
      for (int c = 0; c < 3; ++c) load_values<kPersons>(input, offset + c * plane, coordinates[c]);
    }
    for (int person = 0; person < kPersons; ++person) {
      Vector vector{coordinates[0][person], coordinates[1][person], coordinates[2][person]};
      if (sample.has_matrix) {
        vector = {math::row_product(sample.matrix.rows[0], vector), math::row_product(sample.matrix.rows[1], vector),
                  math::row_product(sample.matrix.rows[2], vector)};
      }
      planes.store(row, person * input.num_joints + joint, vector);
    }
  }
}

// One pass: coordinates go to shared memory, from there through bones and angles to values in the views' layout, and
// from those to the views in stores of 16 bytes. Sums of each block go to partial_sums (blocks, 2, S, V, 3).
template <typename View>
__global__ void __launch_bounds__(Traits::kThreads)
    clip_views_kernel(View* __restrict__ views, double* __restrict__ partial_sums, ClipViewsInput input,
                      Skeleton skeleton, OutputRows outputs, Tiling tiling) {
  IKEM_SHARED(uint8_t, bone_parents, [Skeleton::kMaxJoints]);
  IKEM_SHARED(uint8_t, previous_bones, [Skeleton::kMaxJoints]);
  IKEM_SHARED(Sample, shared_sample, [1]);
  IKEM_DYNAMIC_SHARED(float, memory);

  const int block = blockIdx.x % tiling.blocks;
  const int number = blockIdx.x / tiling.blocks % input.num_samples;
  const int view = blockIdx.x / tiling.blocks / input.num_samples;
  for (int joint = threadIdx.x; joint < input.num_joints; joint += Traits::kThreads) {
    bone_parents[joint] = skeleton.bone_parents[joint];
    previous_bones[joint] = skeleton.previous_bones[joint];
  }
  if (threadIdx.x == 0) load_sample(input, view, number, shared_sample[0]);
  __syncthreads();
  const Sample& sample = shared_sample[0];

  const int num_joints = input.num_joints;
  const int row_step = Traits::kThreads / num_joints;
  const int joint = threadIdx.x % num_joints;
  // Threads that are left over have no rows.
  const int first_row = static_cast<int>(threadIdx.x) / num_joints < row_step ? threadIdx.x / num_joints : INT32_MAX / 2;
  const int parent = bone_parents[joint];
  const int previous = previous_bones[joint];
  const int frame_size = tiling.persons * num_joints;
  const int row_size = 3 * num_joints;
  const Planes loaded{memory, (tiling.frames + 4) * frame_size, frame_size};
  const Planes scaled{memory + tiling.scaled_offset, (tiling.frames + 2) * frame_size, frame_size};
  const Planes bones{memory + tiling.bones_offset, (tiling.frames + 1) * frame_size, frame_size};
  float* const angles = memory + tiling.angles_offset;
  unsigned char* const values = reinterpret_cast<unsigned char*>(memory + tiling.values_offset);

  const auto output = [&](Modality modality) { return static_cast<int>(outputs.rows[static_cast<int>(modality)]); };
  const bool wants_angles = output(Modality::kAngularVelocity) >= 0;
  const bool wants_axes = wants_angles || output(Modality::kRotationAxis) >= 0;
  const bool wants_bones = wants_axes || output(Modality::kBone) >= 0;

  float sums[kNumModalities][3] = {};
  float squares[kNumModalities][3] = {};

  const int last_tile = min(tiling.num_tiles, (block + 1) * Traits::kTilesPerBlock);
  for (int tile = block * Traits::kTilesPerBlock; tile < last_tile; ++tile) {
    const int first_person = tile / tiling.tiles_per_person * tiling.persons;
    const int first = tile % tiling.tiles_per_person * tiling.frames;
    const int frames = min(tiling.frames, input.clip_frames - first);
    const int needed_end = min(input.clip_frames, first + frames + 2);
    const int begin = input.motion_scale && first > 0 ? first - 1 : first;
    const int end = input.motion_scale ? min(input.clip_frames, needed_end + 1) : needed_end;
    if (tiling.persons == 2) {
      load_frames<2>(input, sample, first_person, begin, end - begin, joint, first_row, row_step, loaded);
    } else {
      load_frames<1>(input, sample, first_person, begin, end - begin, joint, first_row, row_step, loaded);
    }
    __syncthreads();

    // From here on a row is a person in a frame, the frames of the first person first.
    if (input.motion_scale) {
      for (int row = first_row; row < (needed_end - first) * tiling.persons; row += row_step) {
        const int frame = row % (needed_end - first);
        const int lane = row / (needed_end - first) * num_joints + joint;
        const int t = first + frame;
        const int place = t - begin;
        Vector now = loaded.load(place, lane);
        if (t > 0 && t + 1 < input.clip_frames) {
          const Vector before = loaded.load(place - 1, lane), after = loaded.load(place + 1, lane);
          now = {math::motion_scaled(before.x, now.x, after.x, sample.motion_scale),
                 math::motion_scaled(before.y, now.y, after.y, sample.motion_scale),
                 math::motion_scaled(before.z, now.z, after.z, sample.motion_scale)};
        }
        scaled.store(frame, lane, now);
      }
      __syncthreads();
    }
    const Planes joints = input.motion_scale ? scaled : loaded;

    // Angular velocity needs the bones and angles of the frame after the tile, too.
    const int bone_frames = min(frames + 1, input.clip_frames - first);
    if (wants_bones) {
      for (int row = first_row; row < bone_frames * tiling.persons; row += row_step) {
        const int frame = row % bone_frames;
        const int person = row / bone_frames * num_joints;
        const auto difference = [&](int child, int of) {
          return joints.load(frame, person + child) - joints.load(frame, person + of);
        };
        Vector bone = difference(joint, parent);
        if (joint == skeleton.root && skeleton.has_chest_normal) {
          const auto chest = [&](int i) {
            return difference(skeleton.chest_normal[i], bone_parents[skeleton.chest_normal[i]]);
          };
          bone = math::chest_normal(chest(0), chest(1), chest(2));
        }
        bones.store(frame, person + joint, bone);
      }
      __syncthreads();
    }
    if (wants_angles) {
      for (int row = first_row; row < bone_frames * tiling.persons; row += row_step) {
        const int frame = row % bone_frames;
        const int person = row / bone_frames * num_joints;
        const Vector bone = bones.load(frame, person + joint);
        const Vector before = bones.load(frame, person + previous);
        angles[frame * frame_size + person + joint] =
            math::angle(bone, before, math::norm(math::cross(bone, before)));
      }
      __syncthreads();
    }

    // The first value of a region in the views; in shared memory it lies as far behind a multiple of 16 bytes as there.
    const auto region_start = [&](int row, int person) {
      const int64_t sequence = static_cast<int64_t>(number) * input.num_persons + first_person + person;
      const int64_t num_sequences = static_cast<int64_t>(input.num_samples) * input.num_persons;
      const int64_t modality = static_cast<int64_t>(view) * input.num_outputs + row;
      return views + ((modality * num_sequences + sequence) * input.clip_frames + first) * row_size;
    };
    const auto shift = [](const View* start) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(start) % Traits::kStoreBytes / sizeof(View));
    };
    for (int row = first_row; row < frames * tiling.persons; row += row_step) {
      const int frame = row % frames;
      const int person = row / frames;
      const int lane = person * num_joints + joint;
      const bool has_next = first + frame + 1 < input.clip_frames;
      const bool has_two_more = first + frame + 2 < input.clip_frames;
      const Vector zero{0.0f, 0.0f, 0.0f};
      const auto write = [&](Modality modality, const Vector& vector) {
        const int number_of = static_cast<int>(modality);
        const int place = output(modality);
        View* const region =
            reinterpret_cast<View*>(values + (place * tiling.persons + person) * tiling.region_bytes);
        View* const out = region + shift(region_start(place, person)) + frame * row_size + 3 * joint;
        const float coordinates[3] = {vector.x, vector.y, vector.z};
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          View rounded;
          round_to(rounded, coordinates[c]);
          out[c] = rounded;
          const float written = widen(rounded);
          sums[number_of][c] += written;
          squares[number_of][c] += written * written;
        }
      };

      const Vector now = joints.load(frame, lane);
      if (output(Modality::kJoint) >= 0) write(Modality::kJoint, now);
      if (output(Modality::kMotion) >= 0 || output(Modality::kAcceleration) >= 0) {
        const Vector next = has_next ? joints.load(frame + 1, lane) : now;
        const Vector after = has_two_more ? joints.load(frame + 2, lane) : next;
        const float r = sample.time_scale;
        if (output(Modality::kMotion) >= 0) {
          write(Modality::kMotion, has_next ? Vector{math::motion(now.x, next.x, r), math::motion(now.y, next.y, r),
                                                     math::motion(now.z, next.z, r)}
                                            : zero);
        }
        if (output(Modality::kAcceleration) >= 0) {
          write(Modality::kAcceleration, has_two_more ? Vector{math::acceleration(now.x, next.x, after.x, r),
                                                               math::acceleration(now.y, next.y, after.y, r),
                                                               math::acceleration(now.z, next.z, after.z, r)}
                                                      : zero);
        }
      }
      if (!wants_bones) continue;
      const Vector bone = bones.load(frame, lane);
      if (output(Modality::kBone) >= 0) write(Modality::kBone, bone);
      if (!wants_axes) continue;
      const Vector axis = math::cross(bone, bones.load(frame, person * num_joints + previous));
      if (output(Modality::kRotationAxis) >= 0) write(Modality::kRotationAxis, axis);
      if (!wants_angles) continue;
      const int angle = frame * frame_size + lane;
      write(Modality::kAngularVelocity,
            has_next ? math::angular_velocity(angles[angle], angles[angle + frame_size], axis, math::norm(axis),
                                              sample.time_scale)
                     : zero);
    }
    __syncthreads();

    constexpr int kPerStore = Traits::kStoreBytes / static_cast<int>(sizeof(View));
    const int count = frames * row_size;
    const int stores = divide_up(count, kPerStore) + 1;  // of a region, wherever it begins
    for (int i = threadIdx.x; i < stores * input.num_outputs * tiling.persons; i += Traits::kThreads) {
      const int region = i / stores;
      View* const start = region_start(region / tiling.persons, region % tiling.persons);
      const int from = i % stores * kPerStore - shift(start);
      const View* const source =
          reinterpret_cast<const View*>(values + region * tiling.region_bytes) + i % stores * kPerStore;
      if (from >= 0 && from + kPerStore <= count) {
        *reinterpret_cast<uint4*>(start + from) = *reinterpret_cast<const uint4*>(source);
      } else {
        for (int k = 0; k < kPerStore; ++k) {
          if (from + k >= 0 && from + k < count) start[from + k] = source[k];
        }
      }
    }
  }
  if (partial_sums == nullptr) return;

  // Threads of the same joint meet in shared memory, where the values were: sums first, then squares.
  const int size = input.num_outputs * row_size;
  float* const meeting = memory + tiling.values_offset;
  double* const out = partial_sums + static_cast<int64_t>(blockIdx.x) * 2 * size;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
    if (first_row < row_step) {
#pragma unroll
      for (int modality = 0; modality < kNumModalities; ++modality) {
        const int place = outputs.rows[modality];
        for (int c = 0; c < 3 && place >= 0; ++c) {
          meeting[first_row * size + place * row_size + 3 * joint + c] =
              half == 0 ? sums[modality][c] : squares[modality][c];
        }
      }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < size; column += Traits::kThreads) {
      double sum = 0;
      for (int row = 0; row < row_step; ++row) sum += meeting[row * size + column];
      out[half * size + column] = sum;
    }
  }
}

// Adds up the blocks' sums of one view, always in the same order: each thread a part of the rows of one column, then one
// thread the parts.
__global__ void __launch_bounds__(Traits::kReduceColumns* Traits::kReduceParts)
    add_partial_sums_kernel(double* __restrict__ statistics, const double* __restrict__ partial_sums, int64_t num_rows,
                            int num_columns, int num_views) {
  IKEM_SHARED(double, parts, [Traits::kReduceParts][Traits::kReduceColumns]);
  const int blocks_per_view = divide_up(num_columns, Traits::kReduceColumns);
  const int view = blockIdx.x / blocks_per_view;
  const int column =
      blockIdx.x % blocks_per_view * Traits::kReduceColumns + static_cast<int>(threadIdx.x) % Traits::kReduceColumns;
  const int part = threadIdx.x / Traits::kReduceColumns;
  double sum = 0;
  for (int64_t row = part; row < num_rows && column < num_columns; row += Traits::kReduceParts) {
    sum += partial_sums[(view * num_rows + row) * num_columns + column];
  }
  parts[part][threadIdx.x % Traits::kReduceColumns] = sum;
  __syncthreads();
  if (part > 0 || column >= num_columns) return;
  for (int i = 1; i < Traits::kReduceParts; ++i) sum += parts[i][threadIdx.x];
  // Columns are sums, then squares, of one view; the result has all views' sums first.
  const int half = num_columns / 2;
  statistics[(static_cast<int64_t>(column / half) * num_views + view) * half + column % half] = sum;
}

// What a launch may be given, beyond what the binding looks at.
bool fits(const ClipViewsInput& input) {
  if (input.num_joints < 1 || input.num_joints > Skeleton::kMaxJoints) return false;
  if (input.num_outputs < 1 || input.num_outputs > kNumModalities) return false;
  const int64_t clip_size = int64_t{3} * input.num_joints * input.num_persons * input.clip_frames;
  if (clip_size > INT32_MAX || int64_t{input.num_samples} * input.num_views > INT32_MAX) return false;
  return int64_t{input.num_samples} * input.num_views * make_tiling(input, 4).blocks <= INT32_MAX;
}

}  // namespace

int64_t clip_views_scratch_size(const ClipViewsInput& input) {
  if (!fits(input)) return 0;
  const int64_t blocks = int64_t{input.num_samples} * input.num_views * make_tiling(input, 4).blocks;
  return blocks * 2 * input.num_outputs * 3 * input.num_joints;
}

template <typename View>
cudaError_t clip_views(View* views, double* statistics, double* scratch, const ClipViewsInput& input,
                       const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream) {
  if (!fits(input)) return cudaErrorInvalidValue;
  const int64_t statistics_size = int64_t{2} * input.num_views * input.num_outputs * 3 * input.num_joints;
  if (input.num_samples == 0) {
    return statistics ? cudaMemsetAsync(statistics, 0, statistics_size * sizeof(double), stream) : cudaSuccess;
  }
  const Tiling tiling = make_tiling(input, sizeof(View));
  const cudaError_t allowed = cudaFuncSetAttribute(clip_views_kernel<View>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   tiling.shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  const int blocks = input.num_views * input.num_samples * tiling.blocks;
  const cudaError_t launched =
      IKEM_LAUNCH((clip_views_kernel<View>), dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads),
                  static_cast<size_t>(tiling.shared_bytes), stream, views, statistics ? scratch : nullptr, input,
                  skeleton, rows, tiling);
  if (launched != cudaSuccess || statistics == nullptr) return launched;
  const int columns = 2 * input.num_outputs * 3 * input.num_joints;
  const int reduce_blocks = divide_up(columns, Traits::kReduceColumns) * input.num_views;
  return IKEM_LAUNCH(add_partial_sums_kernel, dim3(static_cast<unsigned>(reduce_blocks)),
                     dim3(Traits::kReduceColumns * Traits::kReduceParts), 0, stream, statistics, scratch,
                     static_cast<int64_t>(input.num_samples) * tiling.blocks, columns, input.num_views);
}

template cudaError_t clip_views<float>(float*, double*, double*, const ClipViewsInput&, const Skeleton&,
                                       const OutputRows&, cudaStream_t);
template cudaError_t clip_views<__half>(__half*, double*, double*, const ClipViewsInput&, const Skeleton&,
                                        const OutputRows&, cudaStream_t);
template cudaError_t clip_views<__nv_bfloat16>(__nv_bfloat16*, double*, double*, const ClipViewsInput&, const Skeleton&,
                                               const OutputRows&, cudaStream_t);

}  // namespace ikem_fast::cuda
