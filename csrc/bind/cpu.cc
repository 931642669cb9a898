// Python to C++: addresses and integers in, views out. pyruntime/ops/native is the only caller
// and has checked dtype, device, contiguity and shape; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cstdlib>
#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace pyrt;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PlanView view(Address rows, Address offsets, Address weights, Address inverse, int64_t num_rows,
              int64_t choices, int64_t segments, int64_t kept) {
  return {at<int32_t>(rows),  at<int32_t>(offsets),
          at<float>(weights), at<int32_t>(inverse),
          num_rows,           choices,
          segments,           kept};
}

// Whether boundaries [count + 1] cut [0, rows) into sequences.
bool cuts(const int32_t* boundaries, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (boundaries[i] > boundaries[i + 1]) return false;
  return boundaries[0] == 0 && boundaries[count] == rows;
}

// Activations are allocated and freed all the time. By default glibc gives them back to the kernel
// in between, which maps and clears every page anew: up to a third of a forward pass (measured).
// A process that has its own mind about malloc keeps it.
void keep_memory() {
#if defined(__GLIBC__)
  for (const char* name : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_",
                           "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"})
    if (std::getenv(name)) return;
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest it takes
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  keep_memory();

  m.def("isa", [] { return kernels().isa; });

  m.def("plan_threshold", [](Address scores, Address tau, int64_t tau_stride, int64_t n,
                             Address rows, Address offsets, Address inverse, Address weights) {
    return plan_threshold(at<float>(scores), at<float>(tau), tau_stride, n, at<int32_t>(rows),
                          at<int32_t>(offsets), at<int32_t>(inverse), at<float>(weights));
  });
  m.def("plan_topk",
        [](Address logits, Address bias, Address limits, int64_t n, int64_t experts, int64_t k,
           int flags, int64_t groups, int64_t top_groups, float epsilon, float scale, Address rows,
           Address offsets, Address weights, Address inverse) {
          py::gil_scoped_release unlocked;
          return plan_topk({at<float>(logits),
                            at<float>(bias),
                            at<float>(limits),
                            {k, flags, groups, top_groups, epsilon, scale},
                            at<int32_t>(inverse),
                            nullptr,
                            n,
                            experts},
                           at<int32_t>(rows), at<int32_t>(offsets), at<float>(weights));
        });
  m.def("plan_partition",
        [](Address labels, Address slot_weights, int64_t n, int64_t choices, int64_t segments,
           Address rows, Address offsets, Address weights, Address inverse) {
          py::gil_scoped_release unlocked;
          return plan_partition(at<int32_t>(labels), at<float>(slot_weights), n, choices, segments,
                                at<int32_t>(rows), at<int32_t>(offsets), at<float>(weights),
                                at<int32_t>(inverse));
        });
  m.def("quantile", [](Address scores, int64_t n, double q, Address scratch) {
    return quantile(at<float>(scores), n, q, at<float>(scratch));
  });

  m.def("gather", [](Address x, Address rows, int64_t kept, int64_t row_bytes, Address out) {
    py::gil_scoped_release unlocked;
    gather(at<void>(x), at<int32_t>(rows), kept, row_bytes, at<void>(out));
  });
  m.def("compact", [](Address x, Address rows, int64_t kept, int64_t row_bytes) {
    py::gil_scoped_release unlocked;
    compact(at<void>(x), at<int32_t>(rows), kept, row_bytes);
  });
  m.def("combine", [](Address packed, Address rows, Address weights, Address inverse,
                      int64_t num_rows, int64_t choices, int64_t kept, Address channel_weights,
                      Address out, int64_t width, int dtype) {
    const CombineArgs args{at<void>(packed),
                           view(rows, 0, weights, inverse, num_rows, choices, 1, kept),
                           at<float>(channel_weights),
                           at<void>(out),
                           width,
                           DType(dtype)};
    py::gil_scoped_release unlocked;
    kernels().combine(args);
  });

  m.def("segment_matmul",
        [](Address x, Address weight, Address scale, Address bias, Address out, Address rows,
           Address offsets, int64_t segments, int64_t kept, int64_t in_features,
           int64_t out_features, int dtype, int weight_dtype, int out_dtype, int epilogue,
           float alpha, float limit, bool accumulate) {
          const MatmulArgs args{at<void>(x),
                                at<void>(weight),
                                at<float>(scale),
                                at<float>(bias),
                                at<void>(out),
                                view(rows, offsets, 0, 0, kept, 1, segments, kept),
                                in_features,
                                out_features,
                                DType(dtype),
                                DType(weight_dtype),
                                DType(out_dtype),
                                Epilogue(epilogue),
                                alpha,
                                limit,
                                accumulate};
          py::gil_scoped_release unlocked;
          kernels().segment_matmul(args);
        });

  m.def("rms_norm", [](Address x, Address weight, Address out, Address probe, float probe_bias,
                       Address probe_out, int64_t rows, int64_t width, float eps, int dtype) {
    const NormArgs args{at<void>(x),
                        nullptr,
                        at<float>(weight),
                        nullptr,
                        at<void>(out),
                        at<float>(probe),
                        probe_bias,
                        at<float>(probe_out),
                        rows,
                        width,
                        eps,
                        DType(dtype),
                        DType(dtype),
                        false};
    py::gil_scoped_release unlocked;
    kernels().rms_norm(args);
  });
  m.def("layer_norm",
        [](Address x, Address source, Address weight, Address bias, Address out, int64_t rows,
           int64_t width, float eps, int dtype, int out_dtype, bool gelu) {
          const NormArgs args{at<void>(x),
                              at<int32_t>(source),
                              at<float>(weight),
                              at<float>(bias),
                              at<void>(out),
                              nullptr,
                              0.0f,
                              nullptr,
                              rows,
                              width,
                              eps,
                              DType(dtype),
                              DType(out_dtype),
                              gelu};
          py::gil_scoped_release unlocked;
          kernels().layer_norm(args);
        });
  m.def("patches", [](Address x, Address out, int64_t images, int64_t channels, int64_t height,
                      int64_t width, int64_t size, int64_t stride, int64_t padding,
                      bool channels_last, int dtype, int out_dtype) {
    const PatchArgs args{at<void>(x), at<void>(out), images,       channels,
                         height,      width,         size,         stride,
                         padding,     channels_last, DType(dtype), DType(out_dtype)};
    py::gil_scoped_release unlocked;
    kernels().patches(args);
  });
  // These two return "", or what is wrong with their indices: nothing was computed then.
  m.def("gather_patches",
        [](Address pixels, int64_t elements, Address table, int64_t images, int64_t channels,
           Address places, int64_t rows, int64_t size, bool bilinear, Address out, int out_dtype) {
          const SquaresView squares{at<float>(pixels),
                                    at<int64_t>(table),
                                    at<int32_t>(places),
                                    elements,
                                    images,
                                    channels,
                                    rows,
                                    size,
                                    bilinear};
          py::gil_scoped_release unlocked;
          std::string wrong = problem(squares);
          if (wrong.empty()) kernels().gather_patches({squares, at<void>(out), DType(out_dtype)});
          return wrong;
        });
  m.def("embed_patches",
        [](Address pixels, int64_t elements, Address table, int64_t images, int64_t channels,
           Address places, int64_t rows, int64_t size, bool bilinear, Address weight,
           int weight_dtype, Address bias, Address positions, int64_t position_count,
           Address position_rows, bool gelu, Address out, int out_dtype, int64_t out_count,
           int64_t columns, Address out_rows) {
          const EmbedArgs args{{at<float>(pixels), at<int64_t>(table), at<int32_t>(places),
                                elements, images, channels, rows, size, bilinear},
                               at<void>(weight),
                               at<float>(bias),
                               at<float>(positions),
                               at<int32_t>(position_rows),
                               at<void>(out),
                               at<int32_t>(out_rows),
                               columns,
                               DType(weight_dtype),
                               DType(out_dtype),
                               gelu ? Epilogue::kGelu : Epilogue::kNone};
          py::gil_scoped_release unlocked;
          std::string wrong = problem(args.squares);
          if (wrong.empty() && args.positions)
            wrong = problem("position_rows", args.position_rows, rows, position_count);
          if (wrong.empty() && args.out_rows)
            wrong = problem("out_rows", args.out_rows, rows, out_count);
          if (wrong.empty()) kernels().embed_patches(args);
          return wrong;
        });
  m.def("gate", [](Address x, Address mean, int64_t rows, int64_t width) {
    py::gil_scoped_release unlocked;
    kernels().gate({at<float>(x), at<float>(mean), rows, width});
  });

  m.def("append", [](Address kv, Address cos_sin, Address key_norm, Address positions,
                     Address slots, Address keys, Address values, int64_t rows, int64_t heads,
                     int64_t head_dim, float eps, int dtype) {
    const AppendArgs args{at<void>(kv),
                          at<float>(cos_sin),
                          at<float>(key_norm),
                          at<int32_t>(positions),
                          at<int32_t>(slots),
                          at<void>(keys),
                          at<void>(values),
                          rows,
                          heads,
                          head_dim,
                          eps,
                          DType(dtype)};
    py::gil_scoped_release unlocked;
    kernels().append(args);
  });
  m.def("rotate", [](Address q, Address cos_sin, Address norm, Address positions, Address rows,
                     int64_t kept, int64_t heads, int64_t head_dim, float eps, int dtype) {
    const RotateArgs args{at<void>(q),
                          at<float>(cos_sin),
                          at<float>(norm),
                          at<int32_t>(positions),
                          at<int32_t>(rows),
                          kept,
                          heads,
                          head_dim,
                          eps,
                          DType(dtype)};
    py::gil_scoped_release unlocked;
    kernels().rotate(args);
  });
  m.def("attention",
        [](Address q, Address rows, Address positions, Address sequences, Address block_tables,
           Address keys, Address values, Address sinks, Address out, int64_t kept, int64_t heads,
           int64_t kv_heads, int64_t head_dim, int64_t max_blocks, int64_t window, float scale,
           int dtype) {
          const AttentionArgs args{at<void>(q),
                                   at<int32_t>(rows),
                                   at<int32_t>(positions),
                                   at<int32_t>(sequences),
                                   at<int32_t>(block_tables),
                                   at<void>(keys),
                                   at<void>(values),
                                   at<float>(sinks),
                                   at<void>(out),
                                   kept,
                                   heads,
                                   kv_heads,
                                   head_dim,
                                   max_blocks,
                                   window,
                                   scale,
                                   DType(dtype)};
          py::gil_scoped_release unlocked;
          kernels().attention(args);
        });

  m.def("plan_exit",
        [](Address x, Address class_rows, Address weight, Address bias, Address norm_weight,
           Address norm_bias, float eps, int64_t outputs, int64_t width, int flags, float g0,
           float g1, float g2, float g3, float g4, Address state, Address limits, Address total,
           Address logits, Address confidence, Address rows, Address offsets, Address inverse,
           int64_t count, int64_t classes, int64_t x_rows, int dtype) {
          const ExitArgs args{at<void>(x),
                              at<int32_t>(class_rows),
                              {at<float>(weight), at<float>(bias), at<float>(norm_weight),
                               at<float>(norm_bias), eps, outputs, width},
                              {flags, {g0, g1, g2, g3, g4}},
                              at<float>(state),
                              at<float>(limits),
                              at<float>(total),
                              at<float>(logits),
                              at<float>(confidence),
                              at<int32_t>(rows),
                              at<int32_t>(offsets),
                              at<int32_t>(inverse),
                              count,
                              classes,
                              x_rows,
                              DType(dtype)};
          py::gil_scoped_release unlocked;
          return kernels().plan_exit(args);
        });
  // Returns "", or the name of the boundaries that do not cut their rows: nothing was computed
  // then.
  m.def("attention_varlen", [](Address q, Address k, Address v, Address cu_q, Address cu_k,
                               Address key_bias, Address out, int64_t queries, int64_t keys,
                               int64_t count, int64_t heads, int64_t head_dim, int64_t q_stride,
                               int64_t k_stride, int64_t v_stride, float scale, int dtype) {
    if (!cuts(at<int32_t>(cu_q), count, queries)) return "cu_q";
    if (!cuts(at<int32_t>(cu_k), count, keys)) return "cu_k";
    const VarlenArgs args{at<void>(q),
                          at<void>(k),
                          at<void>(v),
                          at<int32_t>(cu_q),
                          at<int32_t>(cu_k),
                          at<float>(key_bias),
                          at<void>(out),
                          count,
                          heads,
                          head_dim,
                          q_stride,
                          k_stride,
                          v_stride,
                          scale,
                          DType(dtype)};
    py::gil_scoped_release unlocked;
    kernels().attention_varlen(args);
    return "";
  });
}
