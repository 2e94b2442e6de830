// The sm_90a backend.
#pragma once

#include "backend.h"

namespace mla {

extern const Backend kSm90Backend;

}  // namespace mla
