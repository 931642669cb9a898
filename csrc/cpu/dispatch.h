// The per-instruction-set entry points that dispatch.cc chooses from.
#pragma once

#include "ops.h"

#define PYRT_DECLARE(isa)                      \
  namespace pyrt::isa {                        \
  void choose_topk(const TopKArgs&);           \
  void combine(const CombineArgs&);            \
  void segment_matmul(const MatmulArgs&);      \
  void rms_norm(const NormArgs&);              \
  void layer_norm(const NormArgs&);            \
  void patches(const PatchArgs&);              \
  void gather_patches(const GatherPatchArgs&); \
  void embed_patches(const EmbedArgs&);        \
  void gate(const GateArgs&);                  \
  void append(const AppendArgs&);              \
  void rotate(const RotateArgs&);              \
  void attention(const AttentionArgs&);        \
  int64_t plan_exit(const ExitArgs&);          \
  void attention_varlen(const VarlenArgs&);    \
  }

PYRT_DECLARE(portable)
#if defined(__x86_64__)
PYRT_DECLARE(avx2)
PYRT_DECLARE(avx512)
PYRT_DECLARE(avx512_bf16)
#endif
