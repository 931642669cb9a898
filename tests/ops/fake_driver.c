// A libcuda that records the last launch. fake_status is what cuLaunchKernel answers.
#include <string.h>

struct Record {
  void* function;
  unsigned grid[3], block[3], shared;
  void* stream;
  void* context;  // current at the launch
  unsigned char args[256];
  unsigned long args_size;
  int pushed, popped, retained;
};

struct Record fake_record;
int fake_status;
static void* current;

int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal > 3) return 101;
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++fake_record.retained;
  *context = (void*)(0x1000ul + (unsigned long)device);
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  ++fake_record.pushed;
  current = context;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  ++fake_record.popped;
  *context = current;
  current = 0;
  return 0;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 701 ? "too many resources requested for launch" : 0;
  return status == 701 ? 0 : 1;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
  struct Record* r = &fake_record;
  if (params != 0) return 1;
  r->function = function;
  r->grid[0] = gx, r->grid[1] = gy, r->grid[2] = gz;
  r->block[0] = bx, r->block[1] = by, r->block[2] = bz;
  r->shared = shared;
  r->stream = stream;
  r->context = current;
  for (int i = 0; extra[i] != 0; i += 2) {
    if (extra[i] == (void*)2) r->args_size = *(unsigned long*)extra[i + 1];
  }
  for (int i = 0; extra[i] != 0; i += 2) {
    if (extra[i] == (void*)1) memcpy(r->args, extra[i + 1], r->args_size);
  }
  return fake_status;
}
