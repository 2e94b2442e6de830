// mla_problem as one line, and back.
#pragma once

#include <string>

#include "status.h"

namespace mla {

// Only the enum values and flags have to be known ones.
Status format_problem(const mla_problem& problem, std::string& text);
Status parse_problem(const char* text, mla_problem& problem);

// What mla_problem_init gives.
mla_problem default_problem();

}  // namespace mla
