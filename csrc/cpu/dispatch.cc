// Which build of the kernels this processor runs.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace pyrt {
namespace {

#define PYRT_KERNELS(isa)                                                                      \
  Kernels {                                                                                    \
    #isa, isa::choose_topk, isa::combine, isa::segment_matmul, isa::rms_norm, isa::layer_norm, \
        isa::patches, isa::gather_patches, isa::embed_patches, isa::gate, isa::append,         \
        isa::rotate, isa::attention, isa::plan_exit, isa::attention_varlen                     \
  }

struct Build {
  Kernels kernels;
  bool supported;
};

Kernels choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Build builds[] = {
      {PYRT_KERNELS(avx512_bf16),
       avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")},
      {PYRT_KERNELS(avx512), avx512},
      {PYRT_KERNELS(avx2), avx2},
      {PYRT_KERNELS(portable), true},
  };
#else
  const Build builds[] = {{PYRT_KERNELS(portable), true}};
#endif
  const char* wanted = std::getenv("PYRUNTIME_CPU_ISA");
  std::string known;
  for (const Build& build : builds) {
    if (wanted && *wanted) {
      known += known.empty() ? build.kernels.isa : std::string(", ") + build.kernels.isa;
      if (std::strcmp(wanted, build.kernels.isa) != 0) continue;
      PYRT_CHECK(build.supported, "PYRUNTIME_CPU_ISA=" << wanted << ": this processor lacks it");
      return build.kernels;
    }
    if (build.supported) return build.kernels;
  }
  PYRT_CHECK(false, "PYRUNTIME_CPU_ISA=" << wanted << ": unknown, expected one of " << known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace pyrt
