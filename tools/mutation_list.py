"""Faults of the kind that changes make: each a text of the package, what stands there instead, and who should see it.

`mutations.py` tries them. Texts are looked for in all files of the package, and must occur once.
"""
# ruff: noqa: E501 (a line of the package is quoted in one)

from typing import NamedTuple


class Tests(NamedTuple):
    """A module of tests, or those of its tests that pytest's -k finds; `interpreted`: with Triton's kernels on the CPU."""

    module: str
    keyword: str = ""
    interpreted: bool = False


class Fault(NamedTuple):
    """One deliberate fault.

    Attributes:
        name: where it is, and what.
        text, instead: what is replaced, and by what.
        why: which mistake it stands for.
        tests: those that should see it, the likeliest first.
    """

    name: str
    text: str
    instead: str
    why: str
    tests: tuple[Tests, ...]


def all_of(*modules: str) -> tuple[Tests, ...]:
    return tuple(Tests(module) for module in modules)


OPS = all_of("test_reference", "test_backends", "test_pack")
GRADIENTS = all_of("test_gradients")
COMPILED = (Tests("test_backends", "cpu"), Tests("test_pack", "cpu"), Tests("test_compiled_cpu"))
COMPILED_GRADIENTS = (Tests("test_gradients", "cpu"),)
BLOCKED = (Tests("test_backends", "torch or blocked"), Tests("test_pack", "torch or blocked"))
SHARED = (
    "triton and (keys-log_additive or heads-shifted) and not odd_ and not every_prefix and not long_suffixes and test_"
)
TRITON = (
    Tests("test_triton", interpreted=True),
    Tests("test_backends", f"{SHARED}agrees_with_the_formula", interpreted=True),
    Tests("test_pack", f"{SHARED}equals_each_variant_alone", interpreted=True),
)
FAMILIES = all_of("test_packed_models", "test_families", "test_suppress")

