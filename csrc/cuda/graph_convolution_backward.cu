#include "cuda/graph_convolution.h"

#include "cuda/block_reduce.h"
#include "cuda/graph_tiles.h"

namespace ikem_fast::cuda {

namespace {

// What a launch makes: the gradient of x and the sums over edges, or the weight gradient and the sums over joints, or
// both in one pass where the weight gradient fits into a block's registers.
enum class Part { kInput, kWeight, kBoth };

// Tiles of kRows rows; a depth chunk has kDepth columns.
template <typename T, int kDepthColumns, Part kOwnPart>
struct BackwardTraits {
  using Element = T;
  static constexpr int kDepth = kDepthColumns;
  static constexpr Part kPart = kOwnPart;
  static constexpr bool kWithInput = kPart != Part::kWeight;
  static constexpr bool kWithWeight = kPart != Part::kInput;
  // Whose weight gradients a block keeps in registers.
  static constexpr int kChunks = kDepth == 96 || sizeof(T) == 4 ? 2 : 1;
  static constexpr int kMostColumns = 64;   // output channels of a block that makes a weight gradient
  static constexpr int kN = kDepth / 16;    // of half of the depth columns
  static constexpr int kRowWarps = GraphTraits::kWarps / 2;
  static constexpr int kM = GraphTraits::kRows / 16 / kRowWarps;
  static constexpr int kBlocks = kDepth <= 48 && sizeof(T) == 2 ? 3 : 2;
  static constexpr int kAhead = kBlocks == 2 ? 2 : 1;
};

struct BackwardPlan {
  FrameTiles frames;
  DepthChunks chunks;
  GraphParts graph;
  BoxSteps input_steps, unit_steps, weight_steps, total_steps, gather_steps;
  int columns;         // output channels at a time, a multiple of 16
  int column_chunks;   // of them
  int chunk_groups;    // of Traits::kChunks chunks; a block of Part::kWeight takes one, the others have one
  int total_groups;    // of frames, for threads that make the same columns and joint of total
  int gather_groups;   // likewise for the same channels and joint of x
  int unit_groups;     // likewise for the same columns and joint of what is gathered
  int splits;          // of the tiles
  int siblings;        // blocks of one stream and split
  int depth_parts;     // of a tile's rows, for the weight gradient
  int u_stride, total_stride, weight_stride;
  int coefficients, edges_of_joint, joint_begins, edge_sums, joint_sums, x, total, u, weight;  // in shared memory
  int edge_sum_count, joint_sum_count;  // running sums of a block
  bool keeps_weight;                    // of all chunks, in shared memory
  int shared_bytes;

