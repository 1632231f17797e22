// The Python module `atman_kernels._cuda`: apart from `_C`, so that neither needs the other to be there.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"

namespace py = pybind11;

namespace {

using atman::AttentionArguments;
using atman::AttentionParams;
using atman::Tensor;
using Optional = std::optional<Tensor>;

AttentionParams describe(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                         const Optional& lse, const Optional& own_key, const Optional& own_value,
                         const Optional& suffix_starts, const Optional& prefix_lengths, const Optional& base_starts,
                         const Optional& factor, const Optional& key_mask, const Optional& sinks,
                         const Optional& position_bias, const Optional& row_variant, const std::string& mode,
                         bool is_causal, double scale, std::int64_t sliding_window, double softcap) {
    const AttentionArguments arguments{query,    key,           value,          output,      lse,
                                       own_key,  own_value,     suffix_starts,  prefix_lengths, base_starts,
                                       factor,   key_mask,      sinks,          position_bias,  mode,
                                       is_causal, scale,        sliding_window, softcap,        row_variant};
    return atman::make_params(arguments, atman::Memory::device);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of atman_kernels; use atman_kernels.ops, which checks and describes tensors.";

    py::class_<Tensor>(module, "Tensor", "A tensor's address, readable bytes, dtype code, shape and strides in elements.",
                       py::module_local())
        .def(py::init(&Tensor::checked), py::arg("address"), py::arg("bytes"), py::arg("dtype"), py::arg("shape"),
             py::arg("strides"));
    module.attr("DTYPES") = py::dict(py::arg("float32") = 0, py::arg("bfloat16") = 1, py::arg("float16") = 2,
                                     py::arg("int32") = 3, py::arg("bool") = 4);

    const py::object none = py::none();
    py::class_<AttentionParams>(module, "Call",
                                "One call, described; it keeps no tensor alive. See csrc/params.h for the shapes. The "
                                "pack's integers are in device memory and are not checked.",
                                py::module_local())
        .def(py::init(&describe), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("output"),
             py::arg("lse") = none, py::arg("own_key") = none, py::arg("own_value") = none,
             py::arg("suffix_starts") = none, py::arg("prefix_lengths") = none, py::arg("base_starts") = none,
             py::arg("factor") = none, py::arg("key_mask") = none, py::arg("sinks") = none,
             py::arg("position_bias") = none, py::arg("row_variant") = none, py::kw_only(), py::arg("mode"),
             py::arg("is_causal"), py::arg("scale"), py::arg("sliding_window") = 0, py::arg("softcap") = 0.0)
        .def("refusal",
             [](const AttentionParams& call, const std::string& kernel) {
                 return atman::cuda::refusal(call, atman::cuda::kernel_named(kernel));
             },
             "Why a kernel cannot do this call; empty if it can.", py::arg("kernel"))
        .def("workspace_bytes",
             [](const AttentionParams& call, const std::string& kernel, int multiprocessors) {
                 return atman::cuda::workspace_bytes(call, atman::cuda::kernel_named(kernel), multiprocessors);
             },
             py::arg("kernel"), py::arg("multiprocessors"))
        .def("attend",
             [](const AttentionParams& call, const std::string& kernel, const Tensor& workspace, int device,
                int multiprocessors, std::uintptr_t stream) {
                 const py::gil_scoped_release release;
                 atman::cuda::attend(call, atman::cuda::kernel_named(kernel), workspace, device, multiprocessors, stream);
             },
             "Puts the call on a stream of a device; allocates nothing and waits for nothing.", py::arg("kernel"),
             py::arg("workspace"), py::arg("device"), py::arg("multiprocessors"), py::arg("stream"));
    module.def("device_problem", &atman::cuda::device_problem,
               "Why this binary cannot run on a device; empty if it can.", py::arg("device"));
    module.attr("ARCHITECTURES") = atman::cuda::architectures();
}
