// Threads, streams and graphs: two workers of a native engine share one plan on a Hopper GPU.
//
// A plan does not change after creation, so all threads use it. What a call writes is the worker's own: a stream, a schedule and a
// scratch buffer. Each worker captures its step (one schedule, then a decode for each layer) and replays it with new lengths.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "mlakit/mla.hpp"

constexpr int64_t kBatch = 2, kHeads = 16, kPages = 64, kWidth = 32, kLayers = 3;
constexpr mla_device kGpu = {MLA_DEVICE_CUDA, 0};

__global__ void fill(__nv_bfloat16* x, int64_t n, float value) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    x[i] = __float2bfloat16(value);
}

void cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <class T>
T* device_memory(int64_t count) {
  T* p = nullptr;
  cuda(cudaMalloc(&p, (count > 0 ? count : 1) * sizeof(T)));
  return p;
}

// Serves two steps; returns whether every row was the constant that the cache holds. Memory lives as long as the process.
bool worker(const mla::Plan& plan, float value) try {
  cudaStream_t stream;
  cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const mla_plan_info info = plan.info();
  const mla::Buffers buffers = {device_memory<char>(info.schedule_bytes), info.schedule_bytes,
                                device_memory<char>(info.scratch_bytes), info.scratch_bytes};
  auto* q = device_memory<__nv_bfloat16>(kBatch * kHeads * 576);
  auto* cache = device_memory<__nv_bfloat16>(kPages * 64 * 576);
  auto* out = device_memory<__nv_bfloat16>(kBatch * kHeads * 512);
  auto* lengths = device_memory<int32_t>(kBatch);
  auto* table = device_memory<int32_t>(kBatch * kWidth);
  fill<<<64, 256, 0, stream>>>(q, kBatch * kHeads * 576, 0.5f);
  fill<<<64, 256, 0, stream>>>(cache, kPages * 64 * 576, value);
  std::vector<int32_t> pages(kBatch * kWidth);
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i * 7 % kPages);
  cuda(cudaMemcpyAsync(table, pages.data(), pages.size() * 4, cudaMemcpyHostToDevice, stream));
  cuda(cudaMemsetAsync(lengths, 0, kBatch * 4, stream));

  cudaGraph_t graph;
  cudaGraphExec_t step;
  cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  plan.schedule(buffers, mla::Tensor(lengths, MLA_DTYPE_INT32, {kBatch}, {}, kGpu), {}, stream);
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    plan.decode(buffers,
                {.q = mla::Tensor(q, MLA_DTYPE_BF16, {kBatch, 1, kHeads, 576}, {}, kGpu),
                 .kv_cache = mla::Tensor(cache, MLA_DTYPE_BF16, {kPages, 64, 1, 576}, {}, kGpu),
                 .block_table = mla::Tensor(table, MLA_DTYPE_INT32, {kBatch, kWidth}, {}, kGpu),
                 .out = mla::Tensor(out, MLA_DTYPE_BF16, {kBatch, 1, kHeads, 512}, {}, kGpu)},
                stream);
  }
  cuda(cudaStreamEndCapture(stream, &graph));
  cuda(cudaGraphInstantiate(&step, graph, 0));

  bool is_right = true;
  for (const std::vector<int32_t>& now : {std::vector<int32_t>{700, 0}, std::vector<int32_t>{1, 2048}}) {
    cuda(cudaMemcpyAsync(lengths, now.data(), kBatch * 4, cudaMemcpyHostToDevice, stream));
    cuda(cudaGraphLaunch(step, stream));
    std::vector<__nv_bfloat16> rows(kBatch * kHeads * 512);
    cuda(cudaMemcpyAsync(rows.data(), out, rows.size() * 2, cudaMemcpyDeviceToHost, stream));
    cuda(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < rows.size(); ++i) {
      const float expected =
          now[i / (kHeads * 512)] > 0 ? value : 0.0f;  // an average of equal rows; an empty request is 0
      is_right &= std::fabs(__bfloat162float(rows[i]) - expected) <= 0.01f * value;
    }
  }
  return is_right;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return false;
}

int main() try {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return std::puts("skipped: no CUDA device"), 77;
  mla_problem problem = mla::make_problem(MLA_DTYPE_BF16, kHeads, kBatch, kWidth * 64);
  problem.device_type = MLA_DEVICE_CUDA;
  mla::Context context;
  const mla::Plan plan(context, problem);
  bool is_right[2] = {};
  std::thread first([&] { is_right[0] = worker(plan, 0.25f); });
  is_right[1] = worker(plan, 1.5f);
  first.join();
  std::printf("two threads, two streams, %d layers a graph: %s\n", static_cast<int>(kLayers),
              is_right[0] && is_right[1] ? "right" : "WRONG");
  return is_right[0] && is_right[1] ? 0 : 1;
} catch (const mla::Error& error) {
  std::fprintf(stderr, "%s: %s\n", mla_status_string(error.status()), error.what());
  return error.status() == MLA_UNSUPPORTED || error.status() == MLA_NO_DRIVER ? 77 : 1;
}
