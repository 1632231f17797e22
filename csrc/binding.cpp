// The Python module `atman_kernels._C`. It knows numbers and addresses, not torch: one binary serves every version.

#include "call.h"
#include "cpu/attention.h"
#include "cpu/gradients.h"

namespace py = pybind11;

namespace {

using atman::AttentionParams;
using atman::Tensor;
using Optional = std::optional<Tensor>;

// Where a thread cannot be started, OpenMP's runtime ends the process.
void check_threads(int threads) {
    if (threads < 1 || threads > 4096)
        throw std::invalid_argument("threads must be from 1 to 4096, got " + std::to_string(threads));
}

void attend_cpu(const AttentionParams& call, const std::string& instruction_set, int threads) {
    check_threads(threads);
    const py::gil_scoped_release release;
    atman::cpu::attend(call, instruction_set, threads);
}

void differentiate_cpu(const AttentionParams& call, const std::string& instruction_set, int threads,
                       const Tensor& delta, const Optional& grad_query, const Optional& grad_key,
                       const Optional& grad_value, const Optional& grad_own_key, const Optional& grad_own_value,
                       const Optional& grad_factor) {
    check_threads(threads);
    const atman::GradientParams params = atman::make_gradient_params(
        call, {delta, grad_query, grad_key, grad_value, grad_own_key, grad_own_value, grad_factor});
    const py::gil_scoped_release release;
    atman::cpu::differentiate(params, instruction_set, threads);
}

std::vector<std::string> cpu_instruction_sets(std::int64_t type) {
    if (type < 0 || type > static_cast<std::int64_t>(atman::DType::float16))
        throw std::invalid_argument("dtype code must be that of float32, bfloat16 or float16, got " +
                                    std::to_string(type));
    return atman::cpu::instruction_sets(static_cast<atman::DType>(type));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of atman_kernels; use atman_kernels.ops, which checks and describes tensors.";
    atman::define_call(module, atman::Memory::host);

    const py::object none = py::none();
    module.def("attend_cpu", &attend_cpu, "Suppressed attention, dense or packed. Raises ValueError.", py::arg("call"),
               py::arg("instruction_set"), py::arg("threads"));
    module.def("differentiate_cpu", &differentiate_cpu,
               "Gradients of a call; see csrc/params.h for the shapes. Raises ValueError.", py::arg("call"),
               py::arg("instruction_set"), py::arg("threads"), py::arg("delta"), py::arg("grad_query") = none,
               py::arg("grad_key") = none, py::arg("grad_value") = none, py::arg("grad_own_key") = none,
               py::arg("grad_own_value") = none, py::arg("grad_factor") = none);
    module.def("cpu_instruction_sets", &cpu_instruction_sets,
               "Names of the instruction sets usable here for a dtype code, the fastest first.", py::arg("dtype"));
}
