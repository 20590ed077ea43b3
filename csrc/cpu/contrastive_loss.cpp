// The operators contrastive_loss_cpu and contrastive_loss_backward_cpu: checks, allocation,
// division into blocks and panels.
#include "cpu/contrastive_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace vlmfast::cpu {
namespace {

float number(const char* name, const Tensor& tensor) {
  check_cpu(name, tensor);
  VLMFAST_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float, name,
                ": expected one float32 element");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

// Fills what forward and backward share, after checking everything that a wrong value of could
// touch foreign memory.
void describe(const Tensor& rows, const Tensor& columns, const Tensor& scale,
              const MaybeTensor& bias, int64_t first_column, bool sigmoid,
              ContrastiveLossProblem* problem) {
  check_dim("rows", rows, 3);
  check_dim("columns", columns, 2);
  check_cpu("rows", rows);
  check_cpu("columns", columns);
  problem->dtype = element_type("rows", rows, false);
  VLMFAST_CHECK(element_type("columns", columns, false) == problem->dtype,
                "columns: expected the dtype of rows");
  check_size("columns", columns, 1, rows.size(2));
  constexpr int64_t most = 1 << 29;
  VLMFAST_CHECK(rows.size(0) <= most && columns.size(0) <= most && rows.size(1) <= 65536 &&
                    rows.size(2) <= 65536,
                "rows, columns: expected at most ", most,
                " of each, 65536 queries and 65536 dimensions");
  VLMFAST_CHECK(rows.size(1) > 0, "rows: expected at least one query, got 0");
  problem->rows.data = rows.data_ptr();
  problem->rows.stride[0] = rows.stride(0);
  problem->rows.stride[1] = rows.stride(1);
  problem->rows.stride[3] = rows.stride(2);
  problem->columns.data = columns.data_ptr();
  problem->columns.stride[2] = columns.stride(0);
  problem->columns.stride[3] = columns.stride(1);
  problem->n_rows = static_cast<int>(rows.size(0));
  problem->queries = static_cast<int>(rows.size(1));
  problem->dim = static_cast<int>(rows.size(2));
  problem->n_columns = static_cast<int>(columns.size(0));
  // Beyond these bounds no row has a pair.
  problem->first_column = static_cast<int>(std::clamp<int64_t>(first_column, -most, most));
  problem->scale = number("scale", scale);
  problem->bias = bias ? number("bias", *bias) : 0.f;
  problem->sigmoid = sigmoid;
}

// Sets the size of the blocks and returns their number. A larger block
// reads the columns less often, until its own rows and their sums are read from afar; and there
// should be several blocks for each thread. Blocks of 1.5 MiB: twice as much makes no difference
// at 4,096 pairs, forward and backward, and a half or less costs the more the less it is (Zen 3).
int divide(const ContrastiveLossKernel& run, int copies_of_rows, ContrastiveLossProblem* problem) {
  constexpr int64_t kCachedFloats = 384 * 1024;
  constexpr int kBlocksPerThread = 4;
  const int tiles = divide_up(problem->n_rows, run.rows_per_tile);
  const int64_t tile_floats = (int64_t)run.rows_per_tile * problem->queries * problem->dim;
  const int64_t cached = kCachedFloats / std::max<int64_t>(1, tile_floats * copies_of_rows);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  problem->tiles_per_block = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(cached, tiles / (threads * kBlocksPerThread))));
  return divide_up(tiles, problem->tiles_per_block);
}

Tensor statistic(int64_t n) { return empty({n}, ScalarType::Float); }

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_loss(
    const Tensor& rows, const Tensor& columns, const Tensor& scale, MaybeTensor bias,
    int64_t first_column, bool sigmoid, bool column_statistics) {
  ContrastiveLossForward problem;
  describe(rows, columns, scale, bias, first_column, sigmoid, &problem);
  VLMFAST_CHECK(!(sigmoid && column_statistics),
                "column_statistics: expected False with sigmoid, got True");
  const int64_t n = rows.size(0), n_columns = column_statistics ? columns.size(0) : 0;
  Tensor row_max = statistic(n), row_sum = statistic(n), row_total = statistic(n),
         positive = statistic(n);
  Tensor column_max = statistic(n_columns), column_sum = statistic(n_columns);
  problem.row_max = floats(row_max);
  problem.row_sum = floats(row_sum);
  problem.row_total = floats(row_total);
  problem.positive = floats(positive);
  problem.column_max = column_statistics ? floats(column_max) : nullptr;
  problem.column_sum = column_statistics ? floats(column_sum) : nullptr;
  if (column_statistics) {
    std::fill_n(problem.column_max, n_columns, -std::numeric_limits<float>::infinity());
    std::fill_n(problem.column_sum, n_columns, 0.f);
  }
  const ContrastiveLossKernel& run = VLMFAST_CURRENT_VARIANT(contrastive_loss_kernel);
  const int blocks = divide(run, 1, &problem);
  const int panels = divide_up(problem.n_columns, run.columns_per_panel);
  Turns turns(blocks);
  for_each_in_order(blocks, run.forward_scratch(problem), [&](int64_t block, float* scratch) {
    const int b = static_cast<int>(block);
    run.forward_begin(problem, b, scratch);
    for (int panel = 0; panel < panels; panel++) {
      turns.wait(block, panel);
      run.forward_panel(problem, b, panel, scratch);
      turns.pass(block, panel);
    }
    run.forward_end(problem, b, scratch);
  });
  return {row_max, row_sum, row_total, positive, column_max, column_sum};
}

