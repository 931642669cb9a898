// The few CUDA driver entry points that a launch needs, found with dlopen: nothing of CUDA is
// included or linked, so this builds and imports on a machine without a toolkit or a GPU.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

namespace pyrt {

struct Launch {
  const char* name;  // for errors
  void* function;    // CUfunction
  unsigned grid_x, grid_y;
  unsigned block_x, block_y;
  unsigned shared_bytes;  // dynamic
  int device;             // whose primary context owns function and stream
  void* stream;           // CUstream; null is torch's default stream, not "no stream"
  const void* args;       // kernel parameters laid out as a C struct
  std::size_t args_size;
};

class Driver {
 public:
  // Opens the driver library; throws std::runtime_error when it or an entry point is missing.
  explicit Driver(const std::string& library);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Enqueues the kernel and returns. Thread safe. Throws std::invalid_argument for an empty grid or
  // block, std::runtime_error with the driver's text and the kernel's name when it refuses.
  void launch(const Launch& launch);

 private:
  using Status = int;  // CUresult
  void check(Status status, const char* call, const char* kernel) const;
  void* primary_context(int device, const char* kernel);

  void* library_;
  Status (*init_)(unsigned);
  Status (*device_get_)(int*, int);
  Status (*retain_)(void**, int);
  Status (*get_current_)(void**);
  Status (*push_)(void*);
  Status (*pop_)(void**);
  Status (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                    void*, void**, void**);
  Status (*error_string_)(Status, const char**);

  std::mutex mutex_;
  std::map<int, void*> contexts_;  // device -> retained primary context, kept for the process
};

}  // namespace pyrt
