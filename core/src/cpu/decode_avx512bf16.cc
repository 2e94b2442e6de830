// The CPU kernel for AVX-512 with BF16.
#include "cpu/simd/avx512bf16.h"

#include "cpu/decode_body.h"

namespace mla::cpu {

extern const Kernel kAvx512Bf16Kernel = {Avx512Bf16::kLanes, Avx512Bf16::kHasBf16Pairs, attend<Avx512Bf16>,
                                         add_part<Avx512Bf16>, store_row<Avx512Bf16>};

}  // namespace mla::cpu
