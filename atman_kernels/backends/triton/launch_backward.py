"""From validated tensors to the launches of the backward kernels. Nothing here waits for the device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.call import Gradients, Wanted
from atman_kernels.backends.triton import configs, launch
from atman_kernels.backends.triton.launch import Extras, Layout
from atman_kernels.backends.triton.plan_backward import Plan, Tensors, make_plan
from atman_kernels.formula import Saved, ScoreOptions

NAMES = ("query", "key", "value", "own_key", "own_value", "factor", "sinks", "bias")  # of what may be wanted


def gradients(
    query: Tensor,  # (B, Hq, rows, D)
    key: Tensor,  # (1|B, Hkv, keys, D)
    value: Tensor,  # (1|B, Hkv, keys, Dv)
    layout: Layout | None,  # None: a dense batch; else B = 1
    extras: Extras,
    options: ScoreOptions,
    saved: Saved,  # with a batch axis, of a pack too
    wanted: Wanted,  # some of `NAMES`
) -> Gradients:
    """What is wanted, each of the shape and the dtype of the tensor that it belongs to."""
    tensors = launch.named(query, key, value, layout, extras)
    results = {
        name: tensor.new_empty(tensor.shape)
        for name in NAMES
        if name in wanted and (tensor := tensors[name]) is not None
    }
    if not results:
        return results
    if query.numel() == 0:
        for result in results.values():
            result.zero_()
        return results
    tensors |= {"output": saved.output, "lse": saved.lse, "grad_output": saved.grad_output, "grad_lse": saved.grad_lse}
    if launch.INTERPRETED and query.dtype == torch.bfloat16:  # it gets products of bfloat16 wrong
        wide = ("query", "key", "value", "own_key", "own_value", "output", "grad_output")
        tensors |= {name: x.float() for name in wide if (x := tensors[name]) is not None}
    tensors |= {f"grad_{name}": results.get(name) for name in NAMES}
    plan = _plan_for(tensors, options)
    with launch.on_device(query.device):
        delta = plan.run(tensors)["delta"]
        if "sinks" in wanted:
            assert extras.sinks is not None
            assert delta is not None
            results["sinks"] = saved.sink_gradient(extras.sinks, delta)
    return results


_plans: dict[Any, Plan] = {}


def _plan_for(tensors: Tensors, options: ScoreOptions) -> Plan:
    """The plan for all calls of this kind."""
    query = tensors["query"]
    assert query is not None
    precision = launch.float32_precision() if query.dtype == torch.float32 else None
    layouts = map(launch.layout_in_memory, tensors.values())
    kind = (query.device, replace(options, return_lse=True), configs.forced_now(), precision, *layouts)
    plan = _plans.get(kind)
    if plan is None:
        if len(_plans) >= launch.MOST_PLANS:
            _plans.clear()
        plan = _plans[kind] = make_plan(tensors, options)
    return plan
