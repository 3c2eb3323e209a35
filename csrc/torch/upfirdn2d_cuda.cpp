// torch.ops.fuseblock_cuda.upfirdn2d: checks, output, launch. Semantics: csrc/cuda/upfirdn2d.h.
#if defined(WITH_CUDA)

#include "cuda/upfirdn2d.h"

#include <array>
#include <cstdint>

#include "torch/cuda_tensors.h"

namespace fuseblock::torch_cuda {
namespace {

constexpr const char* kOp = "upfirdn2d";
using Image = std::array<int64_t, 4>;  // sizes or strides of (N, C, H, W)

Image channels_last_strides(const Image& s) { return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]}; }

bool is_channels_last(const Tensor& x, const Image& sizes) {
  const Image wanted = channels_last_strides(sizes);
  bool same = !x.is_contiguous();
  for (int64_t d = 0; d < 4; ++d) same = same && (x.size(d) == 1 || x.stride(d) == wanted[d]);
  return same;
}

Tensor fresh(const Tensor& like, const Image& sizes, const Image& strides) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

int32_t small(int64_t n) {
  STD_TORCH_CHECK(n >= INT32_MIN / 4 && n <= INT32_MAX / 4, "fuseblock::", kOp, ": a size or factor is too large: ", n);
  return static_cast<int32_t>(n);
}

Tensor upfirdn2d(const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y, int64_t pad_x0,
                 int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip_filter, double gain) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "fuseblock::", kOp, ": expected x of shape (N, C, H, W) on a GPU");
  const OnDeviceOf device(x);
  const bool fits = f.is_cuda() && f.get_device_index() == x.get_device_index() && f.dim() == 2 && f.numel() > 0 &&
                    f.scalar_type() == state_dtype(x);
  STD_TORCH_CHECK(fits, "fuseblock::", kOp, ": expected f (fh, fw) on x's device, in float32 (float64 for float64)");
  STD_TORCH_CHECK(up_x > 0 && up_y > 0 && down_x > 0 && down_y > 0, "fuseblock::", kOp, ": up and down must be positive");
  const Image in{x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t rest_y = in[2] * up_y + pad_y0 + pad_y1 - f.size(0), rest_x = in[3] * up_x + pad_x0 + pad_x1 - f.size(1);
  STD_TORCH_CHECK(rest_x >= 0 && rest_y >= 0, "fuseblock::", kOp, ": the filter is larger than the padded image");
  const Image out{in[0], in[1], rest_y / down_y + 1, rest_x / down_x + 1};

  const bool channels_last = is_channels_last(x, in);
  const Tensor image = channels_last || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor filter = f.is_contiguous() ? f : torch::stable::contiguous(f);
  const Image rows{out[1] * out[2] * out[3], out[2] * out[3], out[3], 1};
  Tensor y = fresh(x, out, channels_last ? channels_last_strides(out) : rows);
  const Upfirdn2d op{image.data_ptr(),
                     filter.data_ptr(),
                     y.data_ptr(),
                     channels_last ? in[0] : in[0] * in[1],
                     channels_last ? in[1] : 1,
                     small(in[2]),
                     small(in[3]),
                     small(out[2]),
                     small(out[3]),
                     small(f.size(1)),
                     small(f.size(0)),
                     small(up_x),
                     small(up_y),
                     small(down_x),
                     small(down_y),
                     small(pad_x0),
                     small(pad_y0),
                     flip_filter,
                     gain};
  if (y.numel() > 0) check_launch(launch_upfirdn2d(&op, dtype_number(x, kOp), device.stream()), kOp);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fuseblock_cuda, m) {
  m.def(
      "upfirdn2d(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int pad_x0, int pad_x1, int pad_y0,"
      " int pad_y1, bool flip_filter, float gain) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cuda, CUDA, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace
}  // namespace fuseblock::torch_cuda

#endif
