#include "ops/residual_activation.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/residual_activation.h"
#include "math/dropout_mask.h"
#include "ops/numbers.h"
#include "ops/residual_activation_checks.h"

namespace ikem_fast {

namespace {

void check_type(const char* name, const at::Tensor& tensor, at::ScalarType wanted) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == wanted && tensor.device().is_cpu(), name, " must be ", wanted,
                    " on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
}

// Arguments in one piece each, and what the kernels want to know of them.
struct Arguments {
  Arguments(const at::Tensor& given_x, const at::Tensor& given_scale, const at::Tensor& given_shift,
            const std::optional<at::Tensor>& given_residual, const std::optional<at::Tensor>& given_residual_scale,
            const std::optional<at::Tensor>& given_residual_shift, double dropout,
            const std::optional<at::Tensor>& seed, int64_t layer, int64_t pool) {
    const auto sizes_of = [](const std::optional<at::Tensor>& tensor) -> std::optional<std::vector<int64_t>> {
      if (!tensor) return std::nullopt;
      return tensor->sizes().vec();
    };
    const std::string problem = find_residual_activation_problem(
        {given_x.sizes().vec(), given_scale.sizes().vec(), given_shift.sizes().vec(), sizes_of(given_residual),
         sizes_of(given_residual_scale), sizes_of(given_residual_shift), sizes_of(seed)},
        dropout, layer, pool);
    TORCH_CHECK_VALUE(problem.empty(), problem);
    p.numbers = find_numbers(given_x);
    computed = computed_type(given_x);
    const auto dense = [&](const char* name, const std::optional<at::Tensor>& tensor, at::ScalarType type) {
      if (!tensor) return at::Tensor();
      check_type(name, *tensor, type);
      return tensor->contiguous();
    };
    x = given_x.contiguous();
    scale = dense("scale", given_scale, computed);
    shift = dense("shift", given_shift, computed);
    residual = dense("residual", given_residual, x.scalar_type());
    residual_scale = dense("residual_scale", given_residual_scale, computed);
    residual_shift = dense("residual_shift", given_residual_shift, computed);
    p.x = data_or_null(x);
    p.scale = data_or_null(scale);
    p.shift = data_or_null(shift);
    p.residual = data_or_null(residual);
    p.residual_scale = data_or_null(residual_scale);
    p.residual_shift = data_or_null(residual_shift);
    p.channels = x.size(4);
    p.rows = x.size(1) * x.size(2) * x.size(3);
    p.pool_rows = pool * x.size(2) * x.size(3);
    p.layer = static_cast<uint32_t>(layer);
    p.threshold = math::dropout_threshold(dropout);
    if (seed) {
      check_type("seed", *seed, at::kLong);
      p.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    }
    p.rows_of_item = rows_of_item();
    p.num_sums = given_residual_scale ? 4 : 2;
  }

  int64_t num_items() const { return x.numel() ? x.size(0) * p.items_of_stream() : 0; }

  cpu::ResidualActivation p;
  at::ScalarType computed;
  at::Tensor x, scale, shift, residual, residual_scale, residual_shift;

 private:
  // The sums of an item are small beside its values. Nothing here depends on the number of threads.
  int64_t rows_of_item() const {
    constexpr int64_t kValues = 1 << 16, kFewestRows = 512;
    const int64_t rows = std::max(kFewestRows, kValues / std::max<int64_t>(p.channels, 1));
    // The values of an item begin where the bits of a mask do.
    const int64_t unit = p.pool_rows ? p.pool_rows : 16;
    return (rows + unit - 1) / unit * unit;
  }
};

}  // namespace

at::Tensor residual_activation(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                               const std::optional<at::Tensor>& residual,
                               const std::optional<at::Tensor>& residual_scale,
                               const std::optional<at::Tensor>& residual_shift, double dropout,
                               const std::optional<at::Tensor>& seed, int64_t layer, int64_t pool) {
  const Arguments arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool);
  const auto sizes = residual_activation_output(x.sizes().vec(), pool);
  const at::Tensor out = at::empty(sizes, x.options().dtype(pool ? arguments.computed : x.scalar_type()));
  // The mean of nothing, as everywhere.
  if (arguments.num_items() == 0) return out.fill_(std::numeric_limits<double>::quiet_NaN());
  const auto run = IKEM_DISPATCH_CPU(residual_activation);
  void* const values = out.mutable_data_ptr();
  at::parallel_for(0, arguments.num_items(), 1,
                   [&](int64_t first, int64_t last) { run(arguments.p, first, last, values); });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_activation_backward(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& residual_scale, const std::optional<at::Tensor>& residual_shift, double dropout,
    const std::optional<at::Tensor>& seed, int64_t layer, int64_t pool, const at::Tensor& gradient) {
  const Arguments arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool);
  const auto& p = arguments.p;
  const auto gradient_sizes = residual_activation_output(x.sizes().vec(), pool);
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef(gradient_sizes), "gradient must be ",
                    at::IntArrayRef(gradient_sizes), ", got ", gradient.sizes());
  check_type("gradient", gradient, pool ? arguments.computed : x.scalar_type());
  const at::Tensor dense_gradient = gradient.contiguous();

  const auto options = arguments.scale.options();
  const at::Tensor none = at::empty({0}, options);
  const at::Tensor of_x = at::empty(arguments.x.sizes(), arguments.x.options());
  const at::Tensor of_residual =
      residual ? at::empty(arguments.x.sizes(), arguments.x.options()) : at::empty({0}, options);
  const int64_t streams = x.size(0), items = p.items_of_stream(), numbers = p.num_sums * p.channels;
  const at::Tensor of_coefficients = at::zeros({p.num_sums, streams, p.channels}, options);

  if (arguments.num_items() != 0) {
    const at::Tensor parts = at::empty({streams * items, numbers}, options.dtype(at::kDouble));
    cpu::ResidualActivationGradients gradients;
    gradients.out = dense_gradient.const_data_ptr();
    gradients.x = of_x.mutable_data_ptr();
    gradients.residual = residual ? of_residual.mutable_data_ptr() : nullptr;
    gradients.sums = parts.mutable_data_ptr<double>();
    const auto run = IKEM_DISPATCH_CPU(residual_activation_backward);
    at::parallel_for(0, streams * items, 1,
                     [&](int64_t first, int64_t last) { run(p, first, last, gradients); });
    // In the order of the items, whoever made them.
    std::vector<double> sums(numbers);
    for (int64_t stream = 0; stream < streams; ++stream) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t item = 0; item < items; ++item) {
        const double* const part = gradients.sums + (stream * items + item) * numbers;
        for (int64_t i = 0; i < numbers; ++i) sums[i] += part[i];
      }
      for (int64_t i = 0; i < numbers; ++i) {
        const int64_t place = (i / p.channels * streams + stream) * p.channels + i % p.channels;
        if (arguments.computed == at::kDouble) {
          of_coefficients.mutable_data_ptr<double>()[place] = sums[i];
        } else {
          of_coefficients.mutable_data_ptr<float>()[place] = static_cast<float>(sums[i]);
        }
      }
    }
  }
  // Each a tensor of its own: an operator's results share no memory.
  const auto part = [&](int64_t sum) { return sum < p.num_sums ? of_coefficients[sum].clone() : none.clone(); };
  return {of_x, part(0), part(1), of_residual, part(2), part(3)};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("residual_activation", &residual_activation);
  m.impl("residual_activation_backward", &residual_activation_backward);
}

}  // namespace ikem_fast
