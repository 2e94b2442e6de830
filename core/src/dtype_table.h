// The element types: our number, the name in problem strings and messages, and DLPack's code and bits. The one table of them.
#pragma once

#include "problem.h"

namespace mla {

struct DTypeInfo {
  DType dtype;
  const char* name;
  uint8_t dlpack_code;
  uint8_t bits;
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::kBf16, "bf16", 4, 16}, {DType::kFp16, "fp16", 2, 16},   {DType::kFp32, "fp32", 2, 32},
    {DType::kE4m3, "e4m3", 10, 8}, {DType::kInt32, "int32", 0, 32},
};

// nullptr for a number that is no DType.
constexpr const DTypeInfo* find_dtype(int32_t number) {
  for (const DTypeInfo& info : kDTypes) {
    if (static_cast<int32_t>(info.dtype) == number) return &info;
  }
  return nullptr;
}

}  // namespace mla
