// A list of every kernel that the library can launch, for introspection. Using `registered<kernel>` anywhere (FB_LAUNCH
// does) enters the kernel at load time, launched or not.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fuseblock {

struct KernelEntry {
  std::string name;
  const void* function;
};

inline std::vector<KernelEntry>& kernel_registry() {
  static std::vector<KernelEntry> entries;
  return entries;
}

// "fuseblock::lstm_step_fwd_kernel<float, float, 4>", from the compiler's spelling of this function's own name.
template <auto Kernel>
std::string kernel_name() {
  const std::string_view text = __PRETTY_FUNCTION__;
  const size_t start = text.find("Kernel = ") + 9;
  return std::string(text.substr(start, text.find_last_of(";]") - start));
}

template <auto Kernel>
struct Registration {
  Registration() { kernel_registry().push_back({kernel_name<Kernel>(), reinterpret_cast<const void*>(Kernel)}); }
  static inline const Registration instance{};
};

template <auto Kernel>
void registered() {
  (void)&Registration<Kernel>::instance;
}

}  // namespace fuseblock
