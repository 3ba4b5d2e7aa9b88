// What the kernels of graph_convolution and of its gradients share: the graph in shared memory, tiles of whole frames,
// and the sums over edges of a tile's rows. Row f * V + v of a tile is joint v of its frame number f.
#pragma once

#include <string.h>

#include "cuda/graph_convolution.h"
#include "cuda/real_types.h"
#include "cuda/tile_product.h"

namespace ikem_fast::cuda {

struct GraphTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = 128;           // of a tile; those after its last frame hold zeros
  static constexpr int kSharedEdges = 1024;   // more are read from global memory each time
  static constexpr int kReservedBytes = 1024; // of shared memory, that each block takes besides its own
};

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int round_up(int64_t a, int64_t b) { return static_cast<int>(divide_up(a, b) * b); }

// Parts of a block's shared memory, one after another.
struct SharedParts {
  int bytes = 0;

  int take(int64_t part) {
    const int begin = bytes;
    bytes += round_up(part, 16);
    return begin;
  }
};

// Whether rows of so many bytes can be read 16 bytes at a time.
inline bool is_aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

inline bool is_possible(const GraphConvolutionShape& shape) {
  return shape.joints <= kMaxGraphJoints && shape.partitions >= 1 && shape.partitions <= kMaxGraphPartitions &&
         shape.in_channels >= 1 && shape.out_channels >= 1 && shape.stride >= 1 &&
         shape.sequences * shape.out_frames() <= INT32_MAX - GraphTraits::kRows;
}

// ---- eight neighbouring channels, aligned to 16 bytes