  __host__ __device__ int64_t weight_size() const {
    return static_cast<int64_t>(column_chunks) * chunks.count * columns * chunks.depth;
  }
};

// Most running sums in shared memory; more of them lie in the workspace.
constexpr int kMostEdgeSums = 2048, kMostJointSums = 4096;
// Most values of the running sums of all blocks in the workspace, where that leaves a block for each stream.
constexpr int64_t kMostBlockSums = 1 << 24;

// A lean plan has in global memory what can be there.
template <typename Traits>
BackwardPlan make_plan(const GraphConvolutionShape& shape, const GraphConvolutionDevice& device, int most_columns,
                       bool is_lean) {
  using T = typename Traits::Element;
  constexpr int kVector = 16 / sizeof(T);
  BackwardPlan plan;
  plan.frames = FrameTiles::of(shape);
  plan.chunks = DepthChunks::of<T>(shape, Traits::kDepth);
  plan.chunks.set_depth(Traits::kDepth);
  const int column_chunks = divide_up(shape.out_channels, most_columns);
  plan.columns = round_up(divide_up(shape.out_channels, column_chunks), 16);
  plan.column_chunks = divide_up(shape.out_channels, plan.columns);
  plan.chunk_groups = Traits::kPart == Part::kWeight ? divide_up(plan.chunks.count, Traits::kChunks) : 1;
  const int items = plan.columns / 16 * 2;
  plan.depth_parts = items <= 2 ? 4 : items <= 4 ? 2 : 1;

  const int frames = plan.frames.frames_per_tile;
  plan.total_groups = frame_groups(shape.joints * plan.columns / 8, frames);
  plan.gather_groups = frame_groups(shape.joints * plan.chunks.channels / 8, frames);
  plan.unit_groups = frame_groups(shape.joints * Traits::kDepth / 8, frames);
  plan.input_steps = BoxSteps::of(shape.joints, plan.chunks.channels / kVector);
  plan.unit_steps = BoxSteps::of(shape.joints, Traits::kDepth / 8);
  plan.weight_steps = weight_steps(plan.chunks);
  plan.total_steps = BoxSteps::of(shape.joints, plan.columns / 8);
  plan.gather_steps = BoxSteps::of(shape.joints, plan.chunks.channels / 8);
  plan.u_stride = plan.weight_stride = tile_stride<T>(Traits::kDepth);
  plan.total_stride = tile_stride<T>(plan.columns);

  SharedParts shared;
  plan.graph = GraphParts::of(shape, shared, is_lean ? -1 : GraphTraits::kSharedEdges);
  plan.coefficients = shared.take(sizeof(float) * 2 * plan.columns * (Traits::kWithWeight ? 1 : plan.column_chunks));
  plan.edges_of_joint = plan.joint_begins = plan.edge_sums = plan.joint_sums = -1;
  plan.edge_sum_count = plan.joint_sum_count = 0;
  if (Traits::kWithInput) {
    if (plan.graph.edges >= 0) {
      plan.edges_of_joint = shared.take(sizeof(int2) * shape.edges);
      plan.joint_begins = shared.take(sizeof(int) * (shape.joints + 1));
    }
    plan.edge_sum_count = shape.edges * (plan.chunks.channels / 8) * plan.gather_groups;
    if (!is_lean && plan.edge_sum_count <= kMostEdgeSums) {
      plan.edge_sums = shared.take(sizeof(float) * plan.edge_sum_count);
    }
  }
  if (Traits::kWithWeight) {
    plan.joint_sum_count = shape.joints * plan.columns * plan.total_groups;
    if (!is_lean && plan.joint_sum_count <= kMostJointSums) {
      plan.joint_sums = shared.take(sizeof(float) * plan.joint_sum_count);
    }
  }
  // Twice: what comes next is on its way while the gradient of x is made.
  plan.x = shared.take(sizeof(T) * 2 * frames * shape.joints * plan.chunks.channels);
  plan.total = shared.take(sizeof(T) * GraphTraits::kRows * plan.total_stride);
  plan.u = shared.take(sizeof(T) * GraphTraits::kRows * plan.u_stride);
  plan.weight = shared.bytes;
  const int64_t weight_bytes = Traits::kWithInput ? sizeof(T) * plan.columns * plan.weight_stride : 0;
  const int64_t all_bytes = weight_bytes * plan.chunks.count * plan.column_chunks;
  plan.keeps_weight = shared.bytes + all_bytes <= device.shared_bytes;
  plan.shared_bytes = static_cast<int>(shared.bytes + (plan.keeps_weight ? all_bytes : weight_bytes));

  const int fitting = (device.shared_bytes + GraphTraits::kReservedBytes) /
                      (plan.shared_bytes + GraphTraits::kReservedBytes);
  const int resident = fitting < 1 ? 1 : fitting < Traits::kBlocks ? fitting : Traits::kBlocks;
  plan.siblings = Traits::kPart == Part::kWeight ? plan.column_chunks * plan.chunk_groups : 1;
  const int64_t block_sums =
      (plan.edge_sums < 0 ? plan.edge_sum_count : 0) + (plan.joint_sums < 0 ? plan.joint_sum_count : 0);
  int64_t blocks = static_cast<int64_t>(resident) * device.multiprocessors;
  if (block_sums * blocks > kMostBlockSums) blocks = kMostBlockSums / block_sums;
  const int64_t splits = blocks / (shape.streams * plan.siblings);
  plan.splits = splits < 1 ? 1 : splits < plan.frames.tiles ? static_cast<int>(splits) : plan.frames.tiles;
  return plan;
}

// Where the launches leave their sums, in parts. Null: not made by this launch, or in shared memory.
struct BackwardSums {
  float* weight;         // (S, splits * depth parts, column chunks, chunks, columns, kDepth)
  float* joints;         // (S, splits, V, C_out): of total
  float* edges;          // (S, splits, E): of the products of x and the gradient of what is gathered
  float* block_edges;    // (blocks, running sums)
  float* block_joints;   // likewise
};

// Edges that lead away from a joint.
struct EdgesOfJoint {
  const int2* entries;  // place in a frame's rows of u and the edge's number, packed, and the coefficient
  const int* begins;    // V + 1; null where the edges are too many for shared memory
};

// By all threads of a block; ends with a barrier.
__device__ __forceinline__ EdgesOfJoint sort_edges(int2* entries, int* begins, const Graph& graph, int u_stride,
                                                   int channels) {
  const GraphConvolutionInput& input = *graph.input;
  const GraphConvolutionShape& shape = input.shape;
  for (int e = threadIdx.x; e < shape.edges; e += GraphTraits::kThreads) {
    const GraphEdge edge = graph.edges[e];
    int before = 0;
    for (int other = 0; other < shape.edges; ++other) {
      const int joint = graph.edges[other].joint;
      before += joint < edge.joint || (joint == edge.joint && other < e) ? 1 : 0;
    }
    const int partition = input.edges[3 * e], to = input.edges[3 * e + 2];
    const bool is_inside = partition >= 0 && partition < shape.partitions && to >= 0 && to < shape.joints;
    const int place = is_inside ? to * u_stride + partition * channels : 0;
    entries[before].x = place << 16 | e;
    entries[before].y = __float_as_int(edge.coefficient);
  }
  for (int joint = threadIdx.x; joint <= shape.joints; joint += GraphTraits::kThreads) {
    int before = 0;
    for (int e = 0; e < shape.edges; ++e) before += graph.edges[e].joint < joint ? 1 : 0;
    begins[joint] = before;
  }
  __syncthreads();
  return {entries, begins};
}

// Calls action(place in a frame's rows of u, edge, coefficient) for the edges that lead away from `joint`.
template <typename Action>
__device__ __forceinline__ void for_edges_of(int joint, const EdgesOfJoint& sorted, const Graph& graph, int u_stride,
                                             int channels, Action action) {
  if (sorted.begins) {
    const int end = sorted.begins[joint + 1];
#pragma unroll 1
    for (int i = sorted.begins[joint]; i < end; ++i) {
      const int2 entry = sorted.entries[i];
      action(static_cast<int>(static_cast<unsigned>(entry.x) >> 16), entry.x & 65535, __int_as_float(entry.y));
    }
    return;
  }
  const int partitions = graph.input->shape.partitions;
#pragma unroll 1
  for (int cell = 0; cell < graph.input->shape.joints * partitions; ++cell) {
    for (int e = graph.cell_begins[cell]; e < graph.cell_begins[cell + 1]; ++e) {
      const GraphEdge edge = graph.edge(e);
      if (edge.joint == joint) action(cell / partitions * u_stride + cell % partitions * channels, e, edge.coefficient);
    }
  }
}

template <typename T>
struct alignas(16) Eight {
  T values[8];
};

// Eight of a row's channels from `channel` on. Where the row has no more of them: zeros, or of an aligned row numbers
// that mean nothing.
template <bool kAligned, typename T>
__device__ __forceinline__ Eight<T> load_channels(const T* row, int channel, int channels) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Eight<T>*>(row + (channel < channels ? channel : 0));
  } else {
    Eight<T> eight;
#pragma unroll
    for (int k = 0; k < 8; ++k) eight.values[k] = channel + k < channels ? row[channel + k] : narrow<T>(0.0f);
    return eight;
  }
}

