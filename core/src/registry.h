// Which backend runs a problem.
#pragma once

#include "backend.h"

namespace mla {

// nullptr for a name that this build does not have.
const Backend* find_backend(const char* name);
// "sm90, cpu-avx2, ..., reference"
std::string backend_names();

// Makes plan.backend the first backend that can run plan.problem (or the forced one), with everything that it fills. The message of a
// refusal has the reason of each backend that was asked.
Status choose_backend(Plan& plan);

// The backend that merges tensors of a device.
Status choose_merge_backend(const Context& context, DeviceType device_type, const Backend** backend);

}  // namespace mla
