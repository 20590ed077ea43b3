// The operators window_attention_cpu and window_attention_backward_cpu: checks, allocation,
// division into tasks.
#include "cpu/window_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace vlmfast::cpu {
namespace {

// What the packed biases of the heads that one task runs may take, with the sums of their
// gradients: an eighth of a second-level cache, which is 1 MiB or more where AVX-512 is. A
// quarter to eight times that made no difference for windows of 7, 12 and 16 (Zen 3).
constexpr int64_t kBiasBytes = 128 << 10;

struct Inputs {
  const Tensor& query;
  const MaybeTensor &key, &value, &bias, &logit_scale, &pad_value;
  int64_t num_heads, window_height, window_width, shift_height, shift_width;
  bool wrap_padded;
  double scale, mask_value, dropout_p;
  const MaybeTensor& dropout_seed;

  int64_t channels() const { return key ? query.size(3) : query.size(3) / 3; }
  int64_t tokens() const { return window_height * window_width; }
  int64_t windows_down() const { return divide_up(query.size(1), window_height); }
  int64_t windows_across() const { return divide_up(query.size(2), window_width); }
  int64_t windows() const { return query.size(0) * windows_down() * windows_across(); }
};

// Checks everything that a wrong value of could touch foreign memory.
void check(const Inputs& in) {
  check_dim("query", in.query, 4);
  check_cpu("query", in.query);
  const ElementType dtype = element_type("query", in.query, false);
  VLMFAST_CHECK(in.key.has_value() == in.value.has_value(), "key, value: expected both or neither");
  const auto check_like_query = [&](const char* name, const Tensor& tensor) {
    check_dim(name, tensor, 4);
    check_cpu(name, tensor);
    VLMFAST_CHECK(element_type(name, tensor, false) == dtype, name,
                  ": expected the dtype of query");
    for (int i = 0; i < 4; i++) check_size(name, tensor, i, in.query.size(i));
  };
  if (in.key) {
    check_like_query("key", *in.key);
    check_like_query("value", *in.value);
  } else {
    VLMFAST_CHECK(in.query.size(3) % 3 == 0,
                  "query: expected 3 * channels without key and value, got ", in.query.size(3));
  }
  // Kernels count places of a side, with the window that ends it, and channels of a tile in int.
  constexpr int64_t most_tokens = 1 << 14, most_channels = 1 << 24, most = 1 << 30;
  VLMFAST_CHECK(in.query.size(1) <= most && in.query.size(2) <= most,
                "query: expected a map of at most ", most, " tokens a side, got ", in.query.size(1),
                " x ", in.query.size(2));
  VLMFAST_CHECK(in.channels() <= most_channels, "query: expected at most ", most_channels,
                " channels, got ", in.channels());
  VLMFAST_CHECK(in.num_heads >= 1 && in.channels() > 0 && in.channels() % in.num_heads == 0,
                "num_heads: expected a number that divides ", in.channels(), ", got ",
                in.num_heads);
  VLMFAST_CHECK(in.window_height >= 1 && in.window_width >= 1 && in.window_height <= most_tokens &&
                    in.window_width <= most_tokens && in.tokens() <= most_tokens,
                "window_height, window_width: expected a window of 1 to ", most_tokens,
                " tokens, got ", in.window_height, " x ", in.window_width);
  VLMFAST_CHECK(in.shift_height >= 0 && in.shift_height < in.window_height && in.shift_width >= 0 &&
                    in.shift_width < in.window_width,
                "shift_height, shift_width: expected at least 0 and below the window's, got ",
                in.shift_height, " and ", in.shift_width);
  VLMFAST_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1,
                "dropout_p: expected a value in [0, 1], got ", in.dropout_p);
  const auto check_floating = [&](const char* name, const MaybeTensor& tensor, int64_t dim) {
    check_dim(name, *tensor, dim);
    check_cpu(name, *tensor);
    element_type(name, *tensor, false);
  };
  if (in.bias) {
    check_floating("bias", in.bias, 3);
    check_size("bias", *in.bias, 0, in.num_heads);
    check_size("bias", *in.bias, 1, in.tokens());
    check_size("bias", *in.bias, 2, in.tokens());
  }
  if (in.logit_scale) {
    check_floating("logit_scale", in.logit_scale, 1);
    check_size("logit_scale", *in.logit_scale, 0, in.num_heads);
  }
  if (in.pad_value) {
    check_floating("pad_value", in.pad_value, 1);
    check_size("pad_value", *in.pad_value, 0, 3 * in.channels());
  }
  if (in.dropout_p > 0) read_dropout_seed(in.dropout_seed);
}

