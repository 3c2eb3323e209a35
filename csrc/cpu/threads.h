// The caller's thread pool, passed in so that the kernels stay free of torch.
#pragma once

#include <cstdint>

namespace fuseblock::cpu {

struct Threads {
  // Calls body(begin, end, context) on chunks that cover [0, n). Chunks may run one after the other on one thread.
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*parallel_for)(int64_t n, int64_t grain, Body body, void* context);
  int64_t count;
};

template <class F>
void parallel_for(const Threads& threads, int64_t n, int64_t grain, F&& f) {
  if (threads.count <= 1 || n <= grain) {
    f(int64_t(0), n);
    return;
  }
  auto body = [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); };
  threads.parallel_for(n, grain, body, &f);
}

}  // namespace fuseblock::cpu
