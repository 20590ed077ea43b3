// The operators flash_attention_cpu and flash_attention_backward_cpu: checks, allocation, division
// into tasks.
#include "cpu/flash_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/attention_checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vlmfast::cpu {
namespace {

enum Causal : int64_t { kNone, kTopLeft, kBottomRight };

struct Inputs {
  const Tensor &query, &key, &value;
  const MaybeTensor &mask, &cu_seqlens_q, &cu_seqlens_k;
  int64_t causal;
  double scale, dropout_p;
  const MaybeTensor& dropout_seed;
};

void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t total) {
  check_cpu(name, cu_seqlens);
  check_dim(name, cu_seqlens, 1);
  VLMFAST_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, name, ": expected int32");
  VLMFAST_CHECK(cu_seqlens.is_contiguous(), name, ": expected a contiguous tensor");
  const int64_t n = cu_seqlens.numel();
  VLMFAST_CHECK(n >= 1, name, ": expected at least one element");
  const int32_t* x = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  VLMFAST_CHECK(x[0] == 0, name, ": expected to start at 0, got ", x[0]);
  for (int64_t i = 1; i < n; i++)
    VLMFAST_CHECK(x[i] >= x[i - 1], name, ": expected not to decrease, got ", x[i], " after ",
                  x[i - 1]);
  VLMFAST_CHECK(x[n - 1] <= total, name, ": expected at most ", total, " rows, got ", x[n - 1]);
}

// Fills what forward and backward share, after checking everything that a wrong value of could
// touch foreign memory.
void describe(const Inputs& in, FlashAttentionProblem* problem) {
  problem->dtype = check_attention(in.query, in.key, in.value, 4);
  const int64_t batch = in.query.size(0), heads = in.query.size(1), length = in.query.size(2);
  const int64_t key_heads = in.key.size(1), keys = in.key.size(2);
  constexpr int64_t most = 1 << 29;
  VLMFAST_CHECK(heads <= most && length <= most && keys <= most && in.query.size(3) <= 65536 &&
                    in.value.size(3) <= 65536,
                "query, key, value: expected at most ", most, " heads, lengths of at most ", most,
                " and head dimensions of at most 65536");
  VLMFAST_CHECK(in.causal >= kNone && in.causal <= kBottomRight, "causal: expected 0, 1 or 2, got ",
                in.causal);
  VLMFAST_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1,
                "dropout_p: expected a value in [0, 1], got ", in.dropout_p);
  VLMFAST_CHECK(in.cu_seqlens_q.has_value() == in.cu_seqlens_k.has_value(),
                "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  if (in.cu_seqlens_q) {
    VLMFAST_CHECK(batch == 1, "query: expected a batch of 1 with packed sequences, got ", batch);
    VLMFAST_CHECK(!in.mask, "attn_mask: expected None with packed sequences");
    check_cu_seqlens("cu_seqlens_q", *in.cu_seqlens_q, length);
    check_cu_seqlens("cu_seqlens_k", *in.cu_seqlens_k, keys);
    check_size("cu_seqlens_k", *in.cu_seqlens_k, 0, in.cu_seqlens_q->size(0));
  }
  problem->query = strided(in.query);
  problem->key = strided(in.key);
  problem->value = strided(in.value);
  problem->heads = static_cast<int>(heads);
  problem->group = key_heads > 0 ? static_cast<int>(heads / key_heads) : 1;
  problem->query_length = length;
  problem->head_dim = static_cast<int>(in.query.size(3));
  problem->value_dim = static_cast<int>(in.value.size(3));
  problem->causal = in.causal != kNone;
  problem->scale = static_cast<float>(in.scale);
  problem->dropout_p = in.dropout_p;
  if (in.mask) {
    check_dim("attn_mask", *in.mask, 4);
    check_cpu("attn_mask", *in.mask);
    problem->mask = strided(*in.mask);
    problem->mask_dtype = element_type("attn_mask", *in.mask, true);
    const int64_t sizes[4] = {batch, heads, length, keys};
    for (int i = 0; i < 4; i++) {
      if (in.mask->size(i) == 1) problem->mask.stride[i] = 0;
      if (in.mask->size(i) != 1) check_size("attn_mask", *in.mask, i, sizes[i]);
    }
  }
  if (in.dropout_p > 0) problem->dropout_seed = read_dropout_seed(in.dropout_seed);
}

