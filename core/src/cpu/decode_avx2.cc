// The CPU kernel for AVX2, FMA and F16C.
#include "cpu/simd/avx2.h"

#include "cpu/decode_body.h"

namespace mla::cpu {

extern const Kernel kAvx2Kernel = {Avx2::kLanes, Avx2::kHasBf16Pairs, attend<Avx2>, add_part<Avx2>, store_row<Avx2>};

}  // namespace mla::cpu
