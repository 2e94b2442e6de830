// Backend::schedule of every backend that works on host memory.
#include "schedule/host_schedule.h"

#include "schedule/build.h"

namespace mla::schedule {

Status schedule_on_host(const Plan& plan, const ScheduleCall& call, void*) {
  const View view(call.schedule, plan.layout());
  const auto len_tokens = [&](int32_t r) { return call.cache_seqlens.data[r * call.cache_seqlens.stride]; };
  if (call.cu_seqlens_q.data != nullptr) {
    build(plan.config, view, call.batch, len_tokens,
          [&](int32_t r) { return call.cu_seqlens_q.data[r * call.cu_seqlens_q.stride]; });
  } else {
    const int32_t q_len = static_cast<int32_t>(plan.problem.q_len);
    build(plan.config, view, call.batch, len_tokens, [&](int32_t r) { return r * q_len; });
  }
  return Status::ok();
}

}  // namespace mla::schedule
