// What the CPU operators need around their kernels: checked views of tensors, outputs, PyTorch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/kernel_table.h"
#include "../cpu/team.h"

namespace fuseblock::torch_cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

inline Shape shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline cpu::DType kernel_dtype(const Tensor& x, const char* op, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cpu::DType::f32;
    case ScalarType::Double: return cpu::DType::f64;
    case ScalarType::Half: return cpu::DType::f16;
    case ScalarType::BFloat16: return cpu::DType::bf16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float16, bfloat16, float32 or float64");
  }
}

// float32 for 16-bit types, else the type itself.
inline ScalarType state_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline void check(const Tensor& x, const char* op, const char* name, const Shape& shape, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " must be ", name_of(dtype), ", got ",
                  name_of(x.scalar_type()));
  const auto sizes = x.sizes();
  bool equal = sizes.size() == shape.size();
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = sizes[i] == shape[i];
  STD_TORCH_CHECK(equal, op, ": ", name, " must have shape ", text(shape), ", got ", text(shape_of(x)));
}

// A checked, contiguous tensor that lives as long as this does; absent if the argument is.
class Input {
 public:
  Input(const Tensor& x, const char* op, const char* name, const Shape& shape, ScalarType dtype) {
    check(x, op, name, shape, dtype);
    tensor_ = x.is_contiguous() ? x : torch::stable::contiguous(x);
  }
  Input(const MaybeTensor& x, const char* op, const char* name, const Shape& shape, ScalarType dtype) {
    if (x) *this = Input(*x, op, name, shape, dtype);
  }
  const void* data() const { return tensor_ ? tensor_->const_data_ptr() : nullptr; }
  explicit operator bool() const { return tensor_.has_value(); }

 private:
  MaybeTensor tensor_;
};

// Asks for huge pages where a tensor holds several: its first use would otherwise cost a page fault for every 4 KiB, which
// takes longer than the LSTM's arithmetic on them.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A dense tensor; strides must be those of the shape in some order of its dimensions.
inline Tensor empty_strided(const Shape& shape, const Shape& strides, ScalarType dtype) {
  int32_t code = 0;
  switch (dtype) {
    case ScalarType::Double: code = aoti_torch_dtype_float64(); break;
    case ScalarType::Half: code = aoti_torch_dtype_float16(); break;
    case ScalarType::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    default: code = aoti_torch_dtype_float32(); break;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)shape.size(), shape.data(), strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  const int64_t element = dtype == ScalarType::Double ? 8 : state_type(dtype) == dtype ? 4 : 2;
  if (!shape.empty()) advise_huge_pages(result.mutable_data_ptr(), (size_t)(shape[0] * strides[0] * element));
  return result;
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i] > 1 ? shape[i] : 1;
  }
  return strides;
}

inline Tensor empty(const Shape& shape, ScalarType dtype) { return empty_strided(shape, contiguous_strides(shape), dtype); }

// Of uint8: a mask, or none.
inline Tensor bytes(int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(),
                                                  0, &handle));
  return Tensor(handle);
}

inline cpu::Threads torch_threads() {
  const auto run = [](int64_t n, int64_t grain, cpu::Threads::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {run, cpu::in_forked_child() ? 1 : (int64_t)torch::stable::get_num_threads()};
}

inline void check_isa(const char* op) {
  STD_TORCH_CHECK(cpu::kernel_table() != nullptr, op,
                  ": FUSEBLOCK_CPU_ISA must be baseline, avx2 or avx512, and this machine must have it");
}

}  // namespace fuseblock::torch_cpu