// total (rows, columns): the gradient of y before statistics were made of it, for output channels from first_column on;
// zeros for what there is not. Adds it to the thread's own joint_sums unless those are null. A thread has kAhead frames
// under way at once.
template <int kAhead, bool kAligned, typename T>
__device__ __forceinline__ void make_total(T* total, float* joint_sums, const float* offset, const float* factor,
                                           const GraphConvolutionGradients& gradients, const GraphConvolutionInput& input,
                                           const BackwardPlan& plan, int64_t s, int tile, int first_column) {
  const GraphConvolutionShape& shape = input.shape;
  const int count = plan.frames.count(tile), channels = shape.out_channels;
  const int units = plan.total_groups * shape.joints * (plan.columns / 8);
  const bool with_statistics = gradients.mean_gradient || gradients.variance_gradient;
  const int64_t first = (s * plan.frames.total + static_cast<int64_t>(tile) * plan.frames.frames_per_tile) * shape.joints;
  const T* y_gradient = static_cast<const T*>(gradients.y_gradient);
  const T* y = static_cast<const T*>(gradients.y);
  const int groups = plan.total_groups;
  const auto row_of = [&](int frame, int joint) {
    return (first + (frame < count ? frame : 0) * shape.joints + joint) * channels;
  };
  int number = threadIdx.x;
#pragma unroll 1
  for (Place place = plan.total_steps.first(); place.frame < plan.total_groups; plan.total_steps.advance(place)) {
    const int column = 8 * place.unit, channel = first_column + column;
    float sums[8] = {};
#pragma unroll 1
    for (int first_frame = place.frame; first_frame < plan.frames.frames_per_tile; first_frame += kAhead * groups) {
      // All loads first, also those of frames that there are not.
      Eight<T> y_gradients[kAhead], outputs[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t row = row_of(first_frame + a * groups, place.joint);
        y_gradients[a] = load_channels<kAligned>(y_gradient + row, channel, channels);
        if (with_statistics) outputs[a] = load_channels<kAligned>(y + row, channel, channels);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int frame = first_frame + a * groups;
        if (frame >= plan.frames.frames_per_tile) continue;
        const int inside = frame < count ? channels - channel : 0;
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          float value = widen(y_gradients[a].values[k]);
          if (with_statistics) value += fmaf(factor[column + k], widen(outputs[a].values[k]), offset[column + k]);
          values[k] = k < inside ? value : 0.0f;
          sums[k] += values[k];
        }
        store_eight(total + (frame * shape.joints + place.joint) * plan.total_stride + column, values);
      }
    }
    if (joint_sums) {
      float4* own = reinterpret_cast<float4*>(joint_sums);
      const float4 low = own[number], high = own[units + number];
      own[number] = float4{low.x + sums[0], low.y + sums[1], low.z + sums[2], low.w + sums[3]};
      own[units + number] = float4{high.x + sums[4], high.y + sums[5], high.z + sums[6], high.w + sums[7]};
    }
    number += GraphTraits::kThreads;
  }
}

// The gradient of x for one chunk of channels of a tile, from u (rows, depth), the gradient of what was gathered; and,
// added to the thread's own edge_sums, the products of x and u.
template <typename T>
__device__ __forceinline__ void gather(T* x_gradient, float* edge_sums, const T* x, const T* u,
                                       const EdgesOfJoint& sorted, const Graph& graph, const BackwardPlan& plan,
                                       bool aligned, int64_t s, int tile, int chunk) {
  const GraphConvolutionShape& shape = graph.input->shape;
  const int count = plan.frames.count(tile), channels = plan.chunks.channels, units = channels / 8;
  for (Place place = plan.gather_steps.first(); place.frame < plan.gather_groups; plan.gather_steps.advance(place)) {
#pragma unroll 1
    for (int frame = place.frame; frame < count; frame += plan.gather_groups) {
      float inputs[8], sums[8] = {};
      load_eight(inputs, x + (frame * shape.joints + place.joint) * channels + 8 * place.unit);
      const T* column = u + frame * shape.joints * plan.u_stride + 8 * place.unit;
      for_edges_of(place.joint, sorted, graph, plan.u_stride, channels, [&](int row, int edge, float coefficient) {
        float values[8], product = 0;
        load_eight(values, column + row);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          sums[k] = fmaf(coefficient, values[k], sums[k]);
          product = fmaf(inputs[k], values[k], product);
        }
        edge_sums[(edge * units + place.unit) * plan.gather_groups + place.frame] += product;
      });
      if (!x_gradient) continue;
      const int out_frame = tile * plan.frames.frames_per_tile + frame;
      const int channel = chunk * channels + 8 * place.unit;
      // The frames that a stride passes over have no gradient.
      const int in_frame = out_frame % plan.frames.out_frames * shape.stride;
      const int covered = shape.frames - in_frame < shape.stride ? shape.frames - in_frame : shape.stride;
      T* row = x_gradient +
               (plan.frames.source(shape, s, out_frame) * shape.joints + place.joint) * shape.in_channels + channel;
#pragma unroll 1
      for (int k = 0; k < covered; ++k) {
        if (aligned) {
          if (channel < shape.in_channels) store_eight(row, sums);
        } else {
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            if (channel + c < shape.in_channels) row[c] = narrow<T>(sums[c]);
          }
        }
        row += static_cast<int64_t>(shape.joints) * shape.in_channels;
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[c] = 0;
      }
    }
  }
}

