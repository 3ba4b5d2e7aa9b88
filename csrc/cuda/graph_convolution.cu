#include "cuda/graph_convolution.h"

#include "cuda/channel_statistics.h"
#include "cuda/graph_tiles.h"

namespace ikem_fast::cuda {

namespace {

// How a block's warps share a tile of kRows rows and kColumns output channels.
template <typename T, int kOutColumns>
struct ForwardTraits {
  static constexpr int kColumns = kOutColumns;
  static constexpr int kColumnWarps = kColumns >= 64 ? 2 : 1;
  static constexpr int kRowWarps = GraphTraits::kWarps / kColumnWarps;
  static constexpr int kM = GraphTraits::kRows / 16 / kRowWarps;
  static constexpr int kN = kColumns / 8 / kColumnWarps;
  // Registers are limited to what lets so many blocks run on a multiprocessor.
  static constexpr int kBlocks = kColumns == 128 || sizeof(T) == 4 ? 2 : kColumns == 64 ? 3 : 4;
};

struct ForwardPlan {
  FrameTiles frames;
  DepthChunks chunks;
  GraphParts graph;
  BoxSteps input_steps, unit_steps, weight_steps, output_steps;
  int unit_groups, column_blocks, splits;
  int u_stride, stage_stride, weight_stride;
  int bias, scale, x, u, weight;  // where in shared memory
  bool keeps_weight;              // of all chunks, in shared memory
  int shared_bytes;
};

template <typename T, int kColumns>
ForwardPlan make_plan(const GraphConvolutionShape& shape, const GraphConvolutionDevice& device) {
  using Traits = ForwardTraits<T, kColumns>;
  constexpr int kMostDepth = sizeof(T) == 2 ? 96 : 48, kVector = 16 / sizeof(T);
  ForwardPlan plan;
  plan.frames = FrameTiles::of(shape);
  plan.chunks = DepthChunks::of<T>(shape, kMostDepth);
  plan.input_steps = BoxSteps::of(shape.joints, plan.chunks.channels / kVector);
  plan.unit_steps = BoxSteps::of(shape.joints, plan.chunks.depth / 8);
  plan.unit_groups = frame_groups(shape.joints * plan.chunks.depth / 8, plan.frames.frames_per_tile);
  plan.weight_steps = weight_steps(plan.chunks);
  plan.output_steps = BoxSteps::of(shape.joints, kColumns / kVector);
  plan.column_blocks = divide_up(shape.out_channels, kColumns);
  plan.u_stride = plan.weight_stride = tile_stride<T>(plan.chunks.depth);
  plan.stage_stride = tile_stride<T>(kColumns);
  const int tile_row = plan.u_stride > plan.stage_stride ? plan.u_stride : plan.stage_stride;

  SharedParts shared;
  plan.graph = GraphParts::of(shape, shared);
  plan.bias = shared.take(sizeof(float) * shape.joints * kColumns);
  plan.scale = shared.take(sizeof(float) * 2 * kColumns);
  plan.x = shared.take(sizeof(T) * plan.frames.frames_per_tile * shape.joints * plan.chunks.channels);
  plan.u = shared.take(sizeof(T) * GraphTraits::kRows * tile_row);
  plan.weight = shared.bytes;
  const int chunk_bytes = sizeof(T) * kColumns * plan.weight_stride;
  plan.keeps_weight = shared.bytes + static_cast<int64_t>(plan.chunks.count) * chunk_bytes <= device.shared_bytes;
  plan.shared_bytes = shared.bytes + (plan.keeps_weight ? plan.chunks.count : 1) * chunk_bytes;

  const int fitting = (device.shared_bytes + GraphTraits::kReservedBytes) /
                      (plan.shared_bytes + GraphTraits::kReservedBytes);
  const int resident = fitting < 1 ? 1 : fitting < Traits::kBlocks ? fitting : Traits::kBlocks;
  const int64_t splits =
      static_cast<int64_t>(resident) * device.multiprocessors / (shape.streams * plan.column_blocks);
  plan.splits = splits < 1 ? 1 : splits < plan.frames.tiles ? static_cast<int>(splits) : plan.frames.tiles;
  return plan;
}

// A block makes kColumns output channels of one stream, of every plan.splits-th tile.
template <typename T, typename Traits>
__global__ void __launch_bounds__(GraphTraits::kThreads, Traits::kBlocks)
    graph_convolution_kernel(GraphConvolutionOutput output, GraphConvolutionInput input, ForwardPlan plan,
                             bool aligned_input, bool aligned_output) {
  constexpr int kM = Traits::kM, kN = Traits::kN, kColumns = Traits::kColumns, kVector = 16 / sizeof(T);
  constexpr int kThreads = GraphTraits::kThreads;
  IKEM_DYNAMIC_SHARED(unsigned char, shared);
  const GraphConvolutionShape& shape = input.shape;
  const int column_block = static_cast<int>(blockIdx.x) % plan.column_blocks;
  const int split = static_cast<int>(blockIdx.x) / plan.column_blocks % plan.splits;
  const int64_t s = static_cast<int>(blockIdx.x) / plan.column_blocks / plan.splits;
  const int first_column = column_block * kColumns;
  const int columns = shape.out_channels - first_column < kColumns ? shape.out_channels - first_column : kColumns;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Traits::kColumnWarps * 16 * kM, warp_column = warp % Traits::kColumnWarps * 8 * kN;

  float* bias = reinterpret_cast<float*>(shared + plan.bias);  // (V, kColumns), of all of a joint's edges
  float* scale = reinterpret_cast<float*>(shared + plan.scale);
  float* shift = scale + kColumns;
  T* x = reinterpret_cast<T*>(shared + plan.x);
  T* u = reinterpret_cast<T*>(shared + plan.u);  // and the output, on its way
  T* weight = reinterpret_cast<T*>(shared + plan.weight);

  const int input_first = plan.input_steps.packed_first();
  const int output_first = plan.output_steps.packed_first();
  if (split < plan.frames.tiles) {
    start_input(x, input, plan.frames, plan.chunks, plan.input_steps, input_first, aligned_input, s, split, 0);
  }
  for (int column = threadIdx.x; column < kColumns; column += kThreads) {
    const bool is_scaled = output.scale && column < columns;
    scale[column] = is_scaled ? output.scale[s * shape.out_channels + first_column + column] : 1.0f;
    shift[column] = is_scaled ? output.shift[s * shape.out_channels + first_column + column] : 0.0f;
  }
  if (plan.keeps_weight) {
    for (int chunk = 0; chunk < plan.chunks.count; ++chunk) {
      load_weight(weight + chunk * kColumns * plan.weight_stride, plan.weight_stride, input, plan.chunks,
                  plan.weight_steps, s, chunk, first_column, kColumns);
    }
  }
  clear_rest(u, plan.u_stride, plan.frames.frames_per_tile * shape.joints);
  const Graph graph = load_graph(shared, plan.graph, input, s);
  for (int i = threadIdx.x; i < shape.joints * kColumns; i += kThreads) {
    const int joint = i / kColumns, column = i % kColumns;
    float sum = 0;
    for (int p = 0; p < shape.partitions && column < columns; ++p) {
      sum = fmaf(graph.cell_weights[joint * shape.partitions + p],
                 input.bias[(s * shape.partitions + p) * shape.out_channels + first_column + column], sum);
    }
    bias[i] = sum;
  }
  __syncthreads();

  uint32_t joints = 0;  // of the rows of this thread's accumulators, a byte each
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    joints |= (warp_row + 16 * (i / 2) + accumulator_row(2 * (i % 2))) % shape.joints << 8 * i;
  }
  ColumnMoments<kM, kN> moments;
  for (int tile = split; tile < plan.frames.tiles; tile += plan.splits) {
    const int count = plan.frames.count(tile), rows = count * shape.joints;
    Accumulators<kM, kN> sums;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const float* of_joint = bias + (joints >> 8 * i & 255) * kColumns + warp_column + accumulator_column(0);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(of_joint + 8 * j);
        sums[i / 2][j][2 * (i % 2)] = two.x;
        sums[i / 2][j][2 * (i % 2) + 1] = two.y;
      }
    }
    for (int chunk = 0; chunk < plan.chunks.count; ++chunk) {
      cp_async_wait<0>();
      __syncthreads();
      if (!plan.keeps_weight) {
        load_weight(weight, plan.weight_stride, input, plan.chunks, plan.weight_steps, s, chunk, first_column, kColumns);
      }
      aggregate(u, plan.u_stride, x, graph, plan.chunks, plan.unit_steps, plan.unit_groups, plan.frames.frames_per_tile,
                count);
      __syncthreads();
      // The next input comes in while this one is multiplied.
      const bool is_last = chunk + 1 == plan.chunks.count;
      const int next_tile = is_last ? tile + plan.splits : tile;
      if (next_tile < plan.frames.tiles) {
        start_input(x, input, plan.frames, plan.chunks, plan.input_steps, input_first, aligned_input, s, next_tile,
                    is_last ? 0 : chunk + 1);
      }
      const T* factor = weight + (plan.keeps_weight ? chunk * kColumns : 0) * plan.weight_stride;
      add_tile_product<TileOrder::kDepthLast, TileOrder::kDepthLast>(
          sums, u + warp_row * plan.u_stride, plan.u_stride, factor + warp_column * plan.weight_stride,
          plan.weight_stride, plan.chunks.depth);
    }
    if (output.moments) moments.add(sums, rows - warp_row);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int column = warp_column + 8 * j + accumulator_column(0);
      const float2 scales = *reinterpret_cast<const float2*>(scale + column);
      const float2 shifts = *reinterpret_cast<const float2*>(shift + column);
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        float first = sums[i / 2][j][2 * (i % 2)], second = sums[i / 2][j][2 * (i % 2) + 1];
        if (output.scale) {
          first = fmaf(scales.x, first, shifts.x);
          second = fmaf(scales.y, second, shifts.y);
          // Unlike fmaxf it lets NaN pass.
          if (output.activation) {
            first = first < 0 ? 0.0f : first;
            second = second < 0 ? 0.0f : second;
          }
        }
        const int row = warp_row + 16 * (i / 2) + accumulator_row(2 * (i % 2));
        if (row < rows) store_two(u + row * plan.stage_stride + column, first, second);
      }
    }
    __syncthreads();
    T* y = static_cast<T*>(output.y) +
           (s * plan.frames.total + static_cast<int64_t>(tile) * plan.frames.frames_per_tile) * shape.joints *
               shape.out_channels;
    for (Place place = BoxSteps::unpack(output_first); place.frame < count; plan.output_steps.advance(place)) {
      const int row = place.frame * shape.joints + place.joint, column = place.unit * kVector;
      if (column >= columns) continue;
      const T* from = u + row * plan.stage_stride + column;
      T* to = y + static_cast<int64_t>(row) * shape.out_channels + first_column + column;
      if (aligned_output) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          if (column + k < columns) to[k] = from[k];
        }
      }
    }
  }
  if (!output.moments) return;

  // The warps' moments of a column, together.
  __syncthreads();
  float* parts = reinterpret_cast<float*>(u);  // (kRowWarps, 3, kColumns)
  float* own = parts + warp / Traits::kColumnWarps * 3 * kColumns + warp_column;
  moments.store(own, own + kColumns, own + 2 * kColumns, 8 * kN);
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    Moments sum;
    for (int part = 0; part < Traits::kRowWarps; ++part) {
      const float* of_part = parts + part * 3 * kColumns + column;
      sum = join(sum, {of_part[0], of_part[kColumns], of_part[2 * kColumns]});
    }
    float* slot = output.moments + (s * plan.splits + split) * 3 * shape.out_channels + first_column + column;
    slot[0] = sum.count;
    slot[shape.out_channels] = sum.mean;
    slot[2 * shape.out_channels] = sum.m2;
  }
}

