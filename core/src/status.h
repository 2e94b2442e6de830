// Status with a one-line message: how functions inside the library fail.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "mlakit/mla.h"

namespace mla {

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(mla_status code, std::string message) : code_(code), message_(std::move(message)) {}
  static Status ok() { return {}; }
  bool is_ok() const { return code_ == MLA_OK; }
  mla_status code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  mla_status code_ = MLA_OK;
  std::string message_;
};

// printf-style; the message is one line: "argument: what was expected, got what came".
[[gnu::format(printf, 2, 3)]] Status make_status(mla_status code, const char* format, ...);
[[gnu::format(printf, 1, 2)]] Status invalid(const char* format, ...);
[[gnu::format(printf, 1, 2)]] Status unsupported(const char* format, ...);

// The error table: every code with its name, in order. Ends with {0, nullptr} after the last entry.
struct StatusName {
  mla_status code;
  const char* name;
};
extern const StatusName kStatusNames[];
const char* status_name(mla_status code);

// The message of the last failure on this thread; set only by abi.cc.
void set_last_error(const char* message) noexcept;
const char* last_error() noexcept;

#define MLA_RETURN_IF_ERROR(expr)                                         \
  do {                                                                    \
    if (::mla::Status status_ = (expr); !status_.is_ok()) return status_; \
  } while (false)

}  // namespace mla
