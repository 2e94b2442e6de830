// mla_problem as a Python class, field by field. Names and defaults for people are _problem.py's business.
#include "bindings.h"

#include <string>
#include <utility>
#include <vector>

namespace mlakit_py {

namespace {

// One of the header's enums, as name -> value, under a function of that name.
using Names = nb::typed<nb::dict, nb::str, nb::int_>;

void bind_names(nb::module_& m, const char* function, std::vector<std::pair<const char*, int64_t>> values) {
  m.def(function, [values = std::move(values)]() -> Names {
    nb::dict result;
    for (const auto& [name, value] : values) result[name] = value;
    return result;
  });
}

}  // namespace

void bind_problem(nb::module_& m) {
  bind_names(m, "devices", {{"cpu", MLA_DEVICE_CPU}, {"cuda", MLA_DEVICE_CUDA}});
  bind_names(m, "dtypes",
             {{"bf16", MLA_DTYPE_BF16},
              {"fp16", MLA_DTYPE_FP16},
              {"fp32", MLA_DTYPE_FP32},
              {"e4m3", MLA_DTYPE_E4M3},
              {"int32", MLA_DTYPE_INT32}});
  bind_names(m, "kv_formats",
             {{"plain", MLA_KV_PLAIN},
              {"fp8_tensor", MLA_KV_FP8_TENSOR},
              {"fp8_656", MLA_KV_FP8_656},
              {"fp8_584", MLA_KV_FP8_584}});
  bind_names(m, "splits", {{"balanced", MLA_SPLIT_BALANCED}, {"fixed_chunk", MLA_SPLIT_FIXED_CHUNK}});
  bind_names(m, "flags",
             {{"causal", MLA_PROBLEM_CAUSAL},
              {"ragged_q", MLA_PROBLEM_RAGGED_Q},
              {"lse_base2", MLA_PROBLEM_LSE_BASE2},
              {"tree_mask", MLA_PROBLEM_TREE_MASK},
              {"extra_segment", MLA_PROBLEM_EXTRA_SEGMENT},
              {"debug", MLA_PROBLEM_DEBUG}});

  nb::class_<mla_problem>(m, "Problem")
      .def("__init__", [](mla_problem* self) { check(mla_problem_init(self)); })
      .def_rw("flags", &mla_problem::flags)
      .def_rw("device_type", &mla_problem::device_type)
      .def_rw("device_id", &mla_problem::device_id)
      .def_rw("q_dtype", &mla_problem::q_dtype)
      .def_rw("kv_dtype", &mla_problem::kv_dtype)
      .def_rw("out_dtype", &mla_problem::out_dtype)
      .def_rw("kv_format", &mla_problem::kv_format)
      .def_rw("max_batch", &mla_problem::max_batch)
      .def_rw("q_len", &mla_problem::q_len)
      .def_rw("max_q_tokens", &mla_problem::max_q_tokens)
      .def_rw("max_len", &mla_problem::max_len)
      .def_rw("max_tokens", &mla_problem::max_tokens)
      .def_rw("q_heads", &mla_problem::q_heads)
      .def_rw("kv_heads", &mla_problem::kv_heads)
      .def_rw("head_dim", &mla_problem::head_dim)
      .def_rw("value_dim", &mla_problem::value_dim)
      .def_rw("page_size", &mla_problem::page_size)
      .def_rw("split_policy", &mla_problem::split_policy)
      .def_rw("chunk_tokens", &mla_problem::chunk_tokens)
      .def_rw("topk", &mla_problem::topk)
      .def_rw("cp_world", &mla_problem::cp_world)
      .def_rw("cp_rank", &mla_problem::cp_rank)
      .def_rw("cp_turn", &mla_problem::cp_turn)
      .def_rw("softmax_scale", &mla_problem::softmax_scale)
      .def("format",
           [](const mla_problem& self) {
             size_t needed = 0;
             mla_problem_format(&self, nullptr, 0, &needed);  // refused for want of room, but tells the size
             std::string text(needed, '\0');
             check(mla_problem_format(&self, text.data(), text.size(), &needed));
             text.resize(needed - 1);
             return text;
           })
      .def_static(
          "parse",
          [](const std::string& text) {
            mla_problem problem;
            check(mla_problem_parse(&problem, text.c_str()));
            return problem;
          },
          nb::arg("text"));
}

}  // namespace mlakit_py
