// The operators cross_attention_cpu and cross_attention_backward_cpu: checks, allocation, division
// into tasks.
#include "cpu/cross_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/attention_checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vlmfast::cpu {
namespace {

// An uninitialised (B, H, I, L, D) tensor in the memory order of `like`: heads inside latents, or
// latents inside heads.
Tensor images_like(const Tensor& like) {
  const std::array<int64_t, 5> sizes{like.size(0), like.size(1), like.size(2), like.size(3),
                                     like.size(4)};
  if (like.stride(1) < like.stride(3)) return empty<5>(sizes, like.scalar_type(), {0, 2, 3, 1, 4});
  return empty<5>(sizes, like.scalar_type(), {0, 1, 2, 3, 4});
}

StridedImages strided_images(const Tensor& tensor) {
  StridedImages result;
  result.first.data = tensor.data_ptr();
  result.image_stride = tensor.stride(2);
  const int dims[4] = {0, 1, 3, 4};
  for (int i = 0; i < 4; i++) result.first.stride[i] = tensor.stride(dims[i]);
  return result;
}

struct Inputs {
  const Tensor &query, &key, &value, &image_index;
  const MaybeTensor& visible;
  const Tensor &order, &segments;
  const MaybeTensor& image_lengths;
  double scale;
};

const int32_t* check_integers(const char* name, const Tensor& tensor, int64_t dims) {
  check_cpu(name, tensor);
  check_dim(name, tensor, dims);
  VLMFAST_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous(), name,
                ": expected a contiguous int32 tensor");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// Whether every number is greater than the one before it, from 0 to below `end_value`. Without an
// early exit, so that the compiler may compare many at once.
bool increases(const int32_t* first, const int32_t* end, int32_t end_value) {
  if (first == end) return true;
  bool result = *first >= 0 && end[-1] < end_value;
  for (const int32_t* x = first + 1; x < end; x++) result &= x[-1] < x[0];
  return result;
}

// Everything in a plan that kernels use as an index.
void check_plan(const CrossAttentionProblem& problem, int64_t batch) {
  const int32_t* kinds = problem.image_index;
  const int32_t most = problem.many_images ? std::numeric_limits<int32_t>::max() : problem.images;
  bool known = true;
  for (int64_t i = 0; i < batch * problem.tokens; i++)
    known &= kinds[i] >= kDenseRow && kinds[i] <= most;
  if (!known)
    for (int64_t i = 0; i < batch * problem.tokens; i++)
      VLMFAST_CHECK(kinds[i] >= kDenseRow && kinds[i] <= most,
                    "image_index: expected numbers from -2 to ", most, ", got ", kinds[i]);
  for (int64_t row = 0; row < batch * problem.images; row++) {
    const int32_t* segment = problem.segments + row * 3;
    VLMFAST_CHECK(0 <= segment[0] && segment[0] <= segment[1] && segment[1] <= segment[2] &&
                      segment[2] <= problem.order_size,
                  "segments: expected increasing positions of at most ", problem.order_size);
    VLMFAST_CHECK(problem.many_images || segment[1] == segment[2],
                  "segments: expected one list for each image where visible is None");
    const int32_t* order = problem.order + row / problem.images * problem.order_size;
    for (int part = 0; part < 2; part++)
      VLMFAST_CHECK(increases(order + segment[part], order + segment[part + 1], problem.tokens),
                    "order: expected an image's tokens to increase from 0 to ", problem.tokens - 1);
  }
}

// Fills what forward and backward share, after checking everything that a wrong value of could
// touch foreign memory.
void describe(const Inputs& in, CrossAttentionProblem* problem) {
  problem->dtype = check_attention(in.query, in.key, in.value, 5);
  const int64_t batch = in.query.size(0), heads = in.query.size(1), tokens = in.query.size(2);
  const int64_t key_heads = in.key.size(1), images = in.key.size(2), latents = in.key.size(3);
  VLMFAST_CHECK(in.value.size(4) > 0, "value: expected a head dimension of at least 1, got 0");
  constexpr int64_t most = 1 << 24, most_heads = std::numeric_limits<int>::max();
  VLMFAST_CHECK(tokens <= most && images <= most && latents <= most && in.query.size(3) <= 65536 &&
                    in.value.size(4) <= 65536,
                "query, key, value: expected lengths of at most ", most,
                " and head dimensions of at most 65536");
  VLMFAST_CHECK(batch <= most_heads && heads <= most_heads && key_heads <= most_heads,
                "query, key: expected a batch and heads of at most ", most_heads);
  problem->query = strided(in.query);
  problem->key = strided_images(in.key);
  problem->value = strided_images(in.value);
  problem->heads = static_cast<int>(heads);
  problem->key_heads = static_cast<int>(key_heads);
  problem->group = key_heads > 0 ? static_cast<int>(heads / key_heads) : 1;
  problem->tokens = static_cast<int>(tokens);
  problem->images = static_cast<int>(images);
  problem->latents = static_cast<int>(latents);
  problem->head_dim = static_cast<int>(in.query.size(3));
  problem->value_dim = static_cast<int>(in.value.size(4));
  problem->max_queries = problem->tokens;
  problem->scale = static_cast<float>(in.scale);
  problem->many_images = in.visible.has_value();

  problem->image_index = check_integers("image_index", in.image_index, 2);
  problem->order = check_integers("order", in.order, 2);
  problem->segments = check_integers("segments", in.segments, 3);
  check_size("image_index", in.image_index, 0, batch);
  check_size("image_index", in.image_index, 1, tokens);
  check_size("order", in.order, 0, batch);
  check_size("segments", in.segments, 0, batch);
  check_size("segments", in.segments, 1, images);
  check_size("segments", in.segments, 2, 3);
  problem->order_size = in.order.size(1);
  problem->image_lengths = nullptr;
  if (in.image_lengths) {
    problem->image_lengths = check_integers("image_lengths", *in.image_lengths, 2);
    check_size("image_lengths", *in.image_lengths, 0, batch);
    check_size("image_lengths", *in.image_lengths, 1, images);
  }
  check_plan(*problem, batch);
}

int64_t threads() { return torch::stable::get_num_threads(); }

bool heads_inside_latents(const Tensor& key) { return key.stride(1) < key.stride(3); }

// Calls body(batch, key head, image) so that neighbours in memory follow each other.
template <class Body>
void for_each_image(const Tensor& key, Body body) {
  const int batch = static_cast<int>(key.size(0)), heads = static_cast<int>(key.size(1)),
            images = static_cast<int>(key.size(2));
  for (int b = 0; b < batch; b++) {
    if (heads_inside_latents(key)) {
      for (int image = 0; image < images; image++)
        for (int head = 0; head < heads; head++) body(b, head, image);
    } else {
      for (int head = 0; head < heads; head++)
        for (int image = 0; image < images; image++) body(b, head, image);
    }
  }
}

// A task for each image that some token sees, of part of its tokens where there are too few images
// for the threads; at least kTilesPerTask, since every task packs the image afresh.
std::vector<CrossAttentionTask> image_tasks(const CrossAttentionProblem& problem, const Tensor& key,
                                            int queries_per_tile) {
  constexpr int kTilesPerTask = 4;
  int64_t queries = 0;
  const int64_t rows = key.size(0) * problem.images;
  for (int64_t i = 0; i < rows; i++)
    queries += problem.segments[i * 3 + 2] - problem.segments[i * 3];
  const int64_t wanted = queries * key.size(1) / (4 * threads());
  const int64_t step =
      std::max<int64_t>(kTilesPerTask, wanted / queries_per_tile) * queries_per_tile;
  std::vector<CrossAttentionTask> tasks;
  for_each_image(key, [&](int batch, int head, int image) {
    const int32_t* segment = problem.segments + ((int64_t)batch * problem.images + image) * 3;
    const int64_t count = segment[2] - segment[0];
    const int64_t parts = divide_up(count, step);
    for (int64_t i = 0; i < parts; i++)
      tasks.push_back({batch, head, image, image + 1,
                       segment[0] + static_cast<int>(count * i / parts),
                       segment[0] + static_cast<int>(count * (i + 1) / parts)});
  });
  return tasks;
}

// A task for each run of tokens, short enough for its partial results to stay in a cache: in 256
// KiB of it. A quarter to four times that made no difference where tokens see all images before
// them (image_cross_attention, 1,024 tokens and 8 images, Zen 3).
std::vector<CrossAttentionTask> token_tasks(const CrossAttentionProblem& problem, int64_t batch,
                                            int64_t key_heads, int queries_per_tile) {
  constexpr int64_t kCachedFloats = 64 * 1024;
  const int64_t row_floats = problem.group * static_cast<int64_t>(problem.value_dim + 2);
  const int64_t cached = kCachedFloats / std::max<int64_t>(row_floats, 1);
  const int64_t wanted =
      batch * key_heads * problem.tokens / (4 * threads());  // tokens of a task, all heads alike
  const int64_t most = std::min(std::max<int64_t>(wanted, 4 * queries_per_tile), cached);
  const int step = static_cast<int>(std::max<int64_t>(most, queries_per_tile));
  std::vector<CrossAttentionTask> tasks;
  for (int b = 0; b < batch; b++)
    for (int head = 0; head < key_heads; head++)
      for (int first = 0; first < problem.tokens; first += step)
        tasks.push_back(
            {b, head, 0, problem.images, first, std::min(first + step, problem.tokens)});
  return tasks;
}

// How many neighbouring tasks go to one thread: where heads lie inside latents, what fetches the
// rows of one head of an image fetches much of the next one's as well.
int64_t group_size(const std::vector<CrossAttentionTask>& tasks, int64_t key_heads) {
  constexpr int64_t kGroupsPerThread = 32;
  const int64_t most = static_cast<int64_t>(tasks.size()) / (kGroupsPerThread * threads());
  return std::clamp<int64_t>(most, 1, std::max<int64_t>(key_heads, 1));
}

void set_maxima(const std::vector<CrossAttentionTask>& tasks, CrossAttentionProblem* problem) {
  problem->max_queries = 0;
  for (const auto& task : tasks)
    problem->max_queries = std::max(problem->max_queries, task.end - task.begin);
}

// The batch elements that have rows of a kind.
template <class IsKind>
std::vector<int> batches_with(const CrossAttentionProblem& problem, int64_t batch, IsKind is_kind) {
  std::vector<int> result;
  for (int b = 0; b < batch; b++) {
    const int32_t* first = problem.image_index + static_cast<int64_t>(b) * problem.tokens;
    if (std::any_of(first, first + problem.tokens, is_kind)) result.push_back(b);
  }
  return result;
}

std::vector<int> batches_with_uniform_rows(const CrossAttentionProblem& problem, int64_t batch) {
  return batches_with(problem, batch, [](int32_t kind) { return kind == kUniformRow; });
}

// Of tokens that see one image at most.
std::vector<int> batches_with_unseeing_rows(const CrossAttentionProblem& problem, int64_t batch) {
  return batches_with(problem, batch, [](int32_t kind) { return kind <= 0; });
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& query, const Tensor& key,
                                           const Tensor& value, const Tensor& image_index,
                                           MaybeTensor visible, const Tensor& order,
                                           const Tensor& segments, MaybeTensor image_lengths,
                                           double scale) {
  CrossAttentionForward problem;
  describe({query, key, value, image_index, visible, order, segments, image_lengths, scale},
           &problem);
  const int64_t batch = query.size(0), key_heads = key.size(1);
  Tensor out = empty_rows(query, query.size(2), value.size(4));
  Tensor logsumexp = empty({batch, query.size(1), query.size(2)}, ScalarType::Float);
  problem.out = strided(out);
  problem.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  problem.prefetch = exceeds_cache({&query, &key, &value, &out});
  const CrossAttentionKernel& run = VLMFAST_CURRENT_VARIANT(cross_attention_kernel);
  const auto tasks = problem.many_images
                         ? token_tasks(problem, batch, key_heads, run.queries_per_tile)
                         : image_tasks(problem, key, run.queries_per_tile);
  set_maxima(tasks, &problem);
  const int64_t scratch_size = run.forward_scratch(problem);
  for_each_task(
      static_cast<int64_t>(tasks.size()), scratch_size,
      [&](const Claim& claim, float* scratch) {
        run.forward(problem, tasks[claim.task], tasks[claim.next], scratch);
      },
      group_size(tasks, key_heads));
  const auto batches = problem.many_images ? batches_with_uniform_rows(problem, batch)
                                           : batches_with_unseeing_rows(problem, batch);
  for_each_task(static_cast<int64_t>(batches.size()) * key_heads, scratch_size,
                [&](const Claim& claim, float* scratch) {
                  run.fill_rows(problem, batches[claim.task / key_heads],
                                static_cast<int>(claim.task % key_heads), scratch);
                });
  return {out, logsumexp};
}

// Where a token may see several images, a task runs them all for one key head, and the partial sums
// of grad_query have one writer. With too few heads for the threads the images are split, and the
// partial sums added in order afterwards.
int64_t image_splits(const CrossAttentionProblem& problem, int64_t units, int64_t split_bytes) {
  if (units == 0 || units >= threads()) return 1;
  const int64_t wanted = divide_up(2 * threads(), units);
  const int64_t most = kMostPartialBytes / std::max<int64_t>(split_bytes, 1);
  return std::max<int64_t>(1, std::min({wanted, most, static_cast<int64_t>(problem.images)}));
}

std::vector<CrossAttentionTask> split_tasks(const CrossAttentionProblem& problem, int64_t batch,
                                            int64_t key_heads, int64_t splits) {
  std::vector<CrossAttentionTask> tasks;
  for (int b = 0; b < batch; b++)
    for (int head = 0; head < key_heads; head++)
      for (int64_t i = 0; i < splits; i++)
        tasks.push_back({b, head, static_cast<int>(problem.images * i / splits),
                         static_cast<int>(problem.images * (i + 1) / splits), 0, problem.tokens,
                         static_cast<int>(i)});
  return tasks;
}

std::vector<CrossAttentionTask> gradient_tasks(const CrossAttentionProblem& problem,
                                               const Tensor& key) {
  std::vector<CrossAttentionTask> tasks;
  for_each_image(key, [&](int batch, int head, int image) {
    const int32_t* segment = problem.segments + ((int64_t)batch * problem.images + image) * 3;
    tasks.push_back({batch, head, image, image + 1, segment[0], segment[2]});
  });
  return tasks;
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out, MaybeTensor grad_logsumexp, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& logsumexp, const Tensor& image_index,
    MaybeTensor visible, const Tensor& order, const Tensor& segments, MaybeTensor image_lengths,
    double scale, bool query_grad, bool key_value_grad) {
  CrossAttentionBackward problem;
  describe({query, key, value, image_index, visible, order, segments, image_lengths, scale},
           &problem);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2),
                head_dim = query.size(3), key_heads = key.size(1);
  const MaybeTensor grad_rows =
      read_results(grad_out, grad_logsumexp, query, out, logsumexp, &problem);
  problem.wants_query = query_grad;
  problem.wants_key_value = key_value_grad;

