// mla.hpp compiles alone.
#include "mlakit/mla.hpp"

std::string use_of_each_class(mla::Tensor tensor) {
  const mla_problem problem = mla::make_problem(MLA_DTYPE_BF16, 1, 1, 1);
  const mla::Context context;
  const mla::Plan plan(context, problem);
  const mla::Workspace work(plan);
  plan.schedule(work, tensor);
  plan.decode(work, {.q = tensor, .kv_cache = tensor, .block_table = tensor, .out = tensor});
  context.merge({.out_parts = tensor, .lse_parts = tensor, .out = tensor});
  return mla::to_string(problem) + plan.info().backend;
}
