// What every CUDA operator needs around its launch: device, stream, views of tensors, error reports. Stable ABI only.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/dtype.h"
#include "cuda/rows.h"

namespace fuseblock::torch_cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// PyTorch's current stream. The lookup lives in libtorch_cuda, which this library must not be linked with (it also loads
// where PyTorch has no CUDA) and which PyTorch loads without exporting its symbols; hence dlopen by name.
inline void* current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(lookup != nullptr, "fuseblock: this PyTorch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
  return stream;
}

// Makes a tensor's device current for as long as it lives, and knows the stream to launch on.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

inline void check_launch(int error, const char* op) {
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here: the next launch is not to be blamed for it
  STD_TORCH_CHECK(error == cudaSuccess, "fuseblock::", op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline DType dtype_number(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return kFloat64;
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fuseblock::", op, ": expected float64, float32, float16 or bfloat16");
  return kFloat64;
}

// The state dtype: float32 for 16-bit tensors, else the tensor's own.
inline ScalarType state_dtype(const Tensor& x) {
  return x.element_size() == 2 ? ScalarType::Float : x.scalar_type();
}

// What a view must look like: dtype, device and last two dimensions. `op` and the tensor's name go into error messages.
struct Expected {
  const char* op;
  ScalarType dtype;
  int32_t device;
  int64_t rows, columns;

  void check(const Tensor& x, const char* name, int64_t rows_found) const {
    const int64_t columns_found = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device, "fuseblock::", op, ": expected ", name,
                    " on CUDA device ", device);
    STD_TORCH_CHECK(x.scalar_type() == dtype, "fuseblock::", op, ": ", name, " has the wrong dtype");
    STD_TORCH_CHECK(rows_found == rows && columns_found == columns, "fuseblock::", op, ": expected ", name, " with ", rows,
                    " rows of ", columns, " elements, got ", rows_found, " of ", columns_found);
  }
};

// The stride of a tensor's rows when its leading dimensions are folded into one; nothing if they cannot be.
inline std::optional<int64_t> folded_row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> row_stride;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (row_stride.has_value() && x.stride(d) != expected) return std::nullopt;
    if (!row_stride.has_value()) row_stride = x.stride(d);
    expected = x.stride(d) * x.size(d);
  }
  return row_stride.value_or(x.size(last));
}

// An input as rows, whatever its leading dimensions; copied only if its strides do not fold. Absent: data is null.
class InputRows {
 public:
  InputRows(const MaybeTensor& x, const char* name, const Expected& expected) {
    if (!x.has_value()) return;
    const int64_t columns = x->dim() > 0 ? x->size(x->dim() - 1) : 0;
    expected.check(*x, name, columns > 0 ? x->numel() / columns : expected.rows);
    std::optional<int64_t> stride = folded_row_stride(*x);
    tensor_ = stride.has_value() ? *x : torch::stable::contiguous(*x);
    rows_ = {tensor_->data_ptr(), stride.value_or(columns)};
  }
  operator Rows() const { return rows_; }

 private:
  MaybeTensor tensor_;  // keeps a copy alive
  Rows rows_{nullptr, 0};
};

// A two-dimensional tensor that a kernel reads or writes in place: any row stride, contiguous rows. Absent: data is null.
inline Rows matrix_rows(const MaybeTensor& x, const char* name, const Expected& expected) {
  if (!x.has_value()) return {nullptr, 0};
  STD_TORCH_CHECK(x->dim() == 2, "fuseblock::", expected.op, ": expected ", name, " with 2 dimensions, got ", x->dim());
  expected.check(*x, name, x->size(0));
  STD_TORCH_CHECK(x->stride(1) == 1 || x->size(1) <= 1, "fuseblock::", expected.op, ": ", name,
                  " must be contiguous in its last dimension");
  return {x->data_ptr(), x->stride(0)};
}

}  // namespace fuseblock::torch_cuda
