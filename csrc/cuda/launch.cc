// Host side of every kernel launch: see driver.h.
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/driver.h"

namespace pyrt {
namespace {

// Markers of cuLaunchKernel's `extra` list (CU_LAUNCH_PARAM_* of cuda.h).
void* const kParamEnd = nullptr;
void* const kParamBuffer = reinterpret_cast<void*>(std::uintptr_t{1});
void* const kParamSize = reinterpret_cast<void*>(std::uintptr_t{2});

template <typename Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr)
    throw std::runtime_error(std::string("cuda: the driver library has no ") + name);
}

}  // namespace

Driver::Driver(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW)) {
  if (library_ == nullptr)
    throw std::runtime_error(std::string("cuda: no driver on this machine: ") + dlerror());
  find(library_, "cuInit", &init_);
  find(library_, "cuDeviceGet", &device_get_);
  find(library_, "cuDevicePrimaryCtxRetain", &retain_);
  find(library_, "cuCtxGetCurrent", &get_current_);
  find(library_, "cuCtxPushCurrent_v2", &push_);
  find(library_, "cuCtxPopCurrent_v2", &pop_);
  find(library_, "cuLaunchKernel", &launch_);
  find(library_, "cuGetErrorString", &error_string_);
}

Driver::~Driver() { dlclose(library_); }

void Driver::check(Status status, const char* call, const char* kernel) const {
  if (status == 0) return;
  const char* text = nullptr;
  error_string_(status, &text);
  throw std::runtime_error(std::string(kernel) + ": " + call + " failed: " +
                           (text ? text : "unknown error") + " (" + std::to_string(status) + ")");
}

void* Driver::primary_context(int device, const char* kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = contexts_.find(device);
  if (known != contexts_.end()) return known->second;
  int handle = 0;
  void* context = nullptr;
  check(init_(0), "cuInit", kernel);
  check(device_get_(&handle, device), "cuDeviceGet", kernel);
  check(retain_(&context, handle), "cuDevicePrimaryCtxRetain", kernel);
  return contexts_[device] = context;
}

void Driver::launch(const Launch& l) {
  if (l.grid_x == 0 || l.grid_y == 0 || l.block_x == 0 || l.block_y == 0)
    throw std::invalid_argument(std::string(l.name) + ": grid [" + std::to_string(l.grid_x) + ", " +
                                std::to_string(l.grid_y) + "] and block [" +
                                std::to_string(l.block_x) + ", " + std::to_string(l.block_y) +
                                "] must not be empty");
  std::size_t size = l.args_size;
  void* extra[] = {kParamBuffer, const_cast<void*>(l.args), kParamSize, &size, kParamEnd};

  // A thread that never touched CUDA, or works on another device, has another current context.
  void* wanted = primary_context(l.device, l.name);
  void* current = nullptr;
  check(get_current_(&current), "cuCtxGetCurrent", l.name);
  const bool foreign = current != wanted;
  if (foreign) check(push_(wanted), "cuCtxPushCurrent", l.name);
  const Status status = launch_(l.function, l.grid_x, l.grid_y, 1, l.block_x, l.block_y, 1,
                                l.shared_bytes, l.stream, nullptr, extra);
  if (foreign) {
    void* popped = nullptr;
    pop_(&popped);
  }
  check(status, "cuLaunchKernel", l.name);
}

}  // namespace pyrt
