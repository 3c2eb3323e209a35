// torch.ops.fuseblock_cpu.upfirdn2d: checks, output, launch. Semantics: csrc/cpu/upfirdn2d.h.
#include "../cpu/upfirdn2d.h"

#include <vector>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

constexpr const char* kOp = "upfirdn2d";

// Strides of an image (N, C, H, W) in channels-last order.
Shape channels_last_strides(const Shape& s) { return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]}; }

bool has_strides(const Tensor& x, const Shape& strides) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1 && x.stride(d) != strides[(size_t)d]) return false;
  }
  return true;
}

// The filter as the kernel wants it: turned unless `flip_filter`, times the gain.
template <class C>
std::vector<C> weights(const Input& f, int64_t count, bool flip_filter, double gain) {
  const C* from = static_cast<const C*>(f.data());
  std::vector<C> w((size_t)count);
  for (int64_t i = 0; i < count; ++i) w[(size_t)i] = (flip_filter ? from[i] : from[count - 1 - i]) * (C)gain;
  return w;
}

Tensor upfirdn2d(const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y, int64_t pad_x0,
                 int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip_filter, double gain) {
  check_isa(kOp);
  const Shape in = shape_of(x), taps = shape_of(f);
  STD_TORCH_CHECK(in.size() == 4, kOp, ": x must have shape (N, C, H, W), got ", text(in));
  STD_TORCH_CHECK(taps.size() == 2 && taps[0] > 0 && taps[1] > 0, kOp, ": f must have shape (fh, fw), got ", text(taps));
  STD_TORCH_CHECK(up_x > 0 && up_y > 0 && down_x > 0 && down_y > 0, kOp, ": up and down must be positive");
  const int64_t rest_y = in[2] * up_y + pad_y0 + pad_y1 - taps[0], rest_x = in[3] * up_x + pad_x0 + pad_x1 - taps[1];
  STD_TORCH_CHECK(rest_x >= 0 && rest_y >= 0, kOp, ": the filter is larger than the upsampled and padded image");
  const Shape out{in[0], in[1], rest_y / down_y + 1, rest_x / down_x + 1};

  const bool channels_last = !x.is_contiguous() && has_strides(x, channels_last_strides(in));
  MaybeTensor image;
  if (channels_last) {
    check(x, kOp, "x", in, x.scalar_type());
    image = x;
  } else {
    image = x.is_contiguous() ? x : torch::stable::contiguous(x);
  }
  Tensor y = channels_last ? empty_strided(out, channels_last_strides(out), x.scalar_type()) : empty(out, x.scalar_type());
  if (out[0] * out[1] == 0) return y;

  cpu::Upfirdn2d args;
  args.x = image->const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.dtype = kernel_dtype(x, kOp, "x");
  args.planes = channels_last ? in[0] : in[0] * in[1];
  args.channels = channels_last ? in[1] : 1;
  args.in_h = in[2], args.in_w = in[3], args.out_h = out[2], args.out_w = out[3];
  args.taps_y = taps[0], args.taps_x = taps[1];
  args.up_x = up_x, args.up_y = up_y, args.down_x = down_x, args.down_y = down_y;
  args.pad_x = pad_x0, args.pad_y = pad_y0;
  const Input filter(f, kOp, "f", taps, state_type(x.scalar_type()));
  const auto run = [&](auto w) {
    args.weights = w.data();
    cpu::upfirdn2d(args, torch_threads());
  };
  if (args.dtype == cpu::DType::f64) run(weights<double>(filter, taps[0] * taps[1], flip_filter, gain));
  else run(weights<float>(filter, taps[0] * taps[1], flip_filter, gain));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace fuseblock::torch_cpu