// Where no query meets a key, however many batch elements there are: everything is 0, and no task
// need say so.
bool has_no_scores(const Inputs& in) {
  return in.query.size(0) == 0 || in.query.size(1) == 0 || in.query.size(2) == 0 ||
         in.key.size(2) == 0;
}

// A run of queries that sees one run of keys: a batch element, or a packed sequence.
struct Segment {
  int64_t batch;
  int q_begin, q_end, k_begin, k_end, causal_shift;
};

std::vector<Segment> segments(const Inputs& in) {
  std::vector<Segment> result;
  const int length = static_cast<int>(in.query.size(2)), keys = static_cast<int>(in.key.size(2));
  const auto add = [&](int64_t batch, int q0, int q1, int k0, int k1) {
    const int shift = in.causal == kNone
                          ? kNotCausal
                          : k0 - q0 + (in.causal == kBottomRight ? (k1 - k0) - (q1 - q0) : 0);
    result.push_back({batch, q0, q1, k0, k1, shift});
  };
  if (!in.cu_seqlens_q) {
    for (int64_t b = 0; b < in.query.size(0); b++) add(b, 0, length, 0, keys);
    return result;
  }
  const auto* q = static_cast<const int32_t*>(in.cu_seqlens_q->const_data_ptr());
  const auto* k = static_cast<const int32_t*>(in.cu_seqlens_k->const_data_ptr());
  const int64_t n = in.cu_seqlens_q->numel() - 1;
  for (int64_t i = 0; i < n; i++) add(0, q[i], q[i + 1], k[i], k[i + 1]);
  // Rows past the last sequence see nothing: a segment without keys zeroes them, one without
  // queries zeroes the gradients of the keys.
  add(0, q[n], length, k[n], k[n]);
  add(0, length, length, k[n], keys);
  return result;
}

void set_maxima(const std::vector<FlashAttentionTask>& tasks, FlashAttentionProblem* problem) {
  problem->max_queries = problem->max_keys = 0;
  for (const auto& task : tasks) {
    problem->max_queries = std::max(problem->max_queries, task.q_end - task.q_begin);
    problem->max_keys = std::max(problem->max_keys, task.k_end - task.k_begin);
  }
}

// Tasks of whole segments where there are enough of them, else of runs of tiles; at least
// kTilesPerTask, since every task packs its keys afresh.
std::vector<FlashAttentionTask> forward_tasks(const std::vector<Segment>& all, int heads,
                                              int queries_per_tile) {
  constexpr int kTilesPerTask = 4, kMostTilesPerTask = 32;
  int64_t tiles = 0;
  for (const auto& s : all)
    tiles += (int64_t)heads * divide_up(s.q_end - s.q_begin, queries_per_tile);
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t per_task = std::clamp<int64_t>(tiles / wanted, kTilesPerTask, kMostTilesPerTask);
  std::vector<FlashAttentionTask> tasks;
  for (const auto& s : all)
    for (int head = 0; head < heads; head++) {
      const int length = s.q_end - s.q_begin;
      const int step = static_cast<int>(per_task) * queries_per_tile,
                parts = std::max(1, divide_up(length, step));
      // Equal parts, each a whole number of tiles but the last.
      const int rows = divide_up(divide_up(length, parts), queries_per_tile) * queries_per_tile;
      for (int first = 0; first < length; first += rows)
        tasks.push_back({s.batch, head, s.q_begin + first,
                         std::min(s.q_end, s.q_begin + first + rows), s.k_begin, s.k_end,
                         s.causal_shift});
    }
  return tasks;
}

