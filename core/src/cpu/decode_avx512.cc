// The CPU kernel for AVX-512.
#include "cpu/simd/avx512.h"

#include "cpu/decode_body.h"

namespace mla::cpu {

extern const Kernel kAvx512Kernel = {Avx512::kLanes, Avx512::kHasBf16Pairs, attend<Avx512>, add_part<Avx512>,
                                     store_row<Avx512>};

}  // namespace mla::cpu
