// Backend::schedule of every backend that works on host memory.
#pragma once

#include "backend.h"

namespace mla::schedule {

// The lengths are valid already (validate.cc); always succeeds.
Status schedule_on_host(const Plan& plan, const ScheduleCall& call, void* stream);

}  // namespace mla::schedule
