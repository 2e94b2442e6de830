// mla_problem as one line, and back. The grammar is in mla.h.
#include "problem_string.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <string_view>

#include "dtype_table.h"
#include "validate.h"

namespace mla {
namespace {

// Numbers written as prefix + value, in the order of the string. Those before the flags are always written.
struct NumberField {
  const char* prefix;
  int64_t mla_problem::* wide;
  int32_t mla_problem::* narrow;

  int64_t get(const mla_problem& p) const { return wide != nullptr ? p.*wide : p.*narrow; }
  bool set(mla_problem& p, int64_t value) const {
    if (wide != nullptr) {
      p.*wide = value;
    } else {
      if (value > INT32_MAX) return false;
      p.*narrow = static_cast<int32_t>(value);
    }
    return true;
  }
};

constexpr NumberField kAlways[] = {
    {"b", &mla_problem::max_batch, nullptr}, {"q", &mla_problem::q_len, nullptr},
    {"h", nullptr, &mla_problem::q_heads},   {"k", nullptr, &mla_problem::kv_heads},
    {"d", nullptr, &mla_problem::head_dim},  {"v", nullptr, &mla_problem::value_dim},
    {"p", nullptr, &mla_problem::page_size}, {"l", &mla_problem::max_len, nullptr},
};
constexpr NumberField kMaxQTokens = {"t", &mla_problem::max_q_tokens, nullptr};
constexpr NumberField kMaxTokens = {"m", &mla_problem::max_tokens, nullptr};
constexpr NumberField kCpTurn = {"turn", nullptr, &mla_problem::cp_turn};
constexpr NumberField kTopk = {"top", nullptr, &mla_problem::topk};

struct Word {
  const char* text;
  uint32_t value;
};

constexpr Word kFlagWords[] = {
    {"causal", MLA_PROBLEM_CAUSAL},  {"ragged", MLA_PROBLEM_RAGGED_Q},     {"lse2", MLA_PROBLEM_LSE_BASE2},
    {"tree", MLA_PROBLEM_TREE_MASK}, {"extra", MLA_PROBLEM_EXTRA_SEGMENT}, {"debug", MLA_PROBLEM_DEBUG},
};
constexpr Word kFormatWords[] = {
    {"fp8tensor", MLA_KV_FP8_TENSOR}, {"fp8656", MLA_KV_FP8_656}, {"fp8584", MLA_KV_FP8_584}};

template <size_t N>
const Word* find_word(const Word (&words)[N], std::string_view text) {
  for (const Word& word : words) {
    if (text == word.text) return &word;
  }
  return nullptr;
}

bool takes_prefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// A whole non-negative decimal number.
bool parse_number(std::string_view text, int64_t& value) {
  if (text.empty() || text[0] == '-') return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse_int32(std::string_view text, int32_t& value) {
  int64_t wide = 0;
  if (!parse_number(text, wide) || wide > INT32_MAX) return false;
  value = static_cast<int32_t>(wide);
  return true;
}

// Shortest text that reads back as the same float, whatever the locale.
std::string float_text(float value) {
  char buffer[32];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value);
  return std::string(buffer, end);
}

// The numbers need not be valid ones, so the product may overflow.
bool is_product(int64_t value, int64_t a, int64_t b) {
  int64_t product = 0;
  return !__builtin_mul_overflow(a, b, &product) && value == product;
}

const DTypeInfo* find_dtype_name(std::string_view name) {
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return &info;
  }
  return nullptr;
}

// What a part of the string stands for, so that naming it twice can be refused.
enum class Key : uint32_t {
  kFirstNumber = 0,
  kMaxQ = 8,
  kMaxTok,
  kKv,
  kOut,
  kFormat,
  kFirstFlag,
  kChunk = 19,
  kTop,
  kCp,
  kTurn,
  kScale,
  kCuda,
  kUnknown
};

// Reads one part into problem.
Key parse_part(std::string_view part, mla_problem& p) {
  std::string_view rest;
  int64_t number = 0;
  if (const Word* word = find_word(kFlagWords, part)) {
    p.flags |= word->value;
    return static_cast<Key>(static_cast<uint32_t>(Key::kFirstFlag) + static_cast<uint32_t>(word - kFlagWords));
  }
  if (const Word* word = find_word(kFormatWords, part)) {
    p.kv_format = static_cast<int32_t>(word->value);
    return Key::kFormat;
  }
  if (rest = part; takes_prefix(rest, "kv")) {
    const DTypeInfo* dtype = find_dtype_name(rest);
    if (dtype == nullptr) return Key::kUnknown;
    p.kv_dtype = static_cast<int32_t>(dtype->dtype);
    return Key::kKv;
  }
  if (rest = part; takes_prefix(rest, "out")) {
    const DTypeInfo* dtype = find_dtype_name(rest);
    if (dtype == nullptr) return Key::kUnknown;
    p.out_dtype = static_cast<int32_t>(dtype->dtype);
    return Key::kOut;
  }
  if (rest = part; takes_prefix(rest, "chunk")) {
    p.split_policy = MLA_SPLIT_FIXED_CHUNK;
    return parse_int32(rest, p.chunk_tokens) ? Key::kChunk : Key::kUnknown;
  }
  if (rest = part; takes_prefix(rest, "cuda")) {
    p.device_type = MLA_DEVICE_CUDA;
    return parse_int32(rest, p.device_id) ? Key::kCuda : Key::kUnknown;
  }
  if (rest = part; takes_prefix(rest, "scale")) {
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), p.softmax_scale);
    return error == std::errc() && end == rest.data() + rest.size() && !rest.empty() ? Key::kScale : Key::kUnknown;
  }
  if (rest = part; takes_prefix(rest, "cp")) {
    const size_t of = rest.find("of");
    const bool is_read = of != std::string_view::npos && parse_int32(rest.substr(0, of), p.cp_rank) &&
                         parse_int32(rest.substr(of + 2), p.cp_world);
    return is_read ? Key::kCp : Key::kUnknown;
  }
  const struct {
    const NumberField& field;
    Key key;
  } optional[] = {{kTopk, Key::kTop}, {kCpTurn, Key::kTurn}, {kMaxQTokens, Key::kMaxQ}, {kMaxTokens, Key::kMaxTok}};
  for (const auto& [field, key] : optional) {
    if (rest = part; takes_prefix(rest, field.prefix) && parse_number(rest, number))
      return field.set(p, number) ? key : Key::kUnknown;
  }
  for (uint32_t i = 0; i < std::size(kAlways); ++i) {
    if (rest = part; takes_prefix(rest, kAlways[i].prefix) && parse_number(rest, number)) {
      return kAlways[i].set(p, number) ? static_cast<Key>(i) : Key::kUnknown;
    }
  }
  return Key::kUnknown;
}

