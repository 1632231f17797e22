// The Python module `atman_kernels._C`. It knows numbers and addresses, not torch: one binary serves every version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention.h"
#include "cpu/gradients.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

using atman::AttentionArguments;
using atman::Tensor;
using Optional = std::optional<Tensor>;

// Where a thread cannot be started, OpenMP's runtime ends the process.
void check_threads(int threads) {
    if (threads < 1 || threads > 4096)
        throw std::invalid_argument("threads must be from 1 to 4096, got " + std::to_string(threads));
}

void attend_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output, const Optional& lse,
                const Optional& own_key, const Optional& own_value, const Optional& suffix_starts,
                const Optional& prefix_lengths, const Optional& base_starts, const Optional& factor,
                const Optional& key_mask, const Optional& sinks, const Optional& position_bias, const std::string& mode,
                bool is_causal, double scale, std::int64_t sliding_window, double softcap,
                const std::string& instruction_set, int threads) {
    const AttentionArguments arguments{query,       key,            value,       output,        lse,
                                       own_key,     own_value,      suffix_starts, prefix_lengths, base_starts,
                                       factor,      key_mask,       sinks,       position_bias, mode,
                                       is_causal,   scale,          sliding_window, softcap};
    check_threads(threads);
    const atman::AttentionParams params = atman::make_params(arguments);
    const py::gil_scoped_release release;
    atman::cpu::attend(params, instruction_set, threads);
}

void differentiate_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
                       const Tensor& lse, const Tensor& delta, const Optional& grad_query, const Optional& grad_key,
                       const Optional& grad_value, const Optional& grad_own_key, const Optional& grad_own_value,
                       const Optional& grad_factor, const Optional& own_key, const Optional& own_value,
                       const Optional& suffix_starts, const Optional& prefix_lengths, const Optional& base_starts,
                       const Optional& factor, const Optional& key_mask, const Optional& sinks,
                       const Optional& position_bias, const std::string& mode, bool is_causal, double scale,
                       std::int64_t sliding_window, double softcap, const std::string& instruction_set, int threads) {
    const AttentionArguments forward{query,       key,            value,       grad_output,   lse,
                                     own_key,     own_value,      suffix_starts, prefix_lengths, base_starts,
                                     factor,      key_mask,       sinks,       position_bias, mode,
                                     is_causal,   scale,          sliding_window, softcap};
    check_threads(threads);
    const atman::GradientParams params = atman::make_gradient_params(
        {forward, delta, grad_query, grad_key, grad_value, grad_own_key, grad_own_value, grad_factor});
    const py::gil_scoped_release release;
    atman::cpu::differentiate(params, instruction_set, threads);
}

std::vector<std::string> cpu_instruction_sets(std::int64_t type) {
    if (type < 0 || type > static_cast<std::int64_t>(atman::DType::float16))
        throw std::invalid_argument("dtype code must be that of float32, bfloat16 or float16, got " + std::to_string(type));
    return atman::cpu::instruction_sets(static_cast<atman::DType>(type));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of atman_kernels; use atman_kernels.ops, which checks and describes tensors.";

    py::class_<Tensor>(module, "Tensor", "A tensor's address, readable bytes, dtype code, shape and strides in elements.")
        .def(py::init(&Tensor::checked), py::arg("address"), py::arg("bytes"), py::arg("dtype"), py::arg("shape"),
             py::arg("strides"));
    module.attr("DTYPES") = py::dict(py::arg("float32") = 0, py::arg("bfloat16") = 1, py::arg("float16") = 2,
                                     py::arg("int32") = 3, py::arg("bool") = 4);

    const py::object none = py::none();
    module.def("attend_cpu", &attend_cpu,
               "Suppressed attention, dense or packed; see csrc/params.h for the shapes. Raises ValueError.",
               py::arg("query"), py::arg("key"), py::arg("value"), py::arg("output"), py::arg("lse") = none,
               py::arg("own_key") = none, py::arg("own_value") = none, py::arg("suffix_starts") = none,
               py::arg("prefix_lengths") = none, py::arg("base_starts") = none, py::arg("factor") = none,
               py::arg("key_mask") = none, py::arg("sinks") = none, py::arg("position_bias") = none, py::kw_only(),
               py::arg("mode"), py::arg("is_causal"), py::arg("scale"), py::arg("sliding_window") = 0,
               py::arg("softcap") = 0.0, py::arg("instruction_set"), py::arg("threads"));
    module.def("differentiate_cpu", &differentiate_cpu,
               "Gradients of `attend_cpu`; see csrc/params.h for the shapes. Raises ValueError.", py::arg("query"),
               py::arg("key"), py::arg("value"), py::arg("grad_output"), py::arg("lse"), py::arg("delta"),
               py::arg("grad_query") = none, py::arg("grad_key") = none, py::arg("grad_value") = none,
               py::arg("grad_own_key") = none, py::arg("grad_own_value") = none, py::arg("grad_factor") = none,
               py::arg("own_key") = none, py::arg("own_value") = none, py::arg("suffix_starts") = none,
               py::arg("prefix_lengths") = none, py::arg("base_starts") = none, py::arg("factor") = none,
               py::arg("key_mask") = none, py::arg("sinks") = none, py::arg("position_bias") = none, py::kw_only(),
               py::arg("mode"), py::arg("is_causal"), py::arg("scale"), py::arg("sliding_window") = 0,
               py::arg("softcap") = 0.0, py::arg("instruction_set"), py::arg("threads"));
    module.def("cpu_instruction_sets", &cpu_instruction_sets,
               "Names of the instruction sets usable here for a dtype code, the fastest first.", py::arg("dtype"));
}
