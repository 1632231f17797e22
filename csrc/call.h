// What the two Python modules have in common: `Tensor`, its `DTYPES`, and `Call`, the arguments of a call by name.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tensor.h"

namespace atman {

// Adds them to a module. Each module has classes of its own, so that neither needs the other to be there.
inline void define_call(pybind11::module_& module, Memory memory) {
    namespace py = pybind11;
    using Optional = std::optional<Tensor>;

    py::class_<Tensor>(module, "Tensor",
                       "A tensor's address, readable bytes, dtype code, shape and strides in elements.",
                       py::module_local())
        .def(py::init(&Tensor::checked), py::arg("address"), py::arg("bytes"), py::arg("dtype"), py::arg("shape"),
             py::arg("strides"));
    module.attr("DTYPES") = py::dict(py::arg("float32") = 0, py::arg("bfloat16") = 1, py::arg("float16") = 2,
                                     py::arg("int32") = 3, py::arg("bool") = 4);

    const auto make =
        [memory](const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output, const Optional& lse,
                 const Optional& own_key, const Optional& own_value, const Optional& suffix_starts,
                 const Optional& prefix_lengths, const Optional& base_starts, const Optional& row_variant,
                 const Optional& factor, const Optional& key_mask, const Optional& sinks, const Optional& position_bias,
                 const std::string& mode, bool is_causal, double scale, std::int64_t sliding_window, double softcap) {
            AttentionArguments arguments;
            arguments.query = query;
            arguments.key = key;
            arguments.value = value;
            arguments.output = output;
            arguments.lse = lse;
            arguments.own_key = own_key;
            arguments.own_value = own_value;
            arguments.suffix_starts = suffix_starts;
            arguments.prefix_lengths = prefix_lengths;
            arguments.base_starts = base_starts;
            arguments.row_variant = row_variant;
            arguments.factor = factor;
            arguments.key_mask = key_mask;
            arguments.sinks = sinks;
            arguments.position_bias = position_bias;
            arguments.mode = mode;
            arguments.is_causal = is_causal;
            arguments.scale = scale;
            arguments.sliding_window = sliding_window;
            arguments.softcap = softcap;
            return make_params(arguments, memory);
        };
    const py::object none = py::none();
    py::class_<AttentionParams>(module, "Call",
                                "One call, checked; it keeps no tensor alive. See csrc/params.h for the shapes. The "
                                "`output` of a backward is the gradient by it. Raises ValueError.",
                                py::module_local())
        .def(py::init(make), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("output"),
             py::arg("lse") = none, py::arg("own_key") = none, py::arg("own_value") = none,
             py::arg("suffix_starts") = none, py::arg("prefix_lengths") = none, py::arg("base_starts") = none,
             py::arg("row_variant") = none, py::arg("factor") = none, py::arg("key_mask") = none,
             py::arg("sinks") = none, py::arg("position_bias") = none, py::kw_only(), py::arg("mode"),
             py::arg("is_causal"), py::arg("scale"), py::arg("sliding_window") = 0, py::arg("softcap") = 0.0);
}

}  // namespace atman
