// What the binding files share: status -> exception, and the registration functions.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "mlakit/mla.h"

namespace mlakit_py {

namespace nb = nanobind;

// Raises the exception of a failing status, with the library's message.
void check(mla_status status);

void bind_plan_cache(nb::module_& m);
void bind_problem(nb::module_& m);

}  // namespace mlakit_py