// Kernels read whole vectors of channels, wherever the rest may lie.
Tensor dense_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A tensor of three stacked in its channels, or one of them.
Strided part(const Tensor& tensor, int64_t channel) {
  Strided result = strided(tensor);
  result.data = static_cast<char*>(result.data) + channel * tensor.element_size();
  return result;
}

WindowBias strided_bias(const Tensor& bias) {
  return {bias.data_ptr(), bias.stride(0), bias.stride(1), bias.stride(2),
          element_type("bias", bias, false)};
}

// The inputs in the form that kernels take, and the memory that it needs.
struct Prepared {
  Tensor query, key, value, pad_value;
  MaybeTensor logit_scale;

  Prepared(const Inputs& in, WindowAttentionProblem* problem)
      : query(dense_channels(in.query)),
        key(in.key ? dense_channels(*in.key) : query),
        value(in.value ? dense_channels(*in.value) : query) {
    const int64_t channels = in.channels();
    pad_value =
        in.pad_value
            ? torch::stable::contiguous(torch::stable::to(*in.pad_value, query.scalar_type()))
            : zeros({3 * channels}, query.scalar_type());
    if (in.logit_scale)
      logit_scale =
          torch::stable::contiguous(torch::stable::to(*in.logit_scale, ScalarType::Float));
    problem->dtype = element_type("query", query, false);
    problem->query = strided(query);
    problem->key = in.key ? strided(key) : part(query, channels);
    problem->value = in.value ? strided(value) : part(query, 2 * channels);
    problem->pad_value = pad_value.const_data_ptr();
    problem->height = static_cast<int>(query.size(1));
    problem->width = static_cast<int>(query.size(2));
    problem->heads = static_cast<int>(in.num_heads);
    problem->head_dim = static_cast<int>(channels / in.num_heads);
    problem->window_height = static_cast<int>(in.window_height);
    problem->window_width = static_cast<int>(in.window_width);
    problem->shift_height = static_cast<int>(in.shift_height);
    problem->shift_width = static_cast<int>(in.shift_width);
    problem->wrap_padded = in.wrap_padded;
    problem->windows_down = static_cast<int>(in.windows_down());
    problem->windows_across = static_cast<int>(in.windows_across());
    problem->scale = static_cast<float>(in.scale);
    problem->logit_scale =
        logit_scale ? static_cast<const float*>(logit_scale->const_data_ptr()) : nullptr;
    // Finite, so that a logit is never the difference of infinities.
    problem->mask = static_cast<float>(std::clamp(in.mask_value * 1.4426950408889634, -1e38, 1e38));
    if (in.bias) problem->bias = strided_bias(*in.bias);
    problem->dropout_p = in.dropout_p;
    if (in.dropout_p > 0) problem->dropout_seed = read_dropout_seed(in.dropout_seed);
  }
};

// Runs of windows for runs of heads; sets heads_per_task. A task locates the tokens of each of its
// windows and, unless its thread has just run the same heads, packs the bias of each of its heads:
// for a given number of pairs both together cost least where there are about as many heads as
// windows, at most `most_heads`. Windows are cut into at most `most_splits` runs. The division must
// not depend on anything but sizes and the number of threads.
std::vector<WindowAttentionTask> make_tasks(int64_t windows, int64_t most_heads,
                                            int64_t most_splits, WindowAttentionProblem* problem) {
  constexpr int kTasksPerThread = 8;
  const int64_t wanted = kTasksPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t heads = problem->heads;
  const double share = static_cast<double>(windows * heads) / static_cast<double>(wanted);
  const int64_t heads_per_task =
      std::clamp<int64_t>(std::llround(std::sqrt(share)), 1, std::max<int64_t>(1, most_heads));
  const int64_t parts = divide_up(heads, heads_per_task);
  const int64_t splits = std::min({divide_up(wanted, parts), windows, most_splits});
  std::vector<WindowAttentionTask> tasks;
  for (int64_t p = 0; p < parts; p++)
    for (int64_t s = 0; s < splits; s++)
      tasks.push_back({static_cast<int>(heads * p / parts),
                       static_cast<int>(heads * (p + 1) / parts), windows * s / splits,
                       windows * (s + 1) / splits, static_cast<int>(s)});
  problem->heads_per_task = static_cast<int>(divide_up(heads, parts));
  return tasks;
}