Status bad_part(std::string_view part, const char* what) {
  return invalid("text: %s, got \"%.*s\"", what, static_cast<int>(part.size() < 80 ? part.size() : 80), part.data());
}

}  // namespace

mla_problem default_problem() {
  mla_problem p = {};
  p.struct_size = sizeof p;
  p.device_type = MLA_DEVICE_CPU;
  p.q_dtype = MLA_DTYPE_BF16;
  p.max_batch = 1;
  p.q_len = 1;
  p.kv_heads = 1;
  p.head_dim = 576;
  p.value_dim = 512;
  p.page_size = 64;
  p.cp_world = 1;
  return p;
}

Status format_problem(const mla_problem& p, std::string& text) {
  MLA_RETURN_IF_ERROR(check_problem_enums(p));
  const auto add = [&](const char* name, const std::string& value) { text += std::string(":") + name + value; };
  const auto add_number = [&](const NumberField& field) { add(field.prefix, std::to_string(field.get(p))); };

  text = p.topk > 0 ? "sparse:" : "dense:";
  text += find_dtype(p.q_dtype)->name;
  for (const NumberField& field : kAlways) add_number(field);
  if (p.max_q_tokens != 0 && !is_product(p.max_q_tokens, p.max_batch, p.q_len)) add_number(kMaxQTokens);
  if (p.max_tokens != 0 && !is_product(p.max_tokens, p.max_batch, p.max_len)) add_number(kMaxTokens);
  if (p.kv_dtype != MLA_DTYPE_DEFAULT && p.kv_dtype != p.q_dtype) add("kv", find_dtype(p.kv_dtype)->name);
  if (p.out_dtype != MLA_DTYPE_DEFAULT && p.out_dtype != p.q_dtype) add("out", find_dtype(p.out_dtype)->name);
  for (const Word& word : kFormatWords) {
    if (p.kv_format == static_cast<int32_t>(word.value)) add(word.text, "");
  }
  for (const Word& word : kFlagWords) {
    if ((p.flags & word.value) != 0) add(word.text, "");
  }
  if (p.split_policy == MLA_SPLIT_FIXED_CHUNK)
    add("chunk", std::to_string(p.chunk_tokens != 0 ? p.chunk_tokens : kDefaultChunkTokens));
  if (p.topk > 0) add_number(kTopk);
  if (p.cp_world > 1) add("cp", std::to_string(p.cp_rank) + "of" + std::to_string(p.cp_world));
  if (p.cp_turn > 1) add_number(kCpTurn);
  if (p.softmax_scale != 0 && p.softmax_scale != default_softmax_scale(p.head_dim))
    add("scale", float_text(p.softmax_scale));
  if (p.device_type == MLA_DEVICE_CUDA) add("cuda", std::to_string(p.device_id));
  return Status::ok();
}

Status parse_problem(const char* text, mla_problem& problem) {
  if (text == nullptr) return invalid("text: must be a problem string, got NULL");
  mla_problem p = default_problem();
  std::string_view rest = text;
  const auto next = [&] {
    const size_t colon = rest.find(':');
    const std::string_view part = rest.substr(0, colon);
    rest = colon == std::string_view::npos ? std::string_view() : rest.substr(colon + 1);
    return part;
  };
  const std::string_view kind = next();
  if (kind != "dense" && kind != "sparse") return bad_part(kind, "must begin with dense: or sparse:");
  const std::string_view dtype_name = next();
  const DTypeInfo* q_dtype = find_dtype_name(dtype_name);
  if (q_dtype == nullptr) return bad_part(dtype_name, "the second part must be bf16, fp16 or fp32");
  p.q_dtype = static_cast<int32_t>(q_dtype->dtype);

  uint64_t seen = 0;
  const bool ends_in_colon = text[0] != '\0' && text[std::strlen(text) - 1] == ':';
  while (!rest.empty() || ends_in_colon) {
    const std::string_view part = next();
    const Key key = parse_part(part, p);
    if (key == Key::kUnknown) return bad_part(part, "every part must be one that mla.h names, with a number in range");
    const uint64_t bit = uint64_t{1} << static_cast<uint32_t>(key);
    if ((seen & bit) != 0) return bad_part(part, "every part may come once");
    seen |= bit;
  }
  if ((kind == "sparse") != (p.topk > 0)) return bad_part(text, "sparse and top<k> must come together");
  problem = p;
  return Status::ok();
}

}  // namespace mla