  Tensor grad_query = query_grad ? empty_rows(query, query.size(2), head_dim) : nothing(query);
  Tensor grad_key = key_value_grad ? images_like(key) : nothing(key);
  Tensor grad_value = key_value_grad ? images_like(value) : nothing(value);
  problem.prefetch =
      exceeds_cache({&query, &key, &value, &out, &grad_out, &grad_query, &grad_key, &grad_value});
  if (query_grad) problem.grad_query = strided(grad_query);
  if (key_value_grad) {
    problem.grad_key = strided_images(grad_key);
    problem.grad_value = strided_images(grad_value);
  }

  const CrossAttentionKernel& run = VLMFAST_CURRENT_VARIANT(cross_attention_kernel);
  const auto for_each_head = [&](const auto& body) {
    for_each_task(batch * key_heads, 0, [&](const Claim& claim, float*) {
      body(static_cast<int>(claim.task / key_heads), static_cast<int>(claim.task % key_heads));
    });
  };
  MaybeTensor uniform_gradient;
  if (key_value_grad && !batches_with_uniform_rows(problem, batch).empty()) {
    uniform_gradient = empty({batch, key_heads, value.size(4)}, ScalarType::Float);
    problem.uniform_gradient = static_cast<float*>(uniform_gradient->mutable_data_ptr());
    for_each_head([&](int b, int head) { run.sum_uniform_rows(problem, b, head); });
  }