__device__ __forceinline__ void load_eight(float (&values)[8], const __nv_bfloat16* from) {
  const uint4 four = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    values[2 * k] = __uint_as_float(words[k] << 16);
    values[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}
__device__ __forceinline__ void load_eight(float (&values)[8], const float* from) {
  const float4 first = reinterpret_cast<const float4*>(from)[0], second = reinterpret_cast<const float4*>(from)[1];
  const float eight[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = eight[k];
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

__device__ __forceinline__ void store_eight(__nv_bfloat16* to, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(to) = uint4{pack_pair(values[0], values[1]), pack_pair(values[2], values[3]),
                                        pack_pair(values[4], values[5]), pack_pair(values[6], values[7])};
}
__device__ __forceinline__ void store_eight(float* to, const float (&values)[8]) {
  reinterpret_cast<float4*>(to)[0] = float4{values[0], values[1], values[2], values[3]};
  reinterpret_cast<float4*>(to)[1] = float4{values[4], values[5], values[6], values[7]};
}

// Two neighbours, aligned to both.
__device__ __forceinline__ void store_two(__nv_bfloat16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_pair(first, second);
}
__device__ __forceinline__ void store_two(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = float2{first, second};
}

// ---- the places of a box that a thread takes

// Place (frame, joint, unit) of a box of any number of frames.
struct Place {
  int frame, joint, unit;
};

// Threads take places threadIdx.x, threadIdx.x + kThreads, ...; the steps are made on the host, so that a thread divides
// only for its first place.
struct BoxSteps {
  int joints, units;
  Place step;

  static BoxSteps of(int joints, int units) {
    constexpr int kThreads = GraphTraits::kThreads;
    return {joints, units, {kThreads / units / joints, kThreads / units % joints, kThreads % units}};
  }
  __device__ __forceinline__ Place first() const {
    const int line = static_cast<int>(threadIdx.x) / units;
    return {line / joints, line % joints, static_cast<int>(threadIdx.x) % units};
  }
  // The same in one register: each number of a place with threadIdx.x < kThreads is at most 255.
  __device__ __forceinline__ int packed_first() const {
    const Place place = first();
    return place.frame << 16 | place.joint << 8 | place.unit;
  }
  __device__ __forceinline__ static Place unpack(int packed) {
    return {packed >> 16, packed >> 8 & 255, packed & 255};
  }
  __device__ __forceinline__ void advance(Place& place) const {
    place.unit += step.unit;
    place.joint += step.joint;
    place.frame += step.frame;
    if (place.unit >= units) {
      place.unit -= units;
      ++place.joint;
    }
    if (place.joint >= joints) {
      place.joint -= joints;
      ++place.frame;
    }
  }
};

// ---- the graph

struct alignas(8) GraphEdge {
  int joint;  // that it comes from
  float coefficient;
};

// Edge number e as the tensors say it; one that lies outside the graph counts for nothing.
__device__ __forceinline__ GraphEdge stored_edge(const GraphConvolutionInput& input, int64_t s, int e) {
  const int partition = input.edges[3 * e], from = input.edges[3 * e + 1], to = input.edges[3 * e + 2];
  const int joints = input.shape.joints;
  const bool is_inside = partition >= 0 && partition < input.shape.partitions && from >= 0 && from < joints &&
                         to >= 0 && to < joints;
  if (!is_inside) return {0, 0.0f};
  const int64_t matrix = static_cast<int64_t>(joints) * joints;
  const int64_t place = partition * matrix + from * joints + to;
  return {from, input.adjacency[place] * input.importance[s * input.shape.partitions * matrix + place]};
}

// Of one stream. A cell is a joint and a partition, number joint * P + partition; it has the edges that go there.
struct Graph {
  const GraphConvolutionInput* input;
  int64_t s;
  GraphEdge* edges;      // null where there are too many for shared memory
  int* cell_begins;      // P * V + 1
  float* cell_weights;   // sums of the coefficients of a cell's edges

  __device__ __forceinline__ GraphEdge edge(int e) const { return edges ? edges[e] : stored_edge(*input, s, e); }
};

struct GraphParts {
  int edges, cell_begins, cell_weights;  // where in shared memory; edges -1: not there

  static GraphParts of(const GraphConvolutionShape& shape, SharedParts& shared,
                       int most_edges = GraphTraits::kSharedEdges) {
    const int cells = shape.joints * shape.partitions;
    GraphParts parts;
    parts.edges = shape.edges <= most_edges ? shared.take(sizeof(GraphEdge) * shape.edges) : -1;
    parts.cell_begins = shared.take(sizeof(int) * (cells + 1));
    parts.cell_weights = shared.take(sizeof(float) * cells);
    return parts;
  }
};

// By all threads of a block; ends with a barrier.
__device__ __forceinline__ Graph load_graph(unsigned char* shared, const GraphParts& parts,
                                            const GraphConvolutionInput& input, int64_t s) {
  const Graph graph{&input, s, parts.edges < 0 ? nullptr : reinterpret_cast<GraphEdge*>(shared + parts.edges),
                    reinterpret_cast<int*>(shared + parts.cell_begins),
                    reinterpret_cast<float*>(shared + parts.cell_weights)};
  const int num_edges = input.shape.edges, cells = input.shape.joints * input.shape.partitions;
  // However wrong the edges are, every cell gets a begin, and one that is in 0 ... E.
  const auto cell_of = [&](int e) {
    if (e < 0) return -1;
    if (e >= num_edges) return cells;
    const int64_t cell = static_cast<int64_t>(input.edges[3 * e + 2]) * input.shape.partitions + input.edges[3 * e];
    return static_cast<int>(cell < 0 ? 0 : cell > cells ? cells : cell);
  };
  for (int e = threadIdx.x; e <= num_edges; e += GraphTraits::kThreads) {
    const int last = cell_of(e);
    for (int cell = cell_of(e - 1) + 1; cell <= last; ++cell) graph.cell_begins[cell] = e;
    if (graph.edges && e < num_edges) {
      const GraphEdge edge = stored_edge(input, s, e);
      graph.edges[e].joint = edge.joint;
      graph.edges[e].coefficient = edge.coefficient;
    }
  }
  __syncthreads();
  for (int cell = threadIdx.x; cell < cells; cell += GraphTraits::kThreads) {
    float sum = 0;
    for (int e = graph.cell_begins[cell]; e < graph.cell_begins[cell + 1]; ++e) sum += graph.edge(e).coefficient;
    graph.cell_weights[cell] = sum;
  }
  __syncthreads();
  return graph;
}

// ---- tiles

// How the input channels are cut: depth column p * channels + c of a chunk is its channel c in partition p.
struct DepthChunks {
  int channels;         // of a chunk, a multiple of 8
  int count;            // of chunks
  int depth;            // columns, a multiple of 16; those after the last partition hold zeros
  int unit_reciprocal;  // unit * unit_reciprocal >> 16 is the partition of eight columns

  // At most `most` columns where the partitions let it, and at most 128 bytes of a row of x.
  template <typename T>
  static DepthChunks of(const GraphConvolutionShape& shape, int most) {
    constexpr int kMostChannels = 128 / sizeof(T);
    const int padded = round_up(shape.in_channels, 8), in_depth = most / shape.partitions / 8 * 8;
    const int fitting = in_depth < kMostChannels ? in_depth : kMostChannels;
    DepthChunks chunks;
    chunks.count = divide_up(padded, fitting > 8 ? fitting : 8);
    chunks.channels = round_up(divide_up(padded, chunks.count), 8);
    chunks.count = divide_up(padded, chunks.channels);
    chunks.set_depth(round_up(chunks.channels * shape.partitions, 16));
    return chunks;
  }
  void set_depth(int columns) {
    depth = columns;
    unit_reciprocal = 65536 / (channels / 8) + 1;
  }
};

// Where whole frames of one stream lie.
struct FrameTiles {
  int frames_per_tile;
  int out_frames;  // T'
  int64_t total;   // B * T', fits 32 bits
  int tiles;

  static FrameTiles of(const GraphConvolutionShape& shape) {
    FrameTiles frames;
    frames.frames_per_tile = GraphTraits::kRows / shape.joints;
    frames.out_frames = static_cast<int>(shape.out_frames());
    frames.total = shape.sequences * shape.out_frames();
    frames.tiles = divide_up(frames.total, frames.frames_per_tile);
    return frames;
  }
  // Frames that there are of a tile.
  __device__ __forceinline__ int count(int tile) const {
    const int left = static_cast<int>(total) - tile * frames_per_tile;
    return left < frames_per_tile ? left : frames_per_tile;
  }
  // Number of the first of the input frames that belong to output frame `frame` of the stream, in (S, B, T).
  __device__ __forceinline__ int64_t source(const GraphConvolutionShape& shape, int64_t s, int frame) const {
    const int64_t stream = s * shape.sequences * shape.frames;
    if (shape.stride == 1) return stream + frame;
    return stream + static_cast<int64_t>(frame / out_frames) * shape.frames + frame % out_frames * shape.stride;
  }
};

// Starts to copy the chunk's channels of the tile's rows to x (rows, chunk channels); zeros for channels that there are
// not. `steps` are those of vectors of 16 bytes. The copy is there after cp_async_wait and a barrier.
template <typename T>
__device__ __forceinline__ void start_input(T* x, const GraphConvolutionInput& input, const FrameTiles& frames,
                                            const DepthChunks& chunks, const BoxSteps& steps, int packed_first,
                                            bool aligned, int64_t s, int tile, int chunk) {
  constexpr int kVector = 16 / sizeof(T);
  const T* from = static_cast<const T*>(input.x);
  const int count = frames.count(tile), first_frame = tile * frames.frames_per_tile;
  for (Place place = BoxSteps::unpack(packed_first); place.frame < count; steps.advance(place)) {
    const int64_t source = frames.source(input.shape, s, first_frame + place.frame);
    const int channel = chunk * chunks.channels + place.unit * kVector;
    const T* row = from + (source * input.shape.joints + place.joint) * input.shape.in_channels;
    T* to = x + (place.frame * input.shape.joints + place.joint) * chunks.channels + place.unit * kVector;
    if (aligned) {
      const bool is_inside = channel < input.shape.in_channels;
      cp_async16(to, is_inside ? row + channel : from, is_inside);
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        to[k] = channel + k < input.shape.in_channels ? row[channel + k] : narrow<T>(0.0f);
      }
    }
  }
  cp_async_commit();
}

// How many groups of a tile's frames there are where each thread takes the frames of one group at a place of the others.
inline int frame_groups(int places, int frames_per_tile) {
  const int fitting = GraphTraits::kThreads / places;
  return fitting < 1 ? 1 : fitting < frames_per_tile ? fitting : frames_per_tile;
}

// u (rows, depth) = sums over each cell's edges of rows of x, for the first `count` frames; zeros in the tile's other
// frames. `steps` are those of eight columns, with groups of frames for frames.
template <typename T>
__device__ __forceinline__ void aggregate(T* u, int u_stride, const T* x, const Graph& graph, const DepthChunks& chunks,
                                          const BoxSteps& steps, int groups, int frames_per_tile, int count) {
  const int joints = steps.joints, partitions = graph.input->shape.partitions, units = chunks.channels / 8;
  for (Place place = steps.first(); place.frame < groups; steps.advance(place)) {
    const int partition = place.unit * chunks.unit_reciprocal >> 16;
    const T* column = x + 8 * (place.unit - partition * units);
    T* to = u + place.joint * u_stride + 8 * place.unit;
    int begin = 0, end = 0;
    GraphEdge first{0, 0.0f};  // most cells have no other
    if (partition < partitions) {
      const int cell = place.joint * partitions + partition;
      begin = graph.cell_begins[cell];
      end = graph.cell_begins[cell + 1];
      if (begin < end) first = graph.edge(begin);
    }
#pragma unroll 1
    for (int frame = place.frame; frame < frames_per_tile; frame += groups) {
      float sums[8] = {};
      if (begin < end && frame < count) {
        const T* row = column + frame * joints * chunks.channels;
        float values[8];
        load_eight(values, row + first.joint * chunks.channels);
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] = first.coefficient * values[k];
#pragma unroll 1
        for (int e = begin + 1; e < end; ++e) {
          const GraphEdge edge = graph.edge(e);
          load_eight(values, row + edge.joint * chunks.channels);
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[k] = fmaf(edge.coefficient, values[k], sums[k]);
        }
      }
      store_eight(to + frame * joints * u_stride, sums);
    }
  }
}

inline BoxSteps weight_steps(const DepthChunks& chunks) {
  return BoxSteps::of(divide_up(chunks.depth, chunks.channels), chunks.channels / 4);
}

// weight (columns, depth): output channels from first_column on, of one chunk; zeros for what there is not. By all
// threads of a block.
template <typename T>
__device__ __forceinline__ void load_weight(T* weight, int weight_stride, const GraphConvolutionInput& input,
                                            const DepthChunks& chunks, const BoxSteps& steps, int64_t s, int chunk,
                                            int first_column, int columns) {
  const GraphConvolutionShape& shape = input.shape;
  const bool aligned = shape.in_channels % 4 == 0 && reinterpret_cast<uintptr_t>(input.weight) % 16 == 0;
  // "Frames" are output channels here, "joints" partitions and what follows the last one.
  for (Place place = steps.first(); place.frame < columns; steps.advance(place)) {
    const int column = first_column + place.frame, channel = chunk * chunks.channels + 4 * place.unit;
    const int depth = place.joint * chunks.channels + 4 * place.unit;
    if (depth >= chunks.depth) continue;
    float values[4] = {};
    if (place.joint < shape.partitions && column < shape.out_channels) {
      const float* row =
          input.weight + ((s * shape.partitions + place.joint) * shape.out_channels + column) * shape.in_channels;
      if (aligned) {
        if (channel < shape.in_channels) {
          const float4 four = *reinterpret_cast<const float4*>(row + channel);
          values[0] = four.x;
          values[1] = four.y;
          values[2] = four.z;
          values[3] = four.w;
        }
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (channel + k < shape.in_channels) values[k] = row[channel + k];
        }
      }
    }
    store_four(weight + place.frame * weight_stride + depth, values);
  }
}

// Zeros in the rows of a tile after its last frame.
template <typename T>
__device__ __forceinline__ void clear_rest(T* tile, int stride, int used_rows) {
  for (int i = used_rows * stride + static_cast<int>(threadIdx.x); i < GraphTraits::kRows * stride;
       i += GraphTraits::kThreads) {
    tile[i] = narrow<T>(0.0f);
  }
}

}  // namespace ikem_fast::cuda
