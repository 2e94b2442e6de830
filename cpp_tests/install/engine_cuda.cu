// Threads, streams and graphs: two workers of a native engine share one plan on a Hopper GPU. What a call writes is the worker's own.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <vector>

#include "mlakit/mla.hpp"

constexpr int64_t kBatch = 2, kHeads = 16, kPages = 64, kWidth = 32, kLayers = 3;

void cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Lives as long as the process.
void* device_memory(size_t bytes, int byte, cudaStream_t stream) {
  void* data = nullptr;
  cuda(cudaMalloc(&data, bytes));
  cuda(cudaMemsetAsync(data, byte, bytes, stream));
  return data;
}

// Captures a step (a schedule, then a decode for each layer), and replays it with new lengths. Everything in q and the cache is one
// bf16 number of two equal bytes, and so is every output.
bool worker(const mla::Plan& plan, int byte) {
  cudaStream_t stream;
  cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto tensor = [&](int32_t dtype, int64_t size, int value, std::initializer_list<int64_t> shape) {
    return mla::Tensor(device_memory(size, value, stream), dtype, shape, {}, {MLA_DEVICE_CUDA, 0});
  };
  const mla::Tensor q = tensor(MLA_DTYPE_BF16, kBatch * kHeads * 576 * 2, byte, {kBatch, 1, kHeads, 576});
  const mla::Tensor cache = tensor(MLA_DTYPE_BF16, kPages * 64 * 576 * 2, byte, {kPages, 64, 1, 576});
  const mla::Tensor out = tensor(MLA_DTYPE_BF16, kBatch * kHeads * 512 * 2, 0, {kBatch, 1, kHeads, 512});
  const mla::Tensor table = tensor(MLA_DTYPE_INT32, kBatch * kWidth * 4, 0, {kBatch, kWidth});
  const mla::Tensor lengths = tensor(MLA_DTYPE_INT32, kBatch * 4, 0, {kBatch});
  const uint64_t schedule_bytes = plan.info().schedule_bytes, scratch_bytes = plan.info().scratch_bytes;
  const mla::Buffers buffers = {device_memory(schedule_bytes, 0, stream), schedule_bytes,
                                device_memory(scratch_bytes, 0, stream), scratch_bytes};
  cudaGraph_t graph;
  cudaGraphExec_t step;
  cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  plan.schedule(buffers, lengths, {}, stream);
  for (int64_t layer = 0; layer < kLayers; ++layer)
    plan.decode(buffers, {.q = q, .kv_cache = cache, .block_table = table, .out = out}, stream);
  cuda(cudaStreamEndCapture(stream, &graph));
  cuda(cudaGraphInstantiate(&step, graph, 0));

  bool is_right = true;
  for (const int32_t length : {700, 1, 2048}) {
    const int32_t now[kBatch] = {length, 0};
    std::vector<uint16_t> rows(kBatch * kHeads * 512);
    cuda(cudaMemcpyAsync(lengths.get()->data, now, sizeof now, cudaMemcpyHostToDevice, stream));
    cuda(cudaGraphLaunch(step, stream));
    cuda(cudaMemcpyAsync(rows.data(), out.get()->data, rows.size() * 2, cudaMemcpyDeviceToHost, stream));
    cuda(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < rows.size() / 2; ++i) is_right &= std::abs(rows[i] - byte * 0x0101) <= 1;  // to its last bit
    for (size_t i = rows.size() / 2; i < rows.size(); ++i) is_right &= rows[i] == 0;  // the empty request
  }
  return is_right;
}

int main() {
  for (const mla::BackendInfo& b : mla::backends())
    if (b.name == "sm90" && !b.is_available) return std::printf("skipped: %s\n", b.reason.c_str()), 77;
  mla_problem problem = mla::make_problem(MLA_DTYPE_BF16, kHeads, kBatch, kWidth * 64);
  problem.device_type = MLA_DEVICE_CUDA;
  const mla::Plan plan(mla::Context(), problem);
  std::future<bool> other = std::async(std::launch::async, worker, std::cref(plan), 0x3e);
  bool is_right = worker(plan, 0x3f);
  is_right &= other.get();
  std::puts(is_right ? "two threads, two streams: right" : "two threads, two streams: WRONG");
  return is_right ? 0 : 1;
}