// The first `rows` rows of a warp's sums.
template <typename T, int kM, int kN>
__device__ __forceinline__ void store_sums(T* to, int stride, const Accumulators<kM, kN>& sums, int rows) {
#pragma unroll
  for (int j = 0; j < kN; ++j) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const int row = 16 * (i / 2) + accumulator_row(2 * (i % 2));
      if (row >= rows) continue;
      store_two(to + row * stride + 8 * j + accumulator_column(0), sums[i / 2][j][2 * (i % 2)],
                sums[i / 2][j][2 * (i % 2) + 1]);
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void swap_sums(Accumulators<kM, kN>& a, Accumulators<kM, kN>& b) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float value = a[i][j][q];
        a[i][j][q] = b[i][j][q];
        b[i][j][q] = value;
      }
    }
  }
}

// A block takes every plan.splits-th tile of one stream; of Part::kWeight also one part of the output channels and one
// group of chunks.
template <typename Traits>
__global__ void __launch_bounds__(GraphTraits::kThreads, Traits::kBlocks)
    graph_convolution_backward_kernel(GraphConvolutionGradients gradients, BackwardSums sums, GraphConvolutionInput input,
                                      BackwardPlan plan, bool aligned_input, bool aligned_x_gradient,
                                      bool aligned_output) {
  using T = typename Traits::Element;
  constexpr int kDepth = Traits::kDepth, kM = Traits::kM, kN = Traits::kN, kThreads = GraphTraits::kThreads;
  constexpr bool kWithInput = Traits::kWithInput, kWithWeight = Traits::kWithWeight;
  IKEM_DYNAMIC_SHARED(unsigned char, shared);
  const GraphConvolutionShape& shape = input.shape;
  const bool is_weight_part = Traits::kPart == Part::kWeight;
  const int sibling = static_cast<int>(blockIdx.x) % plan.siblings;
  const int split = static_cast<int>(blockIdx.x) / plan.siblings % plan.splits;
  const int64_t s = static_cast<int>(blockIdx.x) / plan.siblings / plan.splits;
  const int column_begin = is_weight_part ? sibling % plan.column_chunks : 0;
  const int column_end = is_weight_part ? column_begin + 1 : plan.column_chunks;
  const int chunk_begin = is_weight_part ? sibling / plan.column_chunks * Traits::kChunks : 0;
  const int chunk_end = is_weight_part && chunk_begin + Traits::kChunks < plan.chunks.count
                            ? chunk_begin + Traits::kChunks
                            : plan.chunks.count;
  const bool total_fits = column_end - column_begin == 1;
  const int warp = threadIdx.x / 32;
  const int used_rows = plan.frames.frames_per_tile * shape.joints;  // zeros after those

  float* offset = reinterpret_cast<float*>(shared + plan.coefficients);
  float* factor = offset + plan.columns * (column_end - column_begin);
  T* x = reinterpret_cast<T*>(shared + plan.x);
  T* total = reinterpret_cast<T*>(shared + plan.total);
  T* u = reinterpret_cast<T*>(shared + plan.u);  // what is gathered, and its gradient
  T* weight = reinterpret_cast<T*>(shared + plan.weight);
  const int x_size = plan.frames.frames_per_tile * shape.joints * plan.chunks.channels;

  const int input_first = plan.input_steps.packed_first();
  if (split < plan.frames.tiles) {
    start_input(x, input, plan.frames, plan.chunks, plan.input_steps, input_first, aligned_input, s, split, chunk_begin);
  }
  // total = gradient of y + gradient of the mean / n + 2 (y - mean) / n * gradient of the variance
  const float inverse_count = 1.0f / static_cast<float>(shape.sequences * plan.frames.out_frames * shape.joints);
  for (int i = threadIdx.x; i < plan.columns * (column_end - column_begin); i += kThreads) {
    const int channel = column_begin * plan.columns + i;
    const int64_t place = s * shape.out_channels + channel;
    const bool is_inside = channel < shape.out_channels;
    const float of_mean = is_inside && gradients.mean_gradient ? gradients.mean_gradient[place] * inverse_count : 0.0f;
    const float of_variance =
        is_inside && gradients.variance_gradient ? 2 * gradients.variance_gradient[place] * inverse_count : 0.0f;
    factor[i] = of_variance;
    offset[i] = is_inside && gradients.variance_gradient ? of_mean - of_variance * gradients.mean[place] : of_mean;
  }
  if (kWithInput && plan.keeps_weight) {
    for (int chunk = 0; chunk < plan.chunks.count; ++chunk) {
      for (int c = 0; c < plan.column_chunks; ++c) {
        load_weight(weight + (chunk * plan.column_chunks + c) * plan.columns * plan.weight_stride, plan.weight_stride,
                    input, plan.chunks, plan.weight_steps, s, chunk, c * plan.columns, plan.columns);
      }
    }
  }
  clear_rest(total, plan.total_stride, used_rows);
  clear_rest(u, plan.u_stride, used_rows);
  float* edge_sums = nullptr;
  float* joint_sums = nullptr;
  if constexpr (kWithInput) {
    edge_sums = plan.edge_sums >= 0 ? reinterpret_cast<float*>(shared + plan.edge_sums)
                                    : sums.block_edges + static_cast<int64_t>(blockIdx.x) * plan.edge_sum_count;
    for (int i = threadIdx.x; i < plan.edge_sum_count; i += kThreads) edge_sums[i] = 0;
  }
  const bool makes_joint_sums = kWithWeight && chunk_begin == 0;
  if (makes_joint_sums) {
    joint_sums = plan.joint_sums >= 0 ? reinterpret_cast<float*>(shared + plan.joint_sums)
                                      : sums.block_joints + static_cast<int64_t>(blockIdx.x) * plan.joint_sum_count;
    for (int i = threadIdx.x; i < plan.joint_sum_count; i += kThreads) joint_sums[i] = 0;
  }
  const Graph graph = load_graph(shared, plan.graph, input, s);
  EdgesOfJoint sorted{nullptr, nullptr};
  if (kWithInput && graph.edges) {
    sorted = sort_edges(reinterpret_cast<int2*>(shared + plan.edges_of_joint),
                        reinterpret_cast<int*>(shared + plan.joint_begins), graph, plan.u_stride, plan.chunks.channels);
  }

  // Of the product for the gradient of u a warp makes 16 kM rows and half of the columns; of the weight gradient 16
  // output channels and half of the columns, from a part of the rows.
  const int half = warp % 2 * (kDepth / 2), warp_row = warp / 2 * 16 * kM;
  const int column_groups = plan.columns / 16, weight_column = warp / 2 % column_groups * 16;
  const int depth_part = warp / 2 / column_groups, part_rows = GraphTraits::kRows / plan.depth_parts;
  const bool has_weight_part = depth_part < plan.depth_parts;
  Accumulators<1, kN> weight_sums[kWithWeight ? Traits::kChunks : 1] = {};
  int buffer = 0;
  for (int tile = split; tile < plan.frames.tiles; tile += plan.splits) {
    const int count = plan.frames.count(tile);
    for (int chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      Accumulators<kM, kWithWeight ? 1 : kN> u_sums = {};
      const T* own_x = x + buffer * x_size;
      for (int c = column_begin; c < column_end; ++c) {
        if (c > column_begin) __syncthreads();
        if (!total_fits || chunk == chunk_begin) {
          const int first = (c - column_begin) * plan.columns;
          float* own_sums = chunk == chunk_begin ? joint_sums : nullptr;
          if (aligned_output) {
            make_total<Traits::kAhead, true>(total, own_sums, offset + first, factor + first, gradients, input, plan, s,
                                             tile, c * plan.columns);
          } else {
            make_total<1, false>(total, own_sums, offset + first, factor + first, gradients, input, plan, s, tile,
                                 c * plan.columns);
          }
        }
        if (kWithInput && !plan.keeps_weight) {
          load_weight(weight, plan.weight_stride, input, plan.chunks, plan.weight_steps, s, chunk, c * plan.columns,
                      plan.columns);
        }
        if (c == column_begin) cp_async_wait<0>();
        __syncthreads();
        if (c == column_begin) {
          // The other buffer has been free since the barrier.
          const bool is_last = chunk + 1 == chunk_end;
          const int next_tile = is_last ? tile + plan.splits : tile;
          if (next_tile < plan.frames.tiles) {
            start_input(x + (1 - buffer) * x_size, input, plan.frames, plan.chunks, plan.input_steps, input_first,
                        aligned_input, s, next_tile, is_last ? chunk_begin : chunk + 1);
          }
        }
        if constexpr (kWithWeight) {
          aggregate(u, plan.u_stride, own_x, graph, plan.chunks, plan.unit_steps, plan.unit_groups,
                    plan.frames.frames_per_tile, count);
          __syncthreads();
          if (has_weight_part) {
            const int row = depth_part * part_rows;
            add_tile_product<TileOrder::kDepthFirst, TileOrder::kDepthFirst>(
                weight_sums[0], total + row * plan.total_stride + weight_column, plan.total_stride,
                u + row * plan.u_stride + half, plan.u_stride, part_rows);
          }
          // Chunks take turns at the first place, so that no number of a register is known only at run time.
          if (Traits::kChunks == 2 && chunk_end - chunk_begin == 2) {
            swap_sums(weight_sums[0], weight_sums[1 % Traits::kChunks]);
          }
        }
        if constexpr (!kWithWeight) {
          const T* own = weight + (plan.keeps_weight ? chunk * plan.column_chunks + c : 0) * plan.columns *
                                      plan.weight_stride;
          add_tile_product<TileOrder::kDepthLast, TileOrder::kDepthFirst>(
              u_sums, total + warp_row * plan.total_stride, plan.total_stride, own + half, plan.weight_stride,
              plan.columns);
        }
      }
      __syncthreads();
      if constexpr (kWithInput) {
        if constexpr (kWithWeight) {
          // In pieces, for which there are registers beside those of the weight gradient.
          constexpr int kPieces = kN % 2 == 0 ? 2 : 1;
#pragma unroll 1
          for (int piece = 0; piece < kPieces; ++piece) {
            const int column = half + piece * (8 * kN / kPieces);
            Accumulators<kM, kN / kPieces> u_sums = {};
            add_tile_product<TileOrder::kDepthLast, TileOrder::kDepthFirst>(
                u_sums, total + warp_row * plan.total_stride, plan.total_stride,
                weight + (plan.keeps_weight ? chunk * plan.columns * plan.weight_stride : 0) + column,
                plan.weight_stride, plan.columns);
            store_sums(u + warp_row * plan.u_stride + column, plan.u_stride, u_sums, used_rows - warp_row);
          }
        } else {
          store_sums(u + warp_row * plan.u_stride + half, plan.u_stride, u_sums, used_rows - warp_row);
        }
        __syncthreads();
        gather(static_cast<T*>(gradients.x_gradient), edge_sums, own_x, u, sorted, graph, plan, aligned_x_gradient, s,
               tile, chunk);
      }
      buffer = 1 - buffer;
    }
  }

  if constexpr (kWithWeight) {
    if (has_weight_part) {
      const int64_t slot = (s * plan.splits + split) * plan.depth_parts + depth_part;
#pragma unroll
      for (int k = 0; k < Traits::kChunks; ++k) {
        if (chunk_begin + k >= chunk_end) continue;
        const int64_t chunk = static_cast<int64_t>(column_begin) * plan.chunks.count + chunk_begin + k;
        float* own = sums.weight + slot * plan.weight_size() + (chunk * plan.columns + weight_column) * kDepth + half;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int q = 0; q < 4; q += 2) {
            store_two(own + accumulator_row(q) * kDepth + 8 * j + accumulator_column(0), weight_sums[k][0][j][q],
                      weight_sums[k][0][j][q + 1]);
          }
        }
      }
    }
  }
  __syncthreads();
  if (makes_joint_sums) {
    const int eights = plan.columns / 8, units = plan.total_groups * shape.joints * eights;
    for (int i = threadIdx.x; i < shape.joints * plan.columns; i += kThreads) {
      const int joint = i / plan.columns, column = i % plan.columns;
      const int channel = column_begin * plan.columns + column;
      if (channel >= shape.out_channels) continue;
      float sum = 0;
      for (int group = 0; group < plan.total_groups; ++group) {
        const int unit = (group * shape.joints + joint) * eights + column / 8;
        sum += joint_sums[4 * (column % 8 / 4 * units + unit) + column % 4];
      }
      sums.joints[((s * plan.splits + split) * shape.joints + joint) * shape.out_channels + channel] = sum;
    }
  }
  if constexpr (kWithInput) {
    const int parts = plan.chunks.channels / 8 * plan.gather_groups;
    for (int e = threadIdx.x; e < shape.edges; e += kThreads) {
      float sum = 0;
      for (int i = 0; i < parts; ++i) sum += edge_sums[e * parts + i];
      sums.edges[(s * plan.splits + split) * shape.edges + e] = sum;
    }
  }
}