FAULTS = (
    # --- the formula ---
    Fault("formula: base of the logarithm", "torch.where(factor == 0, 1.0, factor).log())",
          "torch.where(factor == 0, 1.0, factor).log2())", "bits for nats", OPS),
    Fault("formula: shifted by the whole score", "return scores + (factor - 1) * (scores - row_minimum)",
          "return scores + (factor - 1) * scores", "the row's minimum is left out", OPS),
    Fault("formula: minimum over hidden keys", "row_minimum = scores.masked_fill(~visible, math.inf).amin(",
          "row_minimum = scores.amin(", "the mask is forgotten", OPS),
    Fault("formula: window one too wide", "return (key > query - sliding_window)", "return (key >= query - sliding_window)",
          "off by one", OPS),
    Fault("formula: window to the right", "key < query + sliding_window", "key <= query + sliding_window", "off by one",
          OPS),
    Fault("formula: sign of a sink's gradient", "gradient = -(weight * delta).sum(-1)",
          "gradient = (weight * delta).sum(-1)", "a sign", GRADIENTS),
    Fault("formula: ties share nothing", "/ least.sum(-1, keepdim=True)", "", "several keys at the minimum each get all",
          GRADIENTS),
    # --- ops ---
    Fault("ops: dtypes are not remembered", "(type(x), x.shape, x.dtype, x.device, x.layout)",
          "(type(x), x.shape, x.device, x.layout)", "what passed in one dtype passes unchecked in another",
          all_of("test_bad_input_ops", "test_op_registration", "test_backends")),
    Fault("ops: longer factors pass", "(factor.shape[-1] != length if exact else factor.shape[-1] < length)",
          "factor.shape[-1] < length", "a dense factor of another length", all_of("test_bad_input_ops")),
    Fault("ops: scale by the dimension", "scale = query.shape[-1] ** -0.5", "scale = query.shape[-1] ** -1.0",
          "a power", OPS),
    Fault("pack: end of the base", "base_end=int((base + prefix).max())", "base_end=int(prefix.max())",
          "later bases are forgotten", (Tests("test_pack", "layout"), Tests("test_bad_input_ops"))),
    # --- planning ---
    Fault("factors: neighbours are amplified", "rows.clamp_(max=1).mul_(factor - 1).add_(1)",
          "rows.clamp_(max=1).mul_(1 - factor).add_(1)", "a sign", all_of("test_factors")),
    Fault("factors: rounding decides", "matches = rows >= threshold - 8 *", "matches = rows >= threshold - 0 *",
          "twins at a threshold of 1", all_of("test_factors")),
    Fault("factors: subsets multiply", "least = chosen.amin(dim=0)", "least = chosen.prod(dim=0)",
          "a token of two units is suppressed twice", all_of("test_factors", "test_subsets")),
    Fault("factors: amplified tokens are untouched", "touched = factors != 1", "touched = factors < 1",
          "a prefix that is too long",
          all_of("test_factors")),
    Fault("packing: factors of rows that are left out", "row[variant.prefix : variant.prefix + len(own)] = values[own]",
          "row[variant.prefix : variant.prefix + len(own)] = values[variant.prefix : variant.prefix + len(own)]",
          "positions of the sequence for those of the pack",
          all_of("test_packing", "test_sharing")),
    Fault("packing: the budget does not shrink", "left -= taken[-1].suffix", "left -= 0", "packs beyond the budget",
          all_of("test_packing")),
    Fault("packing: one base for all", "[base_starts[v.base_number] for v in variants]", "[base_starts[0] for v in variants]",
          "a wrong start of K/V",
          (Tests("test_packing"), Tests("test_families", "several_lengths"))),
    Fault("packing: all free memory", "free_bytes // 2 // max(1, bytes_per_token)", "free_bytes // max(1, bytes_per_token)",
          "a factor of two",
          all_of("test_packing")),
    Fault("sharing: one position too far", "inside = limit[members] >= end", "inside = limit[members] >= end - 1",
          "off by one: a stretch that predicts the answer", all_of("test_sharing", "test_families")),
    Fault("sharing: whatever the factors", "factor.view(torch.int32).long()], dim=1)", "0 * factor.view(torch.int32).long()], dim=1)",
          "stretches of other factors are taken for the same", all_of("test_sharing", "test_subsets")),
    Fault("units: white space leads", "piece = bisect_right(starts, end - len(visible))", "piece = bisect_right(starts, start)",
          "a token belongs to the piece before it", all_of("test_units")),
    Fault("units: target one late", "(first_position + index,), source=\"target\"", "(first_position + index + 1,), source=\"target\"",
          "off by one", all_of("test_units")),
    Fault("units: rims of spans", "start, end = _trimmed(text, start, end)\n        tokens = sorted(", "tokens = sorted(",
          "a span takes its neighbour's token", all_of("test_units")),
    Fault("levels: parents by their place among all", "places[unit.parent]", "unit.parent",
          "indices of a list that was filtered since", all_of("test_nested_units")),
    Fault("levels: only what speaks for the answer", "sizes = [abs(total) for total in totals]", "sizes = list(totals)",
          "a sign", all_of("test_levels")),
    Fault("levels: one scale for all", "return self.total[unit] / self.scales[self.explanation.depths[unit]]",
          "return self.total[unit] / self.scales[0]", "words are pale beside their document", all_of("test_nested_views")),
    Fault("image units: separators between rows", "first_position + r * below + c", "first_position + r * grid_cols + c",
          "the row's step is forgotten", all_of("test_patches")),
    Fault("image units: width of a tile", "(left + columns.stop * step_x", "(left + (columns.start + 1) * step_x",
          "boxes of one patch", all_of("test_patches")),
    # --- hf ---
    Fault("hf: keys counted from the queries", "first = self._forward.offsets.get((call.query.shape[2], keys), (0, 0))[1]",
          "first = self._forward.offsets.get((call.query.shape[2], keys), (0, 0))[0]",
          "a sliding cache's keys begin elsewhere",
          (Tests("test_suppress", "cache"), Tests("test_families", "cache"), *FAMILIES)),
    Fault("hf: beams in another order", ".to(device).repeat_interleave(batch // rows, dim=0)",
          ".to(device).repeat(batch // rows, *[1] * (self.tensor.ndim - 1))", "rows of another prompt",
          (Tests("test_suppress", "beams"),)),
    Fault("hf: heads of values", "key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))",
          "key, value = (x.repeat(1, heads // x.shape[1], 1, 1) for x in (key, value))", "a wrong index of grouped heads",
          (Tests("test_suppress", "interventions"), Tests("test_suppress_gradients"))),
    Fault("hf: the dtype's minimum stays", "return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)",
          "return mask.float()", "hidden keys count for a row's minimum",
          (Tests("test_masks"), Tests("test_families", "padding or mask"), Tests("test_suppress"))),
    Fault("hf: lost sinks", "sinks=call.sinks,\n            position_bias=self._position_bias(module, call",
          "sinks=None,\n            position_bias=self._position_bias(module, call", "an argument is not handed on",
          (Tests("test_packed_models", "full_runs"), Tests("test_coverage", "gpt_oss"))),
    Fault("hf: dropped position bias", "return call.key_bias.of_length(longest)", "return None",
          "an argument is not handed on",
          (Tests("test_packed_models", "full_runs and bloom"), Tests("test_families", "full_runs"))),
    Fault("hf: a pack's mode", "factor if module in self.layers else None,\n            mode=self.mode",
          "factor if module in self.layers else None,\n            mode=\"log_additive\"", "a default instead",
          (Tests("test_packed_models", "full_runs"),)),
    Fault("hf: one device's copy", "return self.setdefault(device, self._make(device))",
          "return self.setdefault(next(iter(self), device), self._make(device))", "layers on another device",
          (Tests("test_pretended_cuda", "run_to_their_end"),)),
    Fault("hf: inputs where weights lie", "return first if first.type != \"meta\" else next(_execution_devices(model), first)",
          "return first", "weights that are brought when they run", (Tests("test_placement", "elsewhere"),)),
    Fault("hf: a scale of all rows", "granularity == \"PerTensor\"", "granularity == \"PerRow\"", "the wrong way round",
          (Tests("test_batch_dependence", "activations"),)),
    Fault("hf: stretches from the first base", "torch.arange(b, b + p, device=\"cpu\") for _, p, b in spans",
          "torch.arange(0, p, device=\"cpu\") for _, p, b in spans", "a wrong start of K/V",
          (Tests("test_sharing"),)),
    Fault("hf: targets of the first chunk", "tokens = targets[:, first : first + len(chunk)]",
          "tokens = targets[:, : len(chunk)]", "the wrong answer's tokens",
          (Tests("test_hooks"), Tests("test_packed_models", "full_runs"), Tests("test_families", "full_runs"))),
    Fault("hf: a head's bias", "bias = None if biases is None else biases[part].float()", "bias = None",
          "an argument is not handed on",
          (Tests("test_families", "bias"), Tests("test_autocast"), Tests("test_loading"))),
    Fault("hf: positions of an encoder's class token", "nn.functional.pad(own, (before, 0), value=1.0)",
          "nn.functional.pad(own, (0, before), value=1.0)", "patches one to the left", all_of("test_vision_suppression")),
    Fault("hf: suffixes that cut a block", "furthest < positions[1:]", "furthest <= positions[1:]",
          "an unsnapped suffix",
          (Tests("test_image_text", "gemma3"), Tests("test_image_text", "paligemma"))),
    Fault("hf: where joined bases begin", "lengths = [next(iter(base.keys.values())).shape[1] for base in bases]",
          "lengths = [next(iter(base.keys.values())).shape[1] - 1 for base in bases]", "a wrong start of K/V",
          (Tests("test_families", "several_lengths"), Tests("test_sharing"))),
    Fault("run: the prompt's last token", ".prompt_length - 1 :] = False", ".prompt_length :] = False", "off by one: a row that predicts is not run",
          (Tests("test_sharing", "removed"), Tests("test_packed_models"), Tests("test_image_text", "removed"))),
    Fault("run: predicted tokens", ".prompt_length + 1) :]", ".prompt_length) :]", "off by one",
          (Tests("test_explainer", "later_ones"),)),
    # --- the CPU backend in Python ---
    Fault("blocked: window one too short", "return max(0, position - options.sliding_window + 1)",
          "return max(0, position - options.sliding_window + 2)", "off by one", BLOCKED),
    Fault("blocked: neighbours in a tile", "visible[:, in_prefix:] &= own_variant == variant[:, None]",
          "visible[:, in_prefix:] &= own_variant <= variant[:, None]", "earlier variants are seen", BLOCKED),
    Fault("blocked: first position of a group", "                min(prefixes[first:v]),", "                max(prefixes[first:v]),",
          "windows of shorter prefixes", BLOCKED),
    Fault("blocked: factors of a pack's tile", "[variant, ..., positions] += per_key", "[variant, ..., positions] = per_key",
          "the last tile wins",
          (Tests("test_gradients", "torch or blocked"),)),
    Fault("blocked: unscaled keys", "torch.bmm(folded(d_scores).mT, folded(query)).mul_(options.scale)",
          "torch.bmm(folded(d_scores).mT, folded(query))", "the scale is forgotten",
          (Tests("test_gradients", "torch or blocked"),)),
    # --- the CPU kernels ---
    Fault("C++: window one too short", "const std::int64_t lowest = p.sliding_window > 0 ? larger(0, position - p.sliding_window + 1) : 0;",
          "const std::int64_t lowest = p.sliding_window > 0 ? larger(0, position - p.sliding_window + 2) : 0;",
          "off by one", COMPILED),
    Fault("C++: window to the right", "row.own.last = smaller(end, index + p.sliding_window);",
          "row.own.last = smaller(end, index + p.sliding_window + 1);", "off by one", COMPILED),
    Fault("C++: a mask's border", "store(s.scores + c, lane_numbers() + c >= s.visible.last ?",
          "store(s.scores + c, lane_numbers() + c > s.visible.last ?", "off by one", COMPILED),
    Fault("C++: head of the factors", "const std::int64_t factor_head = table.heads > 1 ? head : 0,",
          "const std::int64_t factor_head = table.heads > 1 ? line.head % 2 : 0,", "a wrong index", COMPILED),
    Fault("C++: what a sink joins", "const float total = sum * shrink + std::exp(sink - top);",
          "const float total = sum + std::exp(sink - top);", "sums of another maximum", COMPILED),
    Fault("C++: neighbours of a flag", "std::max(done, at - kMostLanes)", "std::max(done, at)",
          "a vector reads what nobody wrote", COMPILED),
    Fault("C++: unit of the logarithm", "suppress_log_additive(score, factor * s.units)",
          "suppress_log_additive(score, factor)", "a factor's power", COMPILED),
    Fault("C++: odd head dimensions", "if (units * kElements < elements) to[units * kStep] =",
          "if (false) to[units * kStep] =", "the last element of pairs", COMPILED),
    Fault("C++: the softcap's slope", "s.slope = 1.0f - bent * bent;", "s.slope = 1.0f - bent;", "a power",
          COMPILED_GRADIENTS),
    Fault("C++: ties share nothing", "l.through / l.ties", "l.through", "several keys at the minimum each get all",
          COMPILED_GRADIENTS),
    # --- methods ---
    Fault("search: hints that nobody hears", "max(effect, self._hints[unit]) for unit", "effect for unit",
          "influence that takes many steps is never seen", all_of("test_search")),
    Fault("search: the end like all else", "sorted([*self.candidates, *self._tail])", "sorted(self.candidates)",
          "units near the end are never run", all_of("test_search")),
    Fault("linear: keys counted from the first", "self.key[first:last] - keys.start", "self.key[first:last]",
          "other keys of a window", all_of("test_linear")),
    Fault("linear: rows without a weight left", "float(left.amin()) > NOTHING_LEFT", "left.numel()",
          "what a row sees alone is divided by nothing", all_of("test_linear")),
    Fault("AT2: another layer's heads", "of_heads[index].to(attention)", "of_heads[0].to(attention)", "a wrong index",
          (Tests("test_at2", "own_attention"),)),
    Fault("AT2: sets upside down", "[question], [~kept]", "[question], [kept]", "what stays for what goes",
          (Tests("test_at2", "oracle"),)),
    # --- the Triton kernels ---
    Fault("Triton: unit of a bias", "scores += tl.where(b_bias > float(\"-inf\"), b_bias, 0.0) * bias_unit",
          "scores += tl.where(b_bias > float(\"-inf\"), b_bias, 0.0)", "nats for bits", TRITON),
    Fault("Triton: head of keys", "tl.cast(first_head // (HEADS // KV_HEADS), tl.int64)",
          "tl.cast(first_head % KV_HEADS, tl.int64)", "a wrong index of grouped heads", TRITON),
    Fault("Triton: a block's last flag", "tl.minimum((position + BLOCK_N - 1) >> touched_shift, FLAGS - 1)",
          "tl.minimum(position >> touched_shift, FLAGS - 1)", "blocks across a border",
          (Tests("test_triton", "between_two_flags", interpreted=True),)),
    Fault("Triton: reach of factors", "(position + BLOCK_N > touched_first)", "(position > touched_first)",
          "the block that it begins in", TRITON),
    Fault("Triton: splits overlap", "return start, tl.minimum(stop, start + share)", "return start, stop",
          "keys are counted twice", TRITON),
    Fault("Triton: bias of own rows", "own_bias_row = bias_row + shift.to(tl.int64) * bias_strides[3]\n                part_bias = (bias, tl.where(own, own_bias_row, part_bias[1]), bias_strides[3])\n        accumulator",
          "own_bias_row = bias_row\n                part_bias = (bias, tl.where(own, own_bias_row, part_bias[1]), bias_strides[3])\n        accumulator", "positions that begin at the prefix", TRITON),
    Fault("Triton: factors of own rows", "position = tl.load(prefix_lengths + variant) + row - tl.load(suffix_starts + variant)",
          "position = row - tl.load(suffix_starts + variant)", "positions that begin at the prefix", TRITON),
    Fault("Triton: sinks of split rows", "sinks + row // rows % HEADS * sinks_stride", "sinks + row % HEADS * sinks_stride",
          "another head's", TRITON),
    Fault("Triton: queries stand at the end", "position = row + (keys - rows)", "position = row", "fewer queries than keys",
          TRITON),
    # --- several processes, and others' requests ---
    Fault("pool: scores in the order in which they come", "scores[[places[unit] for unit in task.arguments[1]]] = outcome.scores",
          "scores[: len(outcome.scores)] = outcome.scores", "shares take the places of others", all_of("test_worker")),
    Fault("service: pages of other sites", "getattr(_address(origin), \"netloc\", None) != host.netloc", "host.netloc is None",
          "whoever's page is open can ask", all_of("test_access")),
    Fault("service: silent connections", "if is_late or now - self._read_at > STUCK_SECONDS", "if now - self._read_at > STUCK_SECONDS",
          "a client that says nothing holds a connection for ever", all_of("test_hostile")),
)  # fmt: skip
