/* A native engine in C99: a paged cache of three requests, one of them empty, decoded once through the C ABI.
 *
 * The numbers come from an integer formula, so that any language can repeat them and compare the lines printed here. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "mlakit/mla.h"

enum { BATCH = 3, HEADS = 4, HEAD_DIM = 576, VALUE_DIM = 512, PAGE_SIZE = 16, PAGES = 20, WIDTH = 9 };

static void check(mla_status status) {
  if (status == MLA_OK) return;
  fprintf(stderr, "%s: %s\n", mla_status_string(status), mla_last_error());
  exit(1);
}

/* Workspaces need an alignment that malloc does not promise. Lives as long as the program. */
static void* allocate(uint64_t bytes, uint64_t alignment) {
  char* raw = malloc((size_t)(bytes + alignment));
  if (raw == NULL) exit(1);
  return raw + (alignment - (uintptr_t)raw % alignment);
}

/* Element i of a tensor: a multiple of 1/256 in [-0.5, 0.5). */
static float value(uint32_t i) {
  uint32_t x = i * 2654435761u;
  x = (x ^ (x >> 15)) * 2246822519u;
  return (float)(x >> 24) / 256.0f - 0.5f;
}

int main(void) {
  static float q[BATCH * HEADS * HEAD_DIM], cache[PAGES * PAGE_SIZE * HEAD_DIM], out[BATCH * HEADS * VALUE_DIM],
      lse[BATCH * HEADS];
  const int32_t lengths[BATCH] = {130, 0, 77};
  int32_t table[BATCH * WIDTH];
  uint32_t i;
  for (i = 0; i < BATCH * HEADS * HEAD_DIM; ++i) q[i] = value(i);
  for (i = 0; i < PAGES * PAGE_SIZE * HEAD_DIM; ++i) cache[i] = value(i + 1000000);
  for (i = 0; i < BATCH * WIDTH; ++i) table[i] = (int32_t)(i * 7 % PAGES); /* the pages of a request may lie anywhere */

  /* Once: what will be decoded, and how. */
  mla_problem problem;
  mla_context* context;
  mla_plan* plan;
  mla_plan_info info = {.struct_size = sizeof info};
  check(mla_problem_init(&problem));
  problem.q_dtype = MLA_DTYPE_FP32;
  problem.max_batch = BATCH;
  problem.max_len = WIDTH * PAGE_SIZE;
  problem.q_heads = HEADS;
  problem.page_size = PAGE_SIZE;
  problem.softmax_scale = 0.0721687824f; /* (128 + 64) ** -0.5: the head_dim before weight absorption */
  check(mla_context_create(&context, NULL));
  check(mla_plan_create(&plan, context, &problem));
  check(mla_plan_get_info(plan, &info));
  void* schedule = allocate(info.schedule_bytes, info.schedule_alignment);
  void* scratch = allocate(info.scratch_bytes, info.scratch_alignment);

  /* Once a step: the lengths. */
  mla_tensor_storage lengths_t, q_t, cache_t, table_t, out_t, lse_t;
  const mla_schedule_args step = {.struct_size = sizeof step,
                                  .cache_seqlens = mla_tensor_init(&lengths_t, (void*)lengths, MLA_DTYPE_INT32,
                                                                   MLA_DEVICE_CPU, 0, 1, (int64_t[]){BATCH}, NULL),
                                  .schedule = schedule,
                                  .schedule_bytes = info.schedule_bytes};
  check(mla_schedule(plan, &step, NULL));

  /* Once a layer: attention. */
  const mla_decode_args layer = {
      .struct_size = sizeof layer,
      .q = mla_tensor_init(&q_t, q, MLA_DTYPE_FP32, MLA_DEVICE_CPU, 0, 4, (int64_t[]){BATCH, 1, HEADS, HEAD_DIM}, NULL),
      .kv_cache = mla_tensor_init(&cache_t, cache, MLA_DTYPE_FP32, MLA_DEVICE_CPU, 0, 4,
                                  (int64_t[]){PAGES, PAGE_SIZE, 1, HEAD_DIM}, NULL),
      .block_table =
          mla_tensor_init(&table_t, table, MLA_DTYPE_INT32, MLA_DEVICE_CPU, 0, 2, (int64_t[]){BATCH, WIDTH}, NULL),
      .out = mla_tensor_init(&out_t, out, MLA_DTYPE_FP32, MLA_DEVICE_CPU, 0, 4, (int64_t[]){BATCH, 1, HEADS, VALUE_DIM},
                             NULL),
      .lse = mla_tensor_init(&lse_t, lse, MLA_DTYPE_FP32, MLA_DEVICE_CPU, 0, 3, (int64_t[]){BATCH, 1, HEADS}, NULL),
      .schedule = schedule,
      .schedule_bytes = info.schedule_bytes,
      .scratch = scratch,
      .scratch_bytes = info.scratch_bytes};
  check(mla_decode(plan, &layer, NULL));

  for (int request = 0; request < BATCH; ++request) {
    for (int head = 0; head < HEADS; ++head) {
      const float* row = out + (request * HEADS + head) * VALUE_DIM;
      double sum = 0;
      for (int column = 0; column < VALUE_DIM; ++column) sum += row[column];
      printf("request %d token 0 head %d lse %.5f out[0] %.5f out[511] %.5f sum %.4f\n", request, head,
             lse[request * HEADS + head], row[0], row[VALUE_DIM - 1], sum);
    }
  }
  mla_plan_destroy(plan);
  mla_context_destroy(context);
  return 0;
}