// Whether the thread has just run the same heads: parts of the heads do not overlap.
bool has_biases(const std::vector<WindowAttentionTask>& tasks, const Claim& claim) {
  return claim.previous >= 0 && tasks[claim.previous].head_begin == tasks[claim.task].head_begin;
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& query, MaybeTensor key, MaybeTensor value,
                                            MaybeTensor bias, MaybeTensor logit_scale,
                                            MaybeTensor pad_value, int64_t num_heads,
                                            int64_t window_height, int64_t window_width,
                                            int64_t shift_height, int64_t shift_width,
                                            bool wrap_padded, double scale, double mask_value,
                                            double dropout_p, MaybeTensor dropout_seed) {
  const Inputs in{query,     key,           value,        bias,         logit_scale, pad_value,
                  num_heads, window_height, window_width, shift_height, shift_width, wrap_padded,
                  scale,     mask_value,    dropout_p,    dropout_seed};
  check(in);
  Tensor out =
      empty({query.size(0), query.size(1), query.size(2), in.channels()}, query.scalar_type());
  Tensor logsumexp =
      empty({query.size(0), in.windows_down() * in.windows_across(), num_heads, in.tokens()},
            ScalarType::Float);
  if (in.windows() == 0) return {out, logsumexp};
  const WindowAttentionKernel& kernel = VLMFAST_CURRENT_VARIANT(window_attention_kernel);
  WindowAttentionForward problem;
  const Prepared prepared(in, &problem);
  problem.out = strided(out);
  problem.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  const int64_t bias_bytes = kernel.bias_size(static_cast<int>(in.tokens())) * sizeof(float);
  const auto tasks = make_tasks(in.windows(), kBiasBytes / bias_bytes, in.windows(), &problem);
  for_each_task(static_cast<int64_t>(tasks.size()), kernel.forward_scratch(problem),
                [&](const Claim& claim, float* scratch) {
                  kernel.forward(problem, tasks[claim.task], tasks[claim.next],
                                 has_biases(tasks, claim), scratch);
                });
  return {out, logsumexp};
}

