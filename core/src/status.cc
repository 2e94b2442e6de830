// The error table, the printf of messages, and the thread's last message.
#include "status.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace mla {

const StatusName kStatusNames[] = {
    {MLA_OK, "MLA_OK"},
    {MLA_INVALID_ARGUMENT, "MLA_INVALID_ARGUMENT"},
    {MLA_UNSUPPORTED, "MLA_UNSUPPORTED"},
    {MLA_WORKSPACE_TOO_SMALL, "MLA_WORKSPACE_TOO_SMALL"},
    {MLA_OUT_OF_MEMORY, "MLA_OUT_OF_MEMORY"},
    {MLA_CUDA_ERROR, "MLA_CUDA_ERROR"},
    {MLA_NO_DRIVER, "MLA_NO_DRIVER"},
    {MLA_INTERNAL, "MLA_INTERNAL"},
    {0, nullptr},
};

const char* status_name(mla_status code) {
  for (const StatusName* entry = kStatusNames; entry->name != nullptr; ++entry) {
    if (entry->code == code) return entry->name;
  }
  return "unknown status";
}

namespace {

Status format_status(mla_status code, const char* format, va_list args) {
  char text[1024];  // longer ones are cut: a message is one line for people
  std::vsnprintf(text, sizeof text, format, args);
  for (char* c = text; *c != '\0'; ++c) {
    // Names that callers pass are quoted in messages, perhaps cut inside a character: one line of ASCII suits every reader.
    if (*c == '\n' || *c == '\r') *c = ' ';
    if (*c < 0x20 || *c > 0x7e) *c = '?';
  }
  return {code, text};
}

// A plain array: remembering a message can then not fail, whatever the state of the heap.
constexpr size_t kMaxMessage = 4096;
thread_local char t_last_error[kMaxMessage] = "";

}  // namespace

Status make_status(mla_status code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  Status status = format_status(code, format, args);
  va_end(args);
  return status;
}

Status invalid(const char* format, ...) {
  va_list args;
  va_start(args, format);
  Status status = format_status(MLA_INVALID_ARGUMENT, format, args);
  va_end(args);
  return status;
}

Status unsupported(const char* format, ...) {
  va_list args;
  va_start(args, format);
  Status status = format_status(MLA_UNSUPPORTED, format, args);
  va_end(args);
  return status;
}

void set_last_error(const char* message) noexcept {
  const size_t length = strnlen(message, kMaxMessage - 1);
  std::memcpy(t_last_error, message, length);
  t_last_error[length] = '\0';
}

const char* last_error() noexcept { return t_last_error; }

}  // namespace mla
