// Python module _cuda: raw integers to a launch. Arguments are checked by pyruntime/ops/cuda.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cuda/driver.h"

namespace py = pybind11;

namespace {

void* pointer(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

void launch(pyrt::Driver& driver, const char* name, std::uintptr_t function, unsigned grid_x,
            unsigned grid_y, unsigned block_x, unsigned block_y, unsigned shared_bytes, int device,
            std::uintptr_t stream, const py::bytes& args) {
  driver.launch({name, pointer(function), grid_x, grid_y, block_x, block_y, shared_bytes, device,
                 pointer(stream), PyBytes_AS_STRING(args.ptr()),
                 static_cast<std::size_t>(PyBytes_GET_SIZE(args.ptr()))});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Launches CUDA kernels through the driver, without linking CUDA.";
  py::class_<pyrt::Driver>(m, "Driver", "The CUDA driver library of this machine.")
      .def(py::init<const std::string&>(), py::arg("library") = "libcuda.so.1")
      .def("launch", &launch, py::arg("name"), py::arg("function"), py::arg("grid_x"),
           py::arg("grid_y"), py::arg("block_x"), py::arg("block_y"), py::arg("shared_bytes"),
           py::arg("device"), py::arg("stream"), py::arg("args"),
           "Enqueues kernel `function` (a CUfunction) on `stream`; args are its parameters as a C "
           "struct.");
}