// ---- the parts together

struct SummedSlots {
  const float* from;  // (S, slots, size)
  float* to;          // (S, size)
  int slots;
  int64_t size;
  int blocks;  // of a stream
};

struct SumTraits {
  static constexpr int kColumns = 32;
  static constexpr int kParts = 8;  // of the slots, that threads of a column take
  static constexpr int kThreads = kColumns * kParts;
};

__global__ void __launch_bounds__(SumTraits::kThreads)
    graph_sum_slots_kernel(SummedSlots weight, SummedSlots joints, SummedSlots edges) {
  IKEM_SHARED(float, parts, [SumTraits::kParts][SumTraits::kColumns]);
  const int blocks = weight.blocks + joints.blocks + edges.blocks;
  const int64_t s = static_cast<int>(blockIdx.x) / blocks;
  int block = static_cast<int>(blockIdx.x) % blocks;
  SummedSlots own = weight;
  if (block >= own.blocks) {
    block -= own.blocks;
    own = joints;
    if (block >= own.blocks) {
      block -= own.blocks;
      own = edges;
    }
  }
  const int lane = threadIdx.x % SumTraits::kColumns, part = threadIdx.x / SumTraits::kColumns;
  const int64_t column = static_cast<int64_t>(block) * SumTraits::kColumns + lane;
  float sum = 0;
  if (column < own.size) {
#pragma unroll 8
    for (int slot = part; slot < own.slots; slot += SumTraits::kParts) {
      sum += own.from[(s * own.slots + slot) * own.size + column];
    }
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= own.size) return;
  for (int other = 1; other < SumTraits::kParts; ++other) sum += parts[other][lane];
  own.to[s * own.size + column] = sum;
}

