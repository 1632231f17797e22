// The Python module `atman_kernels._cuda`: apart from `_C`, so that neither needs the other to be there. The pack's
// integers are in device memory and are not checked.

#include "../call.h"
#include "attention.h"

namespace py = pybind11;

namespace {

using atman::AttentionParams;
using atman::Tensor;
using atman::cuda::kernel_named;

std::string refusal(const AttentionParams& call, const std::string& kernel) {
    return atman::cuda::refusal(call, kernel_named(kernel));
}

std::int64_t workspace_bytes(const AttentionParams& call, const std::string& kernel, int multiprocessors) {
    return atman::cuda::workspace_bytes(call, kernel_named(kernel), multiprocessors);
}

void attend(const AttentionParams& call, const std::string& kernel, const Tensor& workspace, int device,
            int multiprocessors, std::uintptr_t stream) {
    const py::gil_scoped_release release;
    atman::cuda::attend(call, kernel_named(kernel), workspace, device, multiprocessors, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of atman_kernels; use atman_kernels.ops, which checks and describes tensors.";
    atman::define_call(module, atman::Memory::device);

    module.def("refusal", &refusal, "Why a kernel cannot do this call; empty if it can.", py::arg("call"),
               py::arg("kernel"));
    module.def("workspace_bytes", &workspace_bytes, "Of device memory that `attend` needs beside the tensors.",
               py::arg("call"), py::arg("kernel"), py::arg("multiprocessors"));
    module.def("attend", &attend, "Puts the call on a stream of a device; allocates nothing and waits for nothing.",
               py::arg("call"), py::arg("kernel"), py::arg("workspace"), py::arg("device"), py::arg("multiprocessors"),
               py::arg("stream"));
    module.def("device_problem", &atman::cuda::device_problem,
               "Why this binary cannot run on a device; empty if it can.", py::arg("device"));
    module.attr("ARCHITECTURES") = atman::cuda::architectures();
}