// The sum over the first dimension, in order.
Tensor sum_splits(const Tensor& partial) {
  const int64_t first = 0;
  return torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad_out, const Tensor& query, MaybeTensor key, MaybeTensor value,
    MaybeTensor bias, MaybeTensor logit_scale, MaybeTensor pad_value, const Tensor& /*out*/,
    const Tensor& /*logsumexp*/, int64_t num_heads, int64_t window_height, int64_t window_width,
    int64_t shift_height, int64_t shift_width, bool wrap_padded, double scale, double mask_value,
    double dropout_p, MaybeTensor dropout_seed, bool qkv_grad, bool bias_grad,
    bool logit_scale_grad, bool pad_grad) {
  const Inputs in{query,     key,           value,        bias,         logit_scale, pad_value,
                  num_heads, window_height, window_width, shift_height, shift_width, wrap_padded,
                  scale,     mask_value,    dropout_p,    dropout_seed};
  check(in);
  check_dim("grad_out", grad_out, 4);
  check_cpu("grad_out", grad_out);
  VLMFAST_CHECK(grad_out.scalar_type() == query.scalar_type(),
                "grad_out: expected the dtype of query");
  for (int i = 0; i < 3; i++) check_size("grad_out", grad_out, i, query.size(i));
  check_size("grad_out", grad_out, 3, in.channels());

  const auto like = [](const Tensor& tensor) {
    return empty({tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)},
                 tensor.scalar_type());
  };
  Tensor grad_query = qkv_grad ? like(query) : nothing(query);
  Tensor grad_key = qkv_grad && key ? like(*key) : nothing(query);
  Tensor grad_value = qkv_grad && value ? like(*value) : nothing(query);
  bias_grad = bias_grad && bias;
  logit_scale_grad = logit_scale_grad && logit_scale;
  pad_grad = pad_grad && pad_value;
  const int64_t windows = in.windows(), tokens = in.tokens(), channels = in.channels();
  Tensor grad_bias = bias_grad ? empty({num_heads, tokens, tokens}, bias->scalar_type())
                               : nothing(bias ? *bias : query);
  Tensor grad_logit_scale = logit_scale_grad ? zeros({num_heads}, logit_scale->scalar_type())
                                             : nothing(logit_scale ? *logit_scale : query);
  Tensor grad_pad = pad_grad ? zeros({3 * channels}, pad_value->scalar_type())
                             : nothing(pad_value ? *pad_value : query);
  if (windows == 0 && bias_grad) torch::stable::zero_(grad_bias);
  if (windows == 0)
    return {grad_query, grad_key, grad_value, grad_bias, grad_logit_scale, grad_pad};

  const WindowAttentionKernel& kernel = VLMFAST_CURRENT_VARIANT(window_attention_kernel);
  WindowAttentionBackward problem;
  const Prepared prepared(in, &problem);
  const Tensor dense_grad_out = dense_channels(grad_out);
  problem.grad_out = strided(dense_grad_out);
  problem.wants_qkv = qkv_grad;
  if (qkv_grad) {
    problem.grad_query = strided(grad_query);
    problem.grad_key = key ? strided(grad_key) : part(grad_query, channels);
    problem.grad_value = value ? strided(grad_value) : part(grad_query, 2 * channels);
  }

  const int64_t bias_size = kernel.bias_size(static_cast<int>(tokens));
  const int64_t bias_bytes = bias_size * static_cast<int64_t>(sizeof(float));
  const int64_t most_splits =
      bias_grad ? std::max<int64_t>(1, kMostPartialBytes / (num_heads * bias_bytes)) : windows;
  const auto tasks = make_tasks(windows, kBiasBytes / (bias_grad ? 2 * bias_bytes : bias_bytes),
                                most_splits, &problem);
  const int64_t splits = tasks.back().split + 1;
  MaybeTensor bias_sums, pad_sums, logit_scale_sums;
  if (bias_grad) problem.grad_bias = strided_bias(grad_bias);
  if (bias_grad && splits > 1) {
    bias_sums = empty({splits, num_heads, bias_size}, ScalarType::Float);
    problem.bias_sums = static_cast<float*>(bias_sums->mutable_data_ptr());
  }
  if (pad_grad) {
    pad_sums = zeros({splits, 2 * channels}, ScalarType::Double);
    problem.grad_pad = static_cast<double*>(pad_sums->mutable_data_ptr());
  }
  if (logit_scale_grad) {
    logit_scale_sums = zeros({splits, num_heads}, ScalarType::Double);
    problem.grad_logit_scale = static_cast<double*>(logit_scale_sums->mutable_data_ptr());
  }
  for_each_task(static_cast<int64_t>(tasks.size()), kernel.backward_scratch(problem),
                [&](const Claim& claim, float* scratch) {
                  kernel.backward(problem, tasks[claim.task], tasks[claim.next],
                                  has_biases(tasks, claim), scratch);
                });
  if (bias_sums) {
    for_each_task(num_heads, 0, [&](const Claim& claim, float*) {
      kernel.sum_bias(problem, static_cast<int>(splits), static_cast<int>(claim.task));
    });
  }
  if (logit_scale_grad) torch::stable::copy_(grad_logit_scale, sum_splits(*logit_scale_sums));
  if (pad_grad) {
    // A padded query's output is dropped, so the first third stays zero.
    Tensor key_value = torch::stable::narrow(grad_pad, 0, channels, 2 * channels);
    torch::stable::copy_(key_value, sum_splits(*pad_sums));
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_logit_scale, grad_pad};
}

}  // namespace
}  // namespace vlmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(vlmfast, CPU, m) {
  m.impl("window_attention_cpu", TORCH_BOX(&vlmfast::cpu::window_attention));
  m.impl("window_attention_backward_cpu", TORCH_BOX(&vlmfast::cpu::window_attention_backward));
}
