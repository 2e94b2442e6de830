// The definition of correct: backend "reference", plain loops in double over the requests of a call. Never optimised.
#pragma once

#include "backend.h"

namespace mla {

extern const Backend kReferenceBackend;

}  // namespace mla