struct FinishedSums {
  const float* weight;  // (S, column chunks, chunks, columns, depth)
  const float* joints;  // (S, V, C_out)
  const float* edges;   // (S, E)
  DepthChunks chunks;
  int columns, column_chunks;
};

struct FinishTraits {
  static constexpr int kBlocks = 16;  // of a stream
};

// Blocks of a stream take turns with weights, biases and joints.
__global__ void __launch_bounds__(GraphTraits::kThreads)
    graph_finish_kernel(GraphConvolutionGradients gradients, FinishedSums sums, GraphConvolutionInput input,
                        GraphParts parts, int bias_sums_at) {
  IKEM_DYNAMIC_SHARED(unsigned char, shared);
  const GraphConvolutionShape& shape = input.shape;
  const int64_t s = static_cast<int>(blockIdx.x) / FinishTraits::kBlocks;
  const int block = static_cast<int>(blockIdx.x) % FinishTraits::kBlocks;
  const int first = block * GraphTraits::kThreads + static_cast<int>(threadIdx.x);
  const int step = FinishTraits::kBlocks * GraphTraits::kThreads;
  const int joints = shape.joints, partitions = shape.partitions;
  const Graph graph = load_graph(shared, parts, input, s);

  const int64_t rows = static_cast<int64_t>(partitions) * shape.out_channels, size = rows * shape.in_channels;
  const int64_t stored =
      static_cast<int64_t>(sums.column_chunks) * sums.chunks.count * sums.columns * sums.chunks.depth;
  for (int64_t i = first; i < size; i += step) {
    const int channel = static_cast<int>(i % shape.in_channels);
    const int row = static_cast<int>(i / shape.in_channels);
    const int column = row % shape.out_channels, partition = row / shape.out_channels;
    const int64_t chunk = column / sums.columns * sums.chunks.count + channel / sums.chunks.channels;
    gradients.weight_gradient[s * size + i] =
        sums.weight[s * stored + (chunk * sums.columns + column % sums.columns) * sums.chunks.depth +
                    partition * sums.chunks.channels + channel % sums.chunks.channels];
  }
  const float* of_joints = sums.joints + s * joints * shape.out_channels;
  for (int64_t i = first; i < rows; i += step) {
    const int column = static_cast<int>(i % shape.out_channels), partition = static_cast<int>(i / shape.out_channels);
    float sum = 0;
    for (int joint = 0; joint < joints; ++joint) {
      sum = fmaf(graph.cell_weights[joint * partitions + partition], of_joints[joint * shape.out_channels + column], sum);
    }
    gradients.bias_gradient[s * rows + i] = sum;
  }
  // What the biases make of an edge's coefficient; for the cells of this block's joints.
  float* bias_sums = reinterpret_cast<float*>(shared + bias_sums_at);
  const int lane = threadIdx.x % 32;
  for (int joint = block; joint < joints; joint += FinishTraits::kBlocks) {
    for (int partition = threadIdx.x / 32; partition < partitions; partition += GraphTraits::kWarps) {
      const float* bias = input.bias + s * rows + static_cast<int64_t>(partition) * shape.out_channels;
      float sum = 0;
      for (int column = lane; column < shape.out_channels; column += 32) {
        sum = fmaf(bias[column], of_joints[joint * shape.out_channels + column], sum);
      }
      sum = reduce_warp(sum, [](float a, float b) { return a + b; });
      if (lane == 0) bias_sums[joint * partitions + partition] = sum;
    }
  }
  __syncthreads();
  for (int joint = block; joint < joints; joint += FinishTraits::kBlocks) {
    for (int i = threadIdx.x; i < partitions * joints; i += GraphTraits::kThreads) {
      const int partition = i / joints, from = i % joints, cell = joint * partitions + partition;
      const int64_t place = static_cast<int64_t>(i) * joints + joint;
      float gradient = 0;
      for (int e = graph.cell_begins[cell]; e < graph.cell_begins[cell + 1]; ++e) {
        if (graph.edge(e).joint != from) continue;
        gradient = input.adjacency[place] * (sums.edges[s * shape.edges + e] + bias_sums[cell]);
      }
      gradients.importance_gradient[s * partitions * joints * joints + place] = gradient;
    }
  }
}

