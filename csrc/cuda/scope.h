// Where an operation's kernels run: the current stream of the device that holds its tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "launch.h"

namespace diveq {

// That device is the current one while a Scope lives.
class Scope {
 public:
  explicit Scope(const torch::stable::Tensor& t) {
#if defined(DIVEQ_EMULATE)
    if (t.is_cuda()) throw std::runtime_error("the emulated kernels take CPU tensors");
#else
    if (!t.is_cuda()) throw std::runtime_error("expected CUDA tensors");
    const auto device = static_cast<int32_t>(t.get_device_index());
    guard_.emplace(device);
    void* current = nullptr;
    if (current_stream()(device, &current)) throw std::runtime_error("torch gave no CUDA stream");
    stream = static_cast<Stream>(current);
#endif
  }

  Stream stream = nullptr;

 private:
#if !defined(DIVEQ_EMULATE)
  using CurrentStream = int (*)(int32_t, void**);

  // Part of torch's C shim, but of its CUDA half: linked with it, this library would not load under a CPU torch.
  static CurrentStream current_stream() {
    static const auto function = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    if (!function) throw std::runtime_error("this torch has no CUDA");
    return function;
  }
#endif

  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace diveq
