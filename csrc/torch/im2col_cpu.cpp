// torch.ops.fuseblock_cpu.im2col: checks, launch. Semantics: csrc/cpu/im2col.h.
#include "../cpu/im2col.h"

#include <vector>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

constexpr const char* kOp = "im2col";

void im2col(const Tensor& x, const Tensor& columns, int64_t first, int64_t out_w, std::vector<int64_t> kernel,
            std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Shape in = shape_of(x), out = shape_of(columns);
  STD_TORCH_CHECK(in.size() == 3, kOp, ": x must have shape (C, H, W), got ", text(in));
  for (const auto& pair : {kernel, stride, padding, dilation}) {
    STD_TORCH_CHECK(pair.size() == 2, kOp, ": kernel, stride, padding and dilation must have two elements");
  }
  for (const auto& pair : {kernel, stride, dilation}) {
    STD_TORCH_CHECK(pair[0] > 0 && pair[1] > 0, kOp, ": kernel, stride and dilation must be positive");
  }
  STD_TORCH_CHECK(out.size() == 2 && out[0] == in[0] * kernel[0] * kernel[1] && out_w > 0 && out[1] % out_w == 0, kOp,
                  ": columns must have shape (C kh kw, rows * out_w), got ", text(out));
  check(x, kOp, "x", in, ScalarType::Float);
  check(columns, kOp, "columns", out, ScalarType::Float);
  STD_TORCH_CHECK(x.is_contiguous() && columns.is_contiguous(), kOp, ": x and columns must be contiguous");
  if (columns.numel() == 0) return;
  cpu::im2col({static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(columns.mutable_data_ptr()), in[0], in[1],
               in[2], first, out[1] / out_w, out_w, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1],
               dilation[0], dilation[1]},
              torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) { m.impl("im2col", TORCH_BOX(&im2col)); }

}  // namespace fuseblock::torch_cpu