// ---- launches

// The first plan that fits a block: with all output channels at a time where that is wanted, then with fewer; lean where
// nothing else fits.
template <typename Traits>
BackwardPlan fitting_plan(const GraphConvolutionShape& shape, const GraphConvolutionDevice& device) {
  if (!Traits::kWithWeight) {
    const BackwardPlan whole = make_plan<Traits>(shape, device, 4 * Traits::kMostColumns, false);
    if (whole.keeps_weight && whole.shared_bytes <= device.shared_bytes) return whole;
  }
  const BackwardPlan plan = make_plan<Traits>(shape, device, Traits::kMostColumns, false);
  return plan.shared_bytes <= device.shared_bytes ? plan : make_plan<Traits>(shape, device, Traits::kMostColumns, true);
}

template <int kDepth>
using Depth = std::integral_constant<int, kDepth>;

// Calls action(element, depth of a pass for all, depth of separate passes, whether one pass does).
template <typename Action>
auto dispatch(ElementType type, const GraphConvolutionShape& shape, Action action) {
  const auto is_one_pass = [&](const DepthChunks& chunks, int most_chunks) {
    return chunks.count <= most_chunks && shape.out_channels <= 64;
  };
  if (type == ElementType::kFloat) {
    const DepthChunks chunks = DepthChunks::of<float>(shape, 96);
    if (chunks.depth <= 48) return action(float{}, Depth<48>{}, Depth<96>{}, is_one_pass(chunks, 2));
    return action(float{}, Depth<96>{}, Depth<96>{}, is_one_pass(chunks, 2));
  }
  const DepthChunks chunks = DepthChunks::of<__nv_bfloat16>(shape, 96);
  const bool one = is_one_pass(chunks, chunks.depth <= 64 ? 1 : 2);
  if (chunks.depth <= 32) return action(__nv_bfloat16{}, Depth<32>{}, Depth<64>{}, one);
  if (chunks.depth <= 48) return action(__nv_bfloat16{}, Depth<48>{}, Depth<64>{}, one);
  if (chunks.depth <= 64) return action(__nv_bfloat16{}, Depth<64>{}, Depth<64>{}, one);
  return action(__nv_bfloat16{}, Depth<96>{}, Depth<96>{}, one);
}

// Calls action(traits, plan) for each pass: of Part::kWeight last.
template <typename Action>
cudaError_t for_passes(ElementType type, const GraphConvolutionShape& shape, const GraphConvolutionDevice& device,
                       Action action) {
  return dispatch(type, shape, [&](auto element, auto depth, auto separate_depth, bool is_one_pass) {
    using T = decltype(element);
    using Both = BackwardTraits<T, decltype(depth)::value, Part::kBoth>;
    using Input = BackwardTraits<T, decltype(separate_depth)::value, Part::kInput>;
    using Weight = BackwardTraits<T, decltype(separate_depth)::value, Part::kWeight>;
    if (is_one_pass) return action(Both{}, fitting_plan<Both>(shape, device));
    const cudaError_t error = action(Input{}, fitting_plan<Input>(shape, device));
    return error != cudaSuccess ? error : action(Weight{}, fitting_plan<Weight>(shape, device));
  });
}

// What the passes leave, in the workspace.
struct Workspace {
  BackwardPlan weight_plan, input_plan;
  int64_t weight = 0, joints = 0, edges = 0, block_edges = 0, block_joints = 0;  // slots and running sums
  int64_t weight_sum = 0, joint_sum = 0, edge_sum = 0;
  int64_t size = 0;
  bool is_empty = false;  // there are no slots