// The vector behind an optional gradient or statistic of n elements, dense; nullptr for none.
const float* vector_of(const char* name, MaybeTensor* tensor, int64_t n) {
  if (!*tensor) return nullptr;
  check_cpu(name, **tensor);
  check_dim(name, **tensor, 1);
  check_size(name, **tensor, 0, n);
  VLMFAST_CHECK((*tensor)->scalar_type() == ScalarType::Float, name, ": expected float32");
  *tensor = torch::stable::contiguous(**tensor);
  return static_cast<const float*>((*tensor)->const_data_ptr());
}

Tensor total(const float* shares, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += shares[i];
  Tensor result = empty<0>({}, ScalarType::Float, {});
  *floats(result) = static_cast<float>(sum);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss_backward(
    MaybeTensor grad_row_sum, MaybeTensor grad_row_total, MaybeTensor grad_positive,
    MaybeTensor grad_column_sum, const Tensor& rows, const Tensor& columns, const Tensor& scale,
    MaybeTensor bias, const Tensor& row_max, const Tensor& column_max, int64_t first_column,
    bool sigmoid, bool rows_grad, bool columns_grad, bool scale_grad, bool bias_grad,
    bool float32_grads) {
  ContrastiveLossBackward problem;
  describe(rows, columns, scale, bias, first_column, sigmoid, &problem);
  const int64_t n = rows.size(0), n_columns = columns.size(0);
  VLMFAST_CHECK(!(sigmoid && grad_column_sum), "grad_column_sum: expected None with sigmoid");
  problem.grad_row_sum = vector_of("grad_row_sum", &grad_row_sum, n);
  problem.grad_row_total = vector_of("grad_row_total", &grad_row_total, n);
  problem.grad_positive = vector_of("grad_positive", &grad_positive, n);
  problem.grad_column_sum = vector_of("grad_column_sum", &grad_column_sum, n_columns);
  MaybeTensor rows_most = row_max, columns_most = column_max;
  problem.row_max = vector_of("row_max", &rows_most, n);
  problem.column_max =
      grad_column_sum ? vector_of("column_max", &columns_most, n_columns) : nullptr;

  const ScalarType dtype = float32_grads ? ScalarType::Float : rows.scalar_type();
  Tensor grad_rows = rows_grad ? empty({n, rows.size(1), rows.size(2)}, dtype) : empty({0}, dtype);
  Tensor grad_columns =
      columns_grad ? empty({n_columns, columns.size(1)}, dtype) : empty({0}, dtype);
  problem.float32_grads = float32_grads;
  problem.grad_rows = rows_grad ? grad_rows.mutable_data_ptr() : nullptr;
  problem.grad_columns = columns_grad ? grad_columns.mutable_data_ptr() : nullptr;
  const ContrastiveLossKernel& run = VLMFAST_CURRENT_VARIANT(contrastive_loss_kernel);
  const int blocks = divide(run, 3, &problem);
  const int panels = divide_up(problem.n_columns, run.columns_per_panel);
  Tensor column_sums = grad_columns;
  constexpr int kRowsTouched = 4;  // of column_sums, at once
  if (columns_grad &&
      (dtype != ScalarType::Float || problem.dim % run.lanes || n_columns % kRowsTouched))
    column_sums = empty({divide_up(problem.n_columns, kRowsTouched) * kRowsTouched,
                         divide_up(problem.dim, run.lanes) * run.lanes},
                        ScalarType::Float);
  if (columns_grad && blocks == 0) torch::stable::zero_(column_sums);
  problem.column_sums = columns_grad ? floats(column_sums) : nullptr;
  Tensor shares = zeros({2, n}, ScalarType::Float);
  problem.grad_scale = floats(shares);
  problem.grad_bias = problem.grad_scale + n;

  Turns turns(blocks);
  for_each_in_order(blocks, run.backward_scratch(problem), [&](int64_t block, float* scratch) {
    const int b = static_cast<int>(block);
    run.backward_begin(problem, b, scratch);
    for (int panel = 0; panel < panels; panel++) {
      turns.wait(block, panel);
      run.backward_panel(problem, b, panel, scratch);
      turns.pass(block, panel);
    }
    run.backward_end(problem, b, scratch);
  });
  if (columns_grad) {
    constexpr int kRowsPerTask = 64;
    for_each_task(divide_up(problem.n_columns, kRowsPerTask), 0, [&](const Claim& claim, float*) {
      const int first = static_cast<int>(claim.task) * kRowsPerTask;
      run.store_columns(problem, first, std::min(first + kRowsPerTask, problem.n_columns));
    });
  }
  return {grad_rows, grad_columns, scale_grad ? total(problem.grad_scale, n) : nothing(scale),
          bias_grad ? total(problem.grad_bias, n) : nothing(scale)};
}

}  // namespace
}  // namespace vlmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(vlmfast, CPU, m) {
  m.impl("contrastive_loss_cpu", TORCH_BOX(&vlmfast::cpu::contrastive_loss));
  m.impl("contrastive_loss_backward_cpu", TORCH_BOX(&vlmfast::cpu::contrastive_loss_backward));
}