// Calls action(element, traits) for the tiles that suit the output channels.
template <typename Action>
auto dispatch(ElementType type, int out_channels, Action action) {
  if (type == ElementType::kFloat) {
    if (out_channels <= 16) return action(float{}, ForwardTraits<float, 16>{});
    if (out_channels <= 32) return action(float{}, ForwardTraits<float, 32>{});
    return action(float{}, ForwardTraits<float, 64>{});
  }
  if (out_channels <= 16) return action(__nv_bfloat16{}, ForwardTraits<__nv_bfloat16, 16>{});
  if (out_channels <= 32) return action(__nv_bfloat16{}, ForwardTraits<__nv_bfloat16, 32>{});
  if (out_channels <= 64) return action(__nv_bfloat16{}, ForwardTraits<__nv_bfloat16, 64>{});
  return action(__nv_bfloat16{}, ForwardTraits<__nv_bfloat16, 128>{});
}

}  // namespace

int graph_convolution_slots(const GraphConvolutionShape& shape, ElementType type, const GraphConvolutionDevice& device) {
  if (!is_possible(shape) || shape.streams * shape.values_per_channel() == 0) return 0;
  return dispatch(type, shape.out_channels, [&](auto element, auto traits) {
    return make_plan<decltype(element), decltype(traits)::kColumns>(shape, device).splits;
  });
}