  static Workspace of(const GraphConvolutionShape& shape, ElementType type, const GraphConvolutionDevice& device) {
    Workspace w;
    const auto take = [&](int64_t values) {
      const int64_t begin = w.size;
      w.size += (values + 3) / 4 * 4;
      return begin;
    };
    w.is_empty = shape.streams * shape.values_per_channel() == 0;
    for_passes(type, shape, device, [&](auto traits, const BackwardPlan& plan) {
      if (decltype(traits)::kWithWeight) w.weight_plan = plan;
      if (decltype(traits)::kWithInput) w.input_plan = plan;
      return cudaSuccess;
    });
    const BackwardPlan &weight = w.weight_plan, &input = w.input_plan;
    const int64_t of_weight = shape.streams * weight.weight_size();
    const int64_t of_joints = shape.streams * shape.joints * shape.out_channels;
    const int64_t of_edges = shape.streams * shape.edges;
    w.weight_sum = take(of_weight);
    w.joint_sum = take(of_joints);
    w.edge_sum = take(of_edges);
    if (w.is_empty) return w;
    w.weight = take(of_weight * weight.splits * weight.depth_parts);
    w.joints = take(of_joints * weight.splits);
    w.edges = take(of_edges * input.splits);
    if (input.edge_sums < 0) w.block_edges = take(shape.streams * input.splits * input.edge_sum_count);
    if (weight.joint_sums < 0) {
      w.block_joints = take(shape.streams * weight.splits * weight.siblings * weight.joint_sum_count);
    }
    return w;
  }
};

}  // namespace

int64_t graph_convolution_backward_workspace(const GraphConvolutionShape& shape, ElementType type,
                                             const GraphConvolutionDevice& device) {
  return is_possible(shape) ? Workspace::of(shape, type, device).size : 0;
}

cudaError_t graph_convolution_backward(const GraphConvolutionGradients& gradients, const GraphConvolutionInput& input,
                                       const GraphConvolutionDevice& device, cudaStream_t stream) {
  const GraphConvolutionShape& shape = input.shape;
  if (!is_possible(shape) || input.type == ElementType::kDouble) return cudaErrorInvalidValue;
  if (shape.streams == 0) return cudaSuccess;
  const Workspace places = Workspace::of(shape, input.type, device);
  float* workspace = gradients.workspace;
  const BackwardSums sums{workspace + places.weight, workspace + places.joints, workspace + places.edges,
                          workspace + places.block_edges, workspace + places.block_joints};
  if (!places.is_empty) {
    const cudaError_t error =
        for_passes(input.type, shape, device, [&](auto traits, const BackwardPlan& plan) {
          using Traits = decltype(traits);
          using T = typename Traits::Element;
          const int64_t blocks = shape.streams * plan.splits * plan.siblings;
          if (blocks > INT32_MAX || plan.shared_bytes > device.shared_bytes) return cudaErrorInvalidValue;
          const cudaError_t refusal =
              cudaFuncSetAttribute((graph_convolution_backward_kernel<Traits>),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
          if (refusal != cudaSuccess) return refusal;
          const bool aligned_output = shape.out_channels % 8 == 0 && is_aligned(gradients.y, 16) &&
                                      is_aligned(gradients.y_gradient, 16);
          return IKEM_LAUNCH((graph_convolution_backward_kernel<Traits>), dim3(static_cast<unsigned>(blocks)),
                             dim3(GraphTraits::kThreads), plan.shared_bytes, stream, gradients, sums, input, plan,
                             is_aligned(input.x, sizeof(T) * shape.in_channels),
                             shape.in_channels % 8 == 0 && is_aligned(gradients.x_gradient, 16), aligned_output);
        });
    if (error != cudaSuccess) return error;
  }

  const BackwardPlan &weight = places.weight_plan, &of_input = places.input_plan;
  const auto summed = [&](int64_t from, int64_t to, int slots, int64_t size) {
    return SummedSlots{workspace + from, workspace + to, places.is_empty ? 0 : slots, size,
                       divide_up(size, SumTraits::kColumns)};
  };
  const SummedSlots of_weight =
      summed(places.weight, places.weight_sum, weight.splits * weight.depth_parts, weight.weight_size());
  const SummedSlots of_joints = summed(places.joints, places.joint_sum, weight.splits,
                                       static_cast<int64_t>(shape.joints) * shape.out_channels);
  const SummedSlots of_edges = summed(places.edges, places.edge_sum, of_input.splits, shape.edges);
  const int64_t sum_blocks =
      shape.streams * (static_cast<int64_t>(of_weight.blocks) + of_joints.blocks + of_edges.blocks);
  if (sum_blocks > INT32_MAX) return cudaErrorInvalidValue;
  const cudaError_t error = IKEM_LAUNCH(graph_sum_slots_kernel, dim3(static_cast<unsigned>(sum_blocks)),
                                        dim3(SumTraits::kThreads), 0, stream, of_weight, of_joints, of_edges);
  if (error != cudaSuccess) return error;

  SharedParts shared;
  const GraphParts parts = GraphParts::of(shape, shared);
  const int bias_sums = shared.take(sizeof(float) * shape.joints * shape.partitions);
  const FinishedSums finished{workspace + places.weight_sum, workspace + places.joint_sum, workspace + places.edge_sum,
                              weight.chunks, weight.columns, weight.column_chunks};
  return IKEM_LAUNCH(graph_finish_kernel, dim3(static_cast<unsigned>(shape.streams * FinishTraits::kBlocks)),
                     dim3(GraphTraits::kThreads), shared.bytes, stream, gradients, finished, input, parts, bias_sums);
}

}  // namespace ikem_fast::cuda
