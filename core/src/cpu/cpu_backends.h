// The CPU backends: one algorithm (decode_body.h), one set of steps (cpu_backend.cc), an instruction set each.
#pragma once

#include "backend.h"

namespace mla {

extern const Backend kCpuAvx512Bf16Backend;
extern const Backend kCpuAvx512Backend;
extern const Backend kCpuAvx2Backend;
extern const Backend kCpuScalarBackend;

}  // namespace mla
