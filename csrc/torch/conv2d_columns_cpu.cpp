// torch.ops.fuseblock_cpu.conv2d_columns: a convolution and a weight gradient of the same images as matrix products with
// their columns (csrc/cpu/im2col.h), for each image
//
//   y = W columns        dW += dy columns^T
//
// Threads work on rows of output of their own, each with columns, products and a sum of dW of its own.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/im2col.h"
#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

constexpr const char* kOp = "conv2d_columns";
// Elements that one thread adds in the time that it takes to wake another.
constexpr int64_t kAddedPerThread = 16384;

// A matrix of floats that somebody else owns.
Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes, strides, 0,
                                                            aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                            &handle));
  return Tensor(handle);
}

struct Products {
  cpu::Im2col image;  // of the first image, all of its rows
  const float *dy, *weight;
  float* y;
  int64_t images, outputs, height, rows;

  int64_t depth() const { return image.channels * image.kernel_h * image.kernel_w; }
  int64_t tiles_of_image() const { return (height + rows - 1) / rows; }

  // Tiles [begin, end): their part of y is written, that of dW added to the sum.
  void run(int64_t begin, int64_t end, float* sum) const {
    std::vector<float> scratch((size_t)(depth() * rows * image.out_w));
    const Tensor w = matrix(weight, outputs, depth(), depth(), 1), dw = matrix(sum, outputs, depth(), depth(), 1);
    const int64_t pixels = height * image.out_w;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t n = tile / tiles_of_image();
      cpu::Im2col part = image;
      part.x += n * image.channels * image.in_h * image.in_w;
      part.columns = scratch.data();
      part.first = tile % tiles_of_image() * rows;
      part.rows = std::min(rows, height - part.first);
      cpu::im2col(part);
      const int64_t count = part.rows * image.out_w, place = n * outputs * pixels + part.first * image.out_w;
      const Tensor columns = matrix(scratch.data(), depth(), count, count, 1);
      const Tensor transposed = matrix(scratch.data(), count, depth(), 1, count);
      const Tensor out = matrix(y + place, outputs, count, pixels, 1), cotangent = matrix(dy + place, outputs, count, pixels, 1);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), w.get(), columns.get()));
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(dw.get(), dw.get(), cotangent.get(), transposed.get(), 1, 1));
    }
  }
};

// dy: (N, C_out, H', W'), x: (N, C_in, H, W), weight: (C_out, C_in, kh, kw), float32 and contiguous. Columns are made of so many
// rows of output at a time that they take tile_bytes, or of one.
std::tuple<Tensor, Tensor> conv2d_columns(const Tensor& dy, const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                                          std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t tile_bytes) {
  const Shape out = shape_of(dy), in = shape_of(x), filter = shape_of(weight);
  STD_TORCH_CHECK(out.size() == 4 && in.size() == 4 && filter.size() == 4, kOp, ": dy, x and weight must have 4 dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, kOp,
                  ": stride, padding and dilation must have two elements");
  Shape expected = {in[0], filter[0], 0, 0};
  for (size_t d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0, kOp, ": stride and dilation must be positive");
    expected[2 + d] = (in[2 + d] + 2 * padding[d] - dilation[d] * (filter[2 + d] - 1) - 1) / stride[d] + 1;
  }
  check(dy, kOp, "dy", expected, ScalarType::Float);
  check(x, kOp, "x", in, ScalarType::Float);
  check(weight, kOp, "weight", {filter[0], in[1], filter[2], filter[3]}, ScalarType::Float);
  STD_TORCH_CHECK(dy.is_contiguous() && x.is_contiguous() && weight.is_contiguous(), kOp, ": tensors must be contiguous");
  STD_TORCH_CHECK(dy.numel() > 0 && weight.numel() > 0, kOp, ": tensors must not be empty");

  Tensor y = empty(out, ScalarType::Float), dweight = empty(filter, ScalarType::Float);
  Products products{{static_cast<const float*>(x.const_data_ptr()), nullptr, in[1], in[2], in[3], 0, out[2], out[3], filter[2],
                     filter[3], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]},
                    static_cast<const float*>(dy.const_data_ptr()),
                    static_cast<const float*>(weight.const_data_ptr()),
                    static_cast<float*>(y.mutable_data_ptr()),
                    out[0],
                    out[1],
                    out[2],
                    0};
  const cpu::Threads threads = torch_threads();
  const int64_t row_bytes = (int64_t)sizeof(float) * products.depth() * out[3];
  const int64_t parts = std::max((out[2] * row_bytes + tile_bytes - 1) / tile_bytes, (threads.count + out[0] - 1) / out[0]);
  products.rows = (out[2] + std::min(parts, out[2]) - 1) / std::min(parts, out[2]);
  const int64_t tiles = out[0] * products.tiles_of_image(), workers = std::min(threads.count, tiles);
  const int64_t elements = weight.numel();
  std::vector<float> others((size_t)(elements * (workers - 1)));
  float* const sum = static_cast<float*>(dweight.mutable_data_ptr());
  std::fill_n(sum, elements, 0.0f);
  cpu::parallel_for(threads, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      products.run(j * tiles / workers, (j + 1) * tiles / workers, j == 0 ? sum : others.data() + (j - 1) * elements);
    }
  });
  cpu::parallel_for(threads, elements, kAddedPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t j = 1; j < workers; ++j) {
      const float* const other = others.data() + (j - 1) * elements;
      for (int64_t i = begin; i < end; ++i) sum[i] += other[i];
    }
  });
  return {y, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) { m.impl("conv2d_columns", TORCH_BOX(&conv2d_columns)); }

}  // namespace fuseblock::torch_cpu
