// The CPU kernel for every machine.
#include "cpu/simd/scalar.h"

#include "cpu/decode_body.h"

namespace mla::cpu {

extern const Kernel kScalarKernel = {Scalar::kLanes, Scalar::kHasBf16Pairs, attend<Scalar>, add_part<Scalar>,
                                     store_row<Scalar>};

}  // namespace mla::cpu