cudaError_t graph_convolution(const GraphConvolutionOutput& output, const GraphConvolutionInput& input,
                              const GraphConvolutionDevice& device, cudaStream_t stream) {
  const GraphConvolutionShape& shape = input.shape;
  if (!is_possible(shape) || input.type == ElementType::kDouble) return cudaErrorInvalidValue;
  if (shape.streams * shape.values_per_channel() == 0) return cudaSuccess;
  return dispatch(input.type, shape.out_channels, [&](auto element, auto traits) {
    using T = decltype(element);
    using Traits = decltype(traits);
    const ForwardPlan plan = make_plan<T, Traits::kColumns>(shape, device);
    const int64_t blocks = shape.streams * plan.splits * plan.column_blocks;
    if (blocks > INT32_MAX || plan.shared_bytes > device.shared_bytes) return cudaErrorInvalidValue;
    const cudaError_t error = cudaFuncSetAttribute(
        (graph_convolution_kernel<T, Traits>), cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
    return IKEM_LAUNCH((graph_convolution_kernel<T, Traits>), dim3(static_cast<unsigned>(blocks)),
                       dim3(GraphTraits::kThreads), plan.shared_bytes, stream, output, input, plan,
                       is_aligned(input.x, sizeof(T) * shape.in_channels),
                       is_aligned(output.y, sizeof(T) * shape.out_channels));
  });
}

}  // namespace ikem_fast::cuda