std::tuple<Tensor, Tensor> flash_attention(const Tensor& query, const Tensor& key,
                                           const Tensor& value, MaybeTensor mask,
                                           MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                           int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                           int64_t causal, double scale, double dropout_p,
                                           MaybeTensor dropout_seed) {
  const Inputs in{query,        key,    value, mask,      cu_seqlens_q,
                  cu_seqlens_k, causal, scale, dropout_p, dropout_seed};
  FlashAttentionForward problem;
  describe(in, &problem);
  Tensor out = empty_rows(query, query.size(2), value.size(3));
  Tensor logsumexp = empty({query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  problem.out = strided(out);
  problem.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  if (has_no_scores(in)) {
    torch::stable::zero_(out);
    std::fill_n(problem.logsumexp, logsumexp.numel(), -std::numeric_limits<float>::infinity());
    return {out, logsumexp};
  }
  problem.prefetch = exceeds_cache({&query, &key, &value, &out});
  const FlashAttentionKernel& run = VLMFAST_CURRENT_VARIANT(flash_attention_kernel);
  const auto tasks = forward_tasks(segments(in), problem.heads, run.queries_per_tile);
  set_maxima(tasks, &problem);
  for_each_task(static_cast<int64_t>(tasks.size()), run.forward_scratch(problem),
                [&](const Claim& claim, float* scratch) {
                  run.forward(problem, tasks[claim.task], tasks[claim.next], scratch);
                });
  return {out, logsumexp};
}

// Backward runs one task per key head and segment, so that grad_key and grad_value have one writer.
// Where those are fewer than the threads, the keys are split further, and the partial sums of
// grad_query are added in order afterwards.
int key_splits(const std::vector<Segment>& all, int64_t key_heads, int64_t split_bytes) {
  int64_t units = 0, max_keys = 0;
  for (const auto& s : all) {
    if (s.q_end > s.q_begin && s.k_end > s.k_begin) units += key_heads;
    max_keys = std::max<int64_t>(max_keys, s.k_end - s.k_begin);
  }
  const int64_t threads = torch::stable::get_num_threads();
  if (units == 0 || units >= threads) return 1;
  // Every split packs the queries afresh: on two threads 384 keys of one head are computed fastest
  // in parts of 192 or 96, slower in parts of 48 or whole (backward, Zen 3).
  constexpr int64_t kKeysPerSplit = 192;
  const int64_t wanted = divide_up(2 * threads, units);
  const int64_t most =
      std::min(max_keys / kKeysPerSplit, kMostPartialBytes / std::max<int64_t>(split_bytes, 1));
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

std::vector<FlashAttentionTask> backward_tasks(const std::vector<Segment>& all, int key_heads,
                                               int splits, bool heads_first) {
  std::vector<FlashAttentionTask> tasks;
  const auto add = [&](const Segment& s, int head) {
    const int n = s.k_end - s.k_begin;
    for (int i = 0; i < splits; i++) {
      const int k0 = s.k_begin + static_cast<int>((int64_t)n * i / splits);
      const int k1 = s.k_begin + static_cast<int>((int64_t)n * (i + 1) / splits);
      tasks.push_back(
          {s.batch, head, s.q_begin, s.q_end, k0, k1, s.causal_shift, s.k_begin, s.k_end, i, 0});
    }
  };
  if (heads_first) {
    for (int head = 0; head < key_heads; head++)
      for (const auto& s : all) add(s, head);
  } else {
    for (const auto& s : all)
      for (int head = 0; head < key_heads; head++) add(s, head);
  }
  return tasks;
}

// The gradient of a mask that broadcasts is a sum over tasks, which must not depend on the threads'
// timing: tasks that add to the same element run one after the other in one unit. Where that would
// leave threads idle, units get copies of their own, added in order at the end.
struct MaskUnits {
  std::vector<std::vector<int64_t>> tasks;
  bool copies;
};

MaskUnits mask_units(std::vector<FlashAttentionTask>* tasks, const Tensor& mask) {
  const bool by_batch = mask.size(0) != 1, by_head = mask.size(1) != 1, by_key = mask.size(3) != 1;
  std::vector<std::vector<int64_t>> exclusive;
  std::map<std::tuple<int64_t, int, int>, size_t> unit_of;
  for (size_t i = 0; i < tasks->size(); i++) {
    const auto& task = (*tasks)[i];
    const auto [at, is_new] = unit_of.try_emplace(
        {by_batch ? task.batch : 0, by_head ? task.head : 0, by_key ? task.split : 0},
        exclusive.size());
    if (is_new) exclusive.emplace_back();
    exclusive[at->second].push_back(static_cast<int64_t>(i));
  }
  const size_t threads = torch::stable::get_num_threads();
  if (exclusive.size() >= std::min(threads, tasks->size())) return {exclusive, false};
  const int64_t most_copies = kMostPartialBytes / (std::max<int64_t>(mask.numel(), 1) * 4);
  const size_t copies = std::min({threads, tasks->size(), static_cast<size_t>(most_copies)});
  if (copies <= exclusive.size()) return {exclusive, false};
  std::vector<std::vector<int64_t>> shared(copies);
  for (size_t i = 0; i < tasks->size(); i++) {
    const size_t unit = i * copies / tasks->size();
    (*tasks)[i].unit = static_cast<int>(unit);
    shared[unit].push_back(static_cast<int64_t>(i));
  }
  return {shared, true};
}

// The gradient of a mask that all keys share. What it adds to a row of logits changes no weight but
// the logsumexp alone, and only that of rows that see a key.
Tensor row_mask_gradient(const Tensor& mask, const Tensor& query, const float* logsumexp,
                         const float* grad_logsumexp) {
  const int64_t sizes[4] = {mask.size(0), mask.size(1), mask.size(2), 1};
  Tensor result = zeros(sizes, ScalarType::Float);
  if (grad_logsumexp != nullptr) {
    std::vector<double> sums(mask.numel());
    const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
    const int64_t row_step = sizes[2] != 1, head_step = sizes[1] != 1 ? sizes[2] : 0,
                  batch_step = sizes[0] != 1 ? sizes[1] * sizes[2] : 0;
    int64_t row = 0;
    for (int64_t b = 0; b < batch; b++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < length; i++, row++)
          if (logsumexp[row] != -std::numeric_limits<float>::infinity())
            sums[b * batch_step + h * head_step + i * row_step] += grad_logsumexp[row];
    std::copy(sums.begin(), sums.end(), static_cast<float*>(result.mutable_data_ptr()));
  }
  return torch::stable::to(result, mask.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& grad_out, MaybeTensor grad_logsumexp, const Tensor& query, const Tensor& key,
    const Tensor& value, MaybeTensor mask, const Tensor& out, const Tensor& logsumexp,
    MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, int64_t causal, double scale, double dropout_p,
    MaybeTensor dropout_seed, bool query_grad, bool key_value_grad, bool mask_grad) {
  const Inputs in{query,        key,    value, mask,      cu_seqlens_q,
                  cu_seqlens_k, causal, scale, dropout_p, dropout_seed};
  FlashAttentionBackward problem;
  describe(in, &problem);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2),
                head_dim = query.size(3);
  const MaybeTensor grad_rows =
      read_results(grad_out, grad_logsumexp, query, out, logsumexp, &problem);
  problem.wants_query = query_grad;
  problem.wants_key_value = key_value_grad;

  Tensor grad_query = query_grad ? empty_rows(query, length, head_dim) : nothing(query);
  Tensor grad_key = key_value_grad ? empty_rows(key, key.size(2), head_dim) : nothing(key);
  Tensor grad_value =
      key_value_grad ? empty_rows(value, value.size(2), value.size(3)) : nothing(value);
  problem.prefetch =
      exceeds_cache({&query, &key, &value, &out, &grad_out, &grad_query, &grad_key, &grad_value});
  if (query_grad) problem.grad_query = strided(grad_query);
  if (key_value_grad) {
    problem.grad_key = strided(grad_key);
    problem.grad_value = strided(grad_value);
  }
  Tensor grad_mask = mask ? nothing(*mask) : nothing(query);
  bool wants_mask = mask_grad && mask && problem.mask_dtype != ElementType::kBool;
  if (wants_mask && mask->size(3) == 1) {
    grad_mask = row_mask_gradient(*mask, query, problem.logsumexp, problem.grad_logsumexp);
    wants_mask = false;
  }
  if (has_no_scores(in)) {
    if (wants_mask) grad_mask = torch::stable::new_zeros(*mask, mask->sizes());
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*grad);
    return {grad_query, grad_key, grad_value, grad_mask};
  }
  problem.exact_delta = wants_mask && problem.dtype != ElementType::kFloat;

  const FlashAttentionKernel& run = VLMFAST_CURRENT_VARIANT(flash_attention_kernel);
  const int key_heads = static_cast<int>(key.size(1));
  const auto all = segments(in);
  problem.grad_query_split_size = batch * heads * length * head_dim;
  const int splits = key_splits(all, key_heads, problem.grad_query_split_size * 4);
  MaybeTensor partial;
  if (splits > 1 && query_grad) {
    partial = empty({splits, problem.grad_query_split_size}, ScalarType::Float);
    problem.grad_query_splits = static_cast<float*>(partial->mutable_data_ptr());
  }
  auto tasks = backward_tasks(all, key_heads, splits, wants_mask && mask->size(0) == 1);
  set_maxima(tasks, &problem);
  const auto run_task = [&](int64_t task, int64_t next, float* scratch) {
    run.backward(problem, tasks[task], tasks[next], scratch);
  };
  if (!wants_mask) {
    for_each_task(
        static_cast<int64_t>(tasks.size()), run.backward_scratch(problem),
        [&](const Claim& claim, float* scratch) { run_task(claim.task, claim.next, scratch); });
  } else {
    const MaskUnits units = mask_units(&tasks, *mask);
    const int64_t copies = units.copies ? static_cast<int64_t>(units.tasks.size()) : 1;
    const int64_t m[4] = {mask->size(0), mask->size(1), mask->size(2), mask->size(3)};
    Tensor sums =
        torch::stable::new_zeros(*mask, {copies, m[0], m[1], m[2], m[3]}, ScalarType::Float);
    problem.grad_mask = static_cast<float*>(sums.mutable_data_ptr());
    problem.grad_mask_unit_size = units.copies ? mask->numel() : 0;
    int64_t stride = 1;
    for (int i = 3; i >= 0; i--) {
      problem.grad_mask_stride[i] = m[i] == 1 ? 0 : stride;
      stride *= m[i];
    }
    for_each_task(static_cast<int64_t>(units.tasks.size()), run.backward_scratch(problem),
                  [&](const Claim& unit, float* scratch) {
                    const auto& list = units.tasks[unit.task];
                    for (size_t i = 0; i < list.size(); i++)
                      run_task(list[i], list[std::min(i + 1, list.size() - 1)], scratch);
                  });
    const int64_t first_dim = 0;
    Tensor total = copies == 1 ? torch::stable::select(sums, 0, 0)
                               : torch::stable::sum(
                                     sums, torch::headeronly::IntHeaderOnlyArrayRef(&first_dim, 1));
    grad_mask = torch::stable::to(total, mask->scalar_type());
  }
  if (problem.grad_query_splits != nullptr) {
    for_each_task(batch * heads * length, 0, [&](const Claim& claim, float*) {
      const int64_t row = claim.task;
      run.sum_splits(problem, splits, row / length / heads, row / length % heads, row % length);
    });
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace vlmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(vlmfast, CPU, m) {
  m.impl("flash_attention_cpu", TORCH_BOX(&vlmfast::cpu::flash_attention));
  m.impl("flash_attention_backward_cpu", TORCH_BOX(&vlmfast::cpu::flash_attention_backward));
}
