/* mla.h compiles alone, in every language version that CMakeLists.txt beside this file lists. */
#include "mlakit/mla.h"

mla_status (*const decode_has_c_linkage)(const mla_plan*, const mla_decode_args*, void*) = mla_decode;