  problem.grad_query_split_size = batch * heads * tokens * head_dim;
  const int64_t splits = problem.many_images ? image_splits(problem, batch * key_heads,
                                                            problem.grad_query_split_size * 4)
                                             : 1;
  MaybeTensor partial;
  if (problem.many_images && query_grad) {
    partial = empty({splits, problem.grad_query_split_size}, ScalarType::Float);
    problem.grad_query_splits = static_cast<float*>(partial->mutable_data_ptr());
  }
  const auto tasks = problem.many_images ? split_tasks(problem, batch, key_heads, splits)
                                         : gradient_tasks(problem, key);
  for_each_task(
      static_cast<int64_t>(tasks.size()), run.backward_scratch(problem),
      [&](const Claim& claim, float* scratch) {
        run.backward(problem, tasks[claim.task], tasks[claim.next], scratch);
      },
      group_size(tasks, key_heads));
  if (problem.many_images && query_grad) {
    for_each_task(batch * heads, 0, [&](const Claim& claim, float*) {
      const int64_t i = claim.task;
      for (int token = 0; token < tokens; token++)
        run.sum_splits(problem, static_cast<int>(splits), static_cast<int>(i / heads),
                       static_cast<int>(i % heads), token);
    });
  } else if (query_grad && (image_lengths || problem.latents == 0 ||
                            !batches_with_unseeing_rows(problem, batch).empty())) {
    for_each_head([&](int b, int head) { run.clear_grad_rows(problem, b, head); });
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace vlmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(vlmfast, CPU, m) {
  m.impl("cross_attention_cpu", TORCH_BOX(&vlmfast::cpu::cross_attention));
  m.impl("cross_attention_backward_cpu", TORCH_BOX(&vlmfast::cpu::cross_attention_backward));
}
