"""The GPU benchmarks on a CPU: what they count, what they accept as right, what they write, and when they say no."""

import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atman_kernels import backends
from atman_kernels.formula import window_visible
from benchmarks import gpu_check, machine
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import (
    backward,
    bundle,
    cases,
    contenders,
    explanation,
    flex,
    masks,
    plan,
    problems,
    report,
    runner,
    small_shapes,
)
from benchmarks.gpu.agreement import Truth
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import Rates, Stopwatch

CPU = torch.device("cpu")
HEADS = cases.Heads(4, 2, 16)
TINY = {shape.name: shape for shape in cases.PRESETS["tiny"]()}
MISSING_GPU = program.missing_gpu()


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compiles", False)


def without_suppression(problem: Any, setting: contenders.Setting) -> contenders.Call:
    """A contender that leaves the factors out."""
    return contenders._ours("cpu").prepare(problem, replace(setting, factor="none"))


# What is counted -------------------------------------------------------------------------------------------------


def visible_pairs(shape: cases.Shape, covers: str) -> int:
    """Row by row, from positions."""
    if isinstance(shape, cases.DenseShape):
        rows = torch.arange(shape.keys - shape.queries, shape.keys)
        return shape.batch * int(window_visible(rows, torch.arange(shape.keys), shape.is_causal, None).sum())
    total = 0
    for suffix, prefix in zip(shape.suffixes, shape.prefixes, strict=True):
        for position in range(prefix, prefix + suffix):
            total += sum(key < prefix or covers == "everything" for key in range(position + 1))
    return total


PACKS = [name for name, shape in TINY.items() if isinstance(shape, cases.PackShape)]


@pytest.mark.parametrize(
    ("name", "covers"), [(name, "everything") for name in TINY] + [(name, "prefix") for name in PACKS]
)
def test_visible_keys(name: str, covers: str) -> None:
    shape = TINY[name]
    assert shape.visible(covers) == visible_pairs(shape, covers)
    assert shape.work(2, "none", covers).flops == 4 * HEADS.query * HEADS.dim * visible_pairs(shape, covers)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("factor", ["none", "sparse", "dense"])
def test_bytes_are_those_of_the_tensors(name: str, factor: str) -> None:
    """Every input that is read and the output; of factors only dense ones, as far as rows can see."""
    shape = TINY[name]
    problem = problems.build(shape, torch.bfloat16, CPU)
    tensors = [problem.query, problem.query, problem.key, problem.value]  # the output has the query's shape
    read = 0
    if isinstance(problem, problems.PackProblem):
        tensors += [problem.base_key, problem.base_value]
        read = sum(s + p for s, p in zip(problem.shape.suffixes, problem.shape.prefixes, strict=True))
    elif factor == "dense":
        read = problem.factors["dense"].numel()
    expected = sum(tensor.nbytes for tensor in tensors) + (4 * read if factor == "dense" else 0)
    assert shape.work(2, factor).bytes == expected


def test_roofline() -> None:
    work = cases.Work(flops=600, bytes=40)
    assert work.floor_seconds(100.0, 10.0) == 6.0
    assert work.floor_seconds(300.0, 10.0) == 4.0
    assert (work.bound(100.0, 10.0), work.bound(300.0, 10.0)) == ("products", "memory")


@pytest.mark.parametrize(("length", "variants"), [(1024, 32), (4096, 8), (16384, 2)])
def test_a_pack_fills_its_token_budget(length: int, variants: int) -> None:
    pack = cases.exact(length)
    assert (pack.variants, pack.rows) == (variants, cases.PACK_ROWS)
    assert all(s + p == length for s, p in zip(pack.suffixes, pack.prefixes, strict=True))
    steps = {after - before for before, after in zip(pack.prefixes, pack.prefixes[1:], strict=False)}
    assert steps == {length // variants}
    assert pack.suppressed == pack.prefixes, "a suffix begins where its variant's suppression does"


def test_shared_prefixes() -> None:
    pack = cases.shared(1024, 16, 8)
    assert (pack.rows, pack.base, pack.longest) == (128, 1024, 1032)
    assert pack.suppressed == tuple(range(0, 1024, 64))


def test_presets() -> None:
    for name, make in cases.PRESETS.items():
        if name == "headline":
            continue
        shapes = make()
        assert len({shape.name for shape in shapes}) == len(shapes), name
        assert {shape.group for shape in shapes} == set(cases.GROUPS), name
        for group in cases.GROUPS:
            if any(shape.all_modes for shape in shapes if shape.group == group):
                continue
            assert group == "decode", f"{name}: no shape of {group} is measured in every mode"
    full = {shape.name for shape in cases.PRESETS["full"]()}
    assert {shape.name for shape in cases.PRESETS["quick"]()} <= full
    assert {f"prefill-{n}k-causal-32x8x{d}" for n in (1, 2, 4, 8, 16, 32) for d in (64, 128, 256)} <= full
    assert {f"shared-{p}k-{v}x{r}-32x8x128" for p in (1, 128) for v in (16, 4096) for r in (1, 8, 64)} <= full


# What is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("factor", ["none", "sparse", "dense"])
@pytest.mark.parametrize("name", TINY)
def test_the_reference_backend_agrees_with_the_truth(name: str, factor: str, mode: str) -> None:
    """Two definitions that share no code, in float64."""
    problem = problems.build(TINY[name], torch.float64, CPU)
    ours = contenders._ours("reference").prepare(problem, contenders.Setting(factor, mode))
    agreement = Truth(problem).check(ours(), factor, mode, "everything")
    assert agreement.finite
    assert agreement.largest_error < 1e-13
    rows = sum(len(piece.rows) for piece in problem.pieces())
    assert agreement.sampled_rows == rows == TINY[name].rows, "at this size every row is looked at"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_leaving_out_one_key_s_factor_is_seen(name: str, dtype: torch.dtype) -> None:
    """Of sparse factors too, which change one key among many."""
    problem = problems.build(TINY[name], dtype, CPU)
    wrong = without_suppression(problem, contenders.Setting("sparse"))()
    truth = Truth(problem)
    assert truth.check(wrong, "none", "log_additive", "everything").right
    agreement = truth.check(wrong, "sparse", "log_additive", "everything")
    assert not agreement.right
    assert agreement.relative_error > 10 * agreement.allowed_relative_error, "rounding would hide less than that"


@pytest.mark.parametrize("length", [4096, 65536])
def test_leaving_it_out_is_seen_among_many_keys(length: int) -> None:
    problem = problems.build(cases.shared(length, 5, 2, HEADS), torch.bfloat16, CPU)
    wrong = without_suppression(problem, contenders.Setting("sparse"))()
    assert not Truth(problem).check(wrong, "sparse", "log_additive", "everything").right


def test_factors_of_the_wrong_variant_are_seen() -> None:
    problem = problems.build(cases.shared(512, 8, 3, HEADS), torch.bfloat16, CPU)
    sparse = problem.factors["sparse"]
    assert sparse is not None
    shifted = replace(problem, factors=problem.factors | {"sparse": sparse.roll(1, dims=0)})
    output = contenders.CONTENDERS["cpu"].prepare(shifted, contenders.Setting("sparse"))()
    assert not Truth(problem).check(output, "sparse", "log_additive", "everything").right


@pytest.mark.parametrize("broken", ["nan", "row"])
def test_unwritten_output_is_seen(broken: str) -> None:
    problem = problems.build(TINY["exact-40-4x2x16"], torch.bfloat16, CPU)
    output = contenders.CONTENDERS["cpu"].prepare(problem, contenders.Setting("sparse"))()
    truth = Truth(problem)
    assert truth.check(output, "sparse", "log_additive", "everything").right
    output[0, 2, -1] = math.nan if broken == "nan" else output[0, 2, -2]
    assert not truth.check(output, "sparse", "log_additive", "everything").right


def test_nan_is_seen_in_rows_that_are_not_sampled() -> None:
    problem = problems.build(cases.prefill(600, True, HEADS), torch.bfloat16, CPU)
    truth, output = Truth(problem), problem.query.clone()
    (piece,) = problem.pieces()
    output[0][:, piece.rows] = problems.plain_attention(piece, None, "log_additive", torch.float64).bfloat16()
    assert truth.check(output, "none", "log_additive", "everything").right
    output[0, 1, min(set(range(600)) - set(piece.rows.tolist())), 2] = math.nan
    assert not truth.check(output, "none", "log_additive", "everything").right


def test_a_single_element_that_is_off_is_seen() -> None:
    problem = problems.build(cases.prefill(200, True, HEADS), torch.bfloat16, CPU)
    output = contenders.CONTENDERS["cpu"].prepare(problem, contenders.Setting("sparse"))()
    truth = Truth(problem)
    agreement = truth.check(output, "sparse", "log_additive", "everything")
    output[0, 3, 40, 5] += 2 * agreement.allowed_error
    agreement = truth.check(output, "sparse", "log_additive", "everything")
    assert agreement.relative_error <= agreement.allowed_relative_error, "the norm does not show it"
    assert not agreement.right


def test_rows_are_sampled_from_first_to_last() -> None:
    sample = problems._sample(1000, 16)
    assert len(sample) == len(set(sample)) == 16
    assert (sample[0], sample[-1]) == (0, 999)
    assert sample == sorted(sample)


# Contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (c, name)
        for c, shape in TINY.items()
        for name, who in contenders.CONTENDERS.items()
        if shape.group in who.groups
    ],
)
def test_contender(case: str, name: str) -> None:
    """Each is right, or says why it cannot run on a CPU."""
    shape, contender = TINY[case], contenders.CONTENDERS[name]
    if contender.is_ours and name != "cpu" and backends.unavailable_reason(name, "cpu") is None:
        pytest.skip(f"{name} runs on a CPU here, which its own tests look at")
    problem = problems.build(shape, torch.bfloat16, CPU)
    for setting in contender.settings(shape):
        if name in ("triton", "cuda:hopper", "cudnn", "cudnn_prefix", "flash_varlen"):
            with pytest.raises(contenders.Unsupported, match=r"\w+ \w+ \w+"):
                contender.prepare(problem, setting)
            continue
        output = contender.prepare(problem, setting)()
        assert output.shape == (problem.query.shape if problem.query.ndim == 4 else (1, *problem.query.shape))
        agreement = Truth(problem).check(output, setting.factor, setting.mode, contender.covers)
        assert agreement.right, (setting, agreement)
    assert contender.bytes_needed(shape, 2) >= 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling FlexAttention for the CPU needs g++")
@pytest.mark.parametrize("case", ["prefill-64-causal-4x2x16", "exact-40-4x2x16", "decode-64-batch2-4x2x16"])
def test_flex_attention_compiled(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compiles", True)
    problem = problems.build(TINY[case], torch.float32, CPU)
    with torch.inference_mode():
        output = contenders.CONTENDERS["flex"].prepare(problem, contenders.Setting("sparse"))()
    assert Truth(problem).check(output, "sparse", "log_additive", "everything").right


def test_compiled_flex_attention_without_lse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compiles", True)
    problem = problems.build(TINY["shared-64-6x1-4x2x16"], torch.bfloat16, CPU)
    with pytest.raises(contenders.Unsupported, match="log-sum-exp"):
        contenders.CONTENDERS["flex"].prepare(problem, contenders.Setting("sparse"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_removed_suffixes() -> None:
    """Factors of 0 may leave a row none of its own keys."""
    problem = problems.build(cases.shared(70, 40, 4, HEADS), torch.float32, CPU)
    dense = problem.factors["dense"]
    assert dense is not None
    assert (dense[:, 70] == 0).any()
    output = flex.shared_prefix(problem, dense)()
    assert Truth(problem).check(output, "dense", "log_additive", "everything").right


@pytest.mark.parametrize("shape", [cases.exact(600, HEADS, rows=1000), cases.prefill(300, True, HEADS)], ids=str)
def test_block_mask(shape: cases.Shape) -> None:
    """Blocks against the whole matrix of who sees whom."""
    problem = problems.build(shape, torch.float32, CPU)
    if isinstance(problem, problems.PackProblem):
        visible, keys = masks.pack_visible(problem), problem.shape.base + problem.shape.rows
    else:
        visible, keys = masks.dense_visible(problem), problem.shape.keys
    rows = shape.rows
    some, every = masks.block_states(rows, visible, keys)
    whole = visible(slice(0, rows))
    assert whole.shape == (rows, keys)
    assert int(whole.sum()) == shape.visible()
    for i in range(some.shape[0]):
        for j in range(some.shape[1]):
            tile = whole[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert bool(some[i, j]) == bool(tile.any())
            assert bool(every[i, j]) == (bool(tile.all()) and tile.shape == (128, 128))
    assert every.any(), "no block is seen as a whole"
    counts, indices = flex._ordered(some)
    for i, count in enumerate(counts[0, 0].tolist()):
        assert indices[0, 0, i, :count].tolist() == some[i].nonzero().flatten().tolist()


# Runs and their files ----------------------------------------------------------------------------------------------


def run_tiny(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    common = ["--device", "cpu", "--preset", "tiny", "--no-compile", "--seconds-per-row", "0.001"]
    code = program.main([*common, "--output", str(folder), *options])
    return code, json.loads(next(folder.glob("gpu-ops-*.json")).read_text())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run_tiny(tmp_path, "--groups", "packs,shared")
    assert code == program.PASSED
    assert set(result) == {"schema", "header", "runs", "rows"}
    assert {"date", "commit", "versions", "dtype", "gpu_name", "cpu", "command"} <= set(result["header"])
    assert set(result["runs"][0]["rates"]) == {"flops_per_second", "bytes_per_second"}
    expected = {
        (shape.name, name, setting.factor, setting.mode)
        for shape in TINY.values()
        if shape.group in ("packs", "shared")
        for name, contender in contenders.CONTENDERS.items()
        if shape.group in contender.groups and name not in ("triton", "cuda:hopper")
        for setting in contender.settings(shape)
    }
    rows = {(row["case"], row["contender"], row["factor"], row["mode"]): row for row in result["rows"]}
    assert set(rows) == expected, "every contender stands in the file, measured or not"
    rates = Rates(**result["runs"][0]["rates"])
    for row in rows.values():
        if row["status"] != "ok":
            assert row["reason"]
            assert "ms" not in row
            continue
        assert row["agreement"]["right"]
        assert row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
        assert row["tflops_per_second"] == pytest.approx(row["flops"] / (row["ms"] / 1e3) / 1e12)
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / (row["ms"] / 1e3) / 1e9)
        floor = 1e3 * max(row["flops"] / rates.flops_per_second, row["bytes"] / rates.bytes_per_second)
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["share_of_floor"] == pytest.approx(floor / row["ms"])
    summary = next(tmp_path.glob("gpu-ops-*.md")).read_text()
    assert "## packs" in summary
    assert "## Not measured" in summary
    assert "cudnn_prefix" in capsys.readouterr().out


def test_a_wrong_contender_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(contenders.CONTENDERS["cpu"], prepare=without_suppression)
    monkeypatch.setitem(contenders.CONTENDERS, "cpu", wrong)
    code, result = run_tiny(tmp_path, "--groups", "packs", "--contenders", "cpu,eager")
    assert code == program.FAILED
    for row in result["rows"]:
        if row["contender"] == "cpu" and row["factor"] != "none":
            assert row["status"] == "wrong"
            assert "rounding explains" in row["reason"]
            assert not {"ms", "tflops_per_second", "share_of_floor"} & set(row)
        else:
            assert row["status"] == "ok"
    assert "wrong: off by up to" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "code"), [("cpu", program.FAILED), ("eager", program.PASSED)])
def test_errors(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours fails the run, one of a peer is reported; both leave the others alone."""

    def fails(problem: Any, setting: contenders.Setting) -> contenders.Call:
        raise ValueError("no such kernel")

    monkeypatch.setitem(contenders.CONTENDERS, name, replace(contenders.CONTENDERS[name], prepare=fails))
    came, result = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu,eager")
    assert came == code
    for row in result["rows"]:
        assert row["status"] == ("error" if row["contender"] == name else "ok")
        assert row["contender"] != name or row["reason"] == "ValueError: no such kernel"


def test_out_of_memory_and_lack_of_memory_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausts(problem: Any, setting: contenders.Setting) -> contenders.Call:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TB")

    eager = replace(contenders.CONTENDERS["eager"], bytes_needed=lambda shape, element: 10**15)
    monkeypatch.setitem(contenders.CONTENDERS, "eager", eager)
    bias = replace(contenders.CONTENDERS["sdpa_bias"], prepare=exhausts)
    monkeypatch.setitem(contenders.CONTENDERS, "sdpa_bias", bias)
    code, result = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu,eager,sdpa_bias")
    assert code == program.PASSED
    reasons = {row["contender"]: row["reason"] for row in result["rows"] if row["status"] == "skipped"}
    assert "it would need about 1000000.0 GB" in reasons["eager"]
    assert reasons["sdpa_bias"].startswith("out of memory: CUDA out of memory")


def test_resumed_run_measures_what_is_missing(tmp_path: Path) -> None:
    code, first = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu", "--minutes", "0")
    assert code == program.NOTHING_RUN
    assert {row["reason"] for row in first["rows"]} == {"the time budget was used up"}
    _, second = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu", "--resume")
    assert [row["status"] for row in second["rows"]] == ["ok"] * 3
    _, third = run_tiny(tmp_path, "--groups", "decode,packs", "--contenders", "cpu", "--resume")
    assert third["rows"][:3] == second["rows"], "what was measured stays"
    assert len(third["rows"]) == 8
    assert len(third["runs"]) == 3
    _, fourth = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu")
    assert len(fourth["rows"]) == 3, "without --resume the file begins anew"


def test_rows_of_another_commit_are_dropped(tmp_path: Path) -> None:
    header = {"commit": "a", "versions": {"torch": "1"}, "python": "3", "gpu_name": "G", "dtype": "bfloat16"}
    key = {"case": "c", "contender": "cpu", "factor": "none", "mode": "log_additive"}
    path = tmp_path / "results.json"
    Results(path, header).add(key | {"status": "unsupported", "reason": "so"})
    assert Results(path, header, resume=True).done(**key)
    assert not Results(path, header, resume=False).done(**key)
    assert not Results(path, header | {"commit": "b"}, resume=True).done(**key)


def test_a_time_without_a_right_result_cannot_be_written(tmp_path: Path) -> None:
    key = {"case": "c", "contender": "cpu", "factor": "none", "mode": "log_additive"}
    with pytest.raises(AssertionError, match="a time is reported for what is right"):
        Results(tmp_path / "r.json", {}).add(key | {"status": "wrong", "reason": "off", "ms": 1.0})


def test_backends_that_cannot_run_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "unavailable_reason", lambda name, device: "not today" if name == "cpu" else None)
    code, result = run_tiny(tmp_path, "--groups", "decode", "--cases", "decode*")
    assert code == program.PASSED
    assert result["header"]["left_out"] == {"cpu": "not today"}
    assert "cpu" not in {row["contender"] for row in result["rows"]}
    assert "- without cpu: not today" in next(tmp_path.glob("gpu-ops-*.md")).read_text()
    monkeypatch.undo()
    code, result = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cuda:hopper")
    assert code == program.NOTHING_RUN
    assert {row["status"] for row in result["rows"]} == {"unsupported"}


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any) -> None:
        raise runner.DeviceLost("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.Runner, "_tidy", lost)
    code, result = run_tiny(tmp_path, "--groups", "decode", "--contenders", "cpu")
    assert code == program.FAILED
    assert len(result["rows"]) == 1, "the row that came before is kept, nothing is measured after it"


def test_overhead_of_suppression() -> None:
    common = {"case": "c", "contender": "triton", "is_ours": True, "mode": "log_additive", "status": "ok"}
    plain, sparse = common | {"factor": "none", "ms": 2.0}, common | {"factor": "sparse", "ms": 2.1}
    elsewhere = plain | {"case": "d", "ms": 1.0}
    assert report.overhead(sparse, [elsewhere, plain, sparse]) == pytest.approx(0.05)
    assert report.overhead(plain, [plain, sparse]) is None
    assert report.overhead(sparse, [elsewhere, sparse]) is None
    assert report.overhead(sparse, [plain | {"status": "wrong"}, sparse]) is None


def test_stopwatch() -> None:
    calls = []
    timing = Stopwatch(CPU, seconds_per_call=0.0).time(lambda: calls.append(1))
    assert timing.repeats == 5
    assert len(calls) == timing.repeats + 3
    assert timing.fastest_ms <= timing.ms <= timing.slowest_ms


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--groups", "prefil"])
    assert "'prefil' is none of prefill, packs, shared, decode" in capsys.readouterr().err
    assert program.main(["--device", "cpu", "--cases", "nothing*"]) == program.NOTHING_RUN


# Small shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", small_shapes.DTYPES.values(), ids=str)
def test_small_shapes_agree(dtype: torch.dtype) -> None:
    assert small_shapes.check("cpu", "cpu", dtype) == ([], 0)


def test_small_shapes_notice_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from atman_kernels.backends.cpu import blocked

    right = blocked._scores
    monkeypatch.setattr(blocked, "_scores", lambda *arguments: right(*arguments) * 1.3)
    failures, _ = small_shapes.check("cpu:torch", "cpu", torch.bfloat16)
    assert failures
    assert all("is off by" in failure for failure in failures)


def test_small_shapes_keep_to_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_shapes.main(["cpu", "--device", "cpu", "--seconds", "-1"]) == program.NOTHING_RUN
    count = len(list(small_shapes.calls(torch.bfloat16)))
    assert f"0 of 0 calls are right, {count} were not made" in capsys.readouterr().out


def test_small_shapes_try_every_option() -> None:
    names = [name for name, *_ in small_shapes.calls(torch.bfloat16)]
    assert len(set(names)) == len(names)
    for op in ("dense", "packed"):
        for option in (*small_shapes.OPTIONS, "multiplicative", "shifted", "no factors"):
            assert any(name.startswith(op) and option in name for name in names), (op, option)


# The whole check -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(MISSING_GPU is None, reason="there is a GPU")
@pytest.mark.parametrize("module", ["program", "gpu_check", "explanation"])
def test_without_a_gpu(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    mains = {"program": program.main, "gpu_check": gpu_check.main, "explanation": explanation.main}
    assert mains[module]([]) == program.NOTHING_RUN == 2
    assert str(MISSING_GPU) in capsys.readouterr().err


STEP = plan.Step("x", "a", ("module",), planned=1.0, limit=2.0)


def outcome(status: str, step: str = "x") -> gpu_check.Outcome:
    return gpu_check.Outcome(step, status, 0.0, "")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [(["passed"], 0), (["passed", "failed"], 1), (["passed", "stopped"], 1), (["incomplete"], 2), ([], 2),
     (["passed", "incomplete"], 3), (["passed", "left out"], 3)],
)  # fmt: skip
def test_verdict(statuses: list[str], code: int) -> None:
    assert gpu_check.verdict([outcome(status) for status in statuses]) == code


WHERE = {"gpu_name": "H100", "commit": "c"}


def journal(folder: Path, gpu: str = "H100") -> gpu_check.Journal:
    return gpu_check.Journal(folder, WHERE | {"gpu_name": gpu})


class Simulated:
    """Runs a plan in no time: each step takes what it is planned to, or what it is said to take."""

    def __init__(self, **taking: float) -> None:
        self.now, self.taking = 0.0, {name.replace("_", " "): seconds for name, seconds in taking.items()}
        self.began: list[str] = []

    def clock(self) -> float:
        return self.now

    def __call__(self, step: plan.Step, seconds: float) -> gpu_check.Outcome:
        self.began.append(step.name)
        took = min(self.taking.get(step.name, step.planned), seconds)
        self.now += took
        status = "stopped" if took == seconds else "passed"
        return gpu_check.Outcome(step.name, status, took, "")


def simulate(folder: Path, budget: float, gpu: str = "H100", **taking: float) -> Simulated:
    simulated = Simulated(**taking)
    steps = [replace(step, needs=()) for step in plan.plan()]
    gpu_check.run_plan(steps, budget, simulated, journal(folder, gpu), clock=simulated.clock)
    return simulated


def test_two_calls_of_330_seconds_are_enough(tmp_path: Path) -> None:
    """Fifteen minutes with two starts: what matters most in the first call, the rest but extra shapes in the second."""
    first = simulate(tmp_path, 330)
    parts = {step.name: step.part for step in plan.plan()}
    assert {name for name, part in parts.items() if part in "abcd"} <= set(first.began)
    assert first.now <= 330
    second = simulate(tmp_path, 330)
    assert second.now <= 330
    assert not set(first.began) & set(second.began)
    left = set(parts) - set(first.began) - set(second.began)
    assert left <= {"more shapes", "memcheck hopper", "shapes plain", "ladder"}, left
    assert [parts[name] for name in first.began] == sorted(parts[name] for name in first.began), "by value"


def test_a_hang_costs_its_step(tmp_path: Path) -> None:
    run = simulate(tmp_path, 330, smoke_hopper=1e9)
    assert "rows hopper" not in run.began, "what rests on it is not begun"
    assert {"headline 128", "headline 64", "explanation"} <= set(run.began)
    again = simulate(tmp_path, 330)
    assert again.began[0] == "smoke hopper", "what was stopped is tried again"
    assert "headline 128" not in again.began


def test_nothing_runs_past_the_budget(tmp_path: Path) -> None:
    slow = {step.name.replace(" ", "_"): 1e9 for step in plan.plan()}
    assert simulate(tmp_path, 200, **slow).now <= 200
    (tmp_path / "none").mkdir()
    assert simulate(tmp_path / "none", 5).began == [], "with less than a step takes it is not begun"


def test_figures_hold_for_one_kind_of_gpu(tmp_path: Path) -> None:
    first = simulate(tmp_path, 330)
    elsewhere = simulate(tmp_path, 330, gpu="H200")
    assert "headline 128" in elsewhere.began
    assert "shapes triton" in first.began
    assert "shapes triton" not in elsewhere.began


def test_plans_are_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = plan.plan()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for i, step in enumerate(steps):
        assert step.planned < step.limit, step
        assert step.after is None or step.after in names[:i], step
    monkeypatch.setattr(plan, "find_spec", lambda name: object())
    assert {"-n", "4", "--timeout"} <= set(plan._pytest(4))
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    assert not {"-n", "--timeout"} & set(plan._pytest(4))
    assert all((gpu_check.REPOSITORY / "python_tests" / name).is_file() for name in plan.SUITES)


def test_what_was_begun_and_what_ended_is_on_disk_at_once(tmp_path: Path) -> None:
    seen = []

    def execute(step: plan.Step, seconds: float) -> gpu_check.Outcome:
        seen.extend(json.loads(text) for text in (tmp_path / gpu_check.JOURNAL).read_text().splitlines())
        return outcome("passed", step.name)

    gpu_check.run_plan([STEP], 10, execute, journal(tmp_path))
    assert seen == [{"run": WHERE}, {"step": "x", "status": "begun"}]
    with (tmp_path / gpu_check.JOURNAL).open("a") as file:
        file.write('{"step": "cut o')  # the machine was taken away
    assert journal(tmp_path).done(STEP) == "passed"


def programs(folder: Path, *command: str) -> tuple[gpu_check.Programs, plan.Step]:
    """A step whose program is this command; kernels that others compile meanwhile are not counted."""
    made = gpu_check.Programs(folder, variables={"TRITON_CACHE_DIR": str(folder / "kernels")})
    object.__setattr__(made, "command", lambda *_: list(command))
    return made, STEP


def endless(*said: str) -> list[str]:
    """What says this at once, however busy the machine is, and then waits for a program of its own, without end."""
    return ["sh", "-c", 'printf "%s\\n" "$@"; sleep 600 & wait', "sh", *said]


def test_a_program_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    execute, step = programs(tmp_path, *endless("started"))
    (tmp_path / "rows.json.partial").write_text("{")
    came = execute(step, 1.5)
    assert (came.status, came.detail) == ("stopped", "after 2 s: started")
    assert came.seconds < 20
    assert (tmp_path / gpu_check.LOG).read_text() == "[x] started\n"
    assert not list(tmp_path.glob("*.partial"))


def test_exit_codes_of_programs(tmp_path: Path) -> None:
    for code, status in ((0, "passed"), (1, "failed"), (2, "incomplete"), (5, "incomplete"), (-11, "failed")):
        kill = "import os; os.kill(os.getpid(), 11)" if code < 0 else f"raise SystemExit({code})"
        execute, step = programs(tmp_path, sys.executable, "-c", kill)
        assert execute(step, 60).status == status, code


def test_failures_have_names_when_pytest_is_killed(tmp_path: Path) -> None:
    said = [
        "[gw3] [ 12%] PASSED python_tests/test_a.py::test_fine[1-x] ",
        "[gw3] [ 12%] FAILED python_tests/test_a.py::test_x[torch.float16-a b] ",
        "python_tests/test_b.py::test_y FAILED                     [ 50%]",
        "FAILED python_tests/test_b.py::test_y - AssertionError: off",
        "worker 'gw1' crashed while running 'python_tests/test_c.py::test_z'",
    ]
    execute, step = programs(tmp_path, *endless(*said))
    came = execute(step, 1.5)
    assert came.status == "stopped"
    assert came.failures == (
        "python_tests/test_a.py::test_x[torch.float16-a b]",
        "python_tests/test_b.py::test_y",
        "python_tests/test_c.py::test_z",
    )
    assert "x failed: python_tests/test_b.py::test_y" in gpu_check.summary([came], tmp_path)


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    (came,) = gpu_check.run_plan([replace(STEP, needs=("no_such_module",))], 10, Simulated(), journal(tmp_path))
    assert (came.status, came.detail) == ("incomplete", "not installed: no_such_module")
    came = gpu_check.Programs(tmp_path)(replace(STEP, wrapper=("no-such-program",)), 10)
    assert (came.status, came.detail) == ("incomplete", "no-such-program is not installed")


def pretended(folder: Path, only: str, *options: str) -> dict[str, dict[str, Any]]:
    """Step -> its outcome, of a run on a device that is not there."""
    gpu_check.main(["--pretend", "--only", only, "--output", str(folder), "--bundle", str(folder / "none"), *options])
    events = [json.loads(text) for text in (folder / gpu_check.JOURNAL).read_text().splitlines()]
    return {event["step"]: event for event in events if "gpu" in event}


def test_pretended_run(tmp_path: Path) -> None:
    """Commands as they are on a GPU, in programs of their own, and on from another folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    came = pretended(first, "smoke hopper,tuning")
    assert {name: event["status"] for name, event in came.items()} == {"smoke hopper": "passed", "tuning": "passed"}
    lines = (first / "gpu-tuning-nvidia-h100-80gb-hbm3-pretended.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines[1:]] == ["ok"] * (len(lines) - 1)
    assert len(lines) > 15
    pretended(second, "tuning,shapes plain", "--resume", str(first))
    begun = [json.loads(text) for text in (second / gpu_check.JOURNAL).read_text().splitlines()]
    assert [event["step"] for event in begun if event.get("status") == "begun"] == [
        "smoke hopper",
        "tuning",
        "shapes plain",
    ]


@pytest.mark.slow
def test_pretended_run_of_everything(tmp_path: Path) -> None:
    came = pretended(tmp_path, "*")
    left_out = {name for name, event in came.items() if event["status"] != "passed"}
    assert left_out <= {"memcheck triton", "memcheck hopper", "ladder", "backward"}, "what is not here"
    assert {step.name for step in plan.plan()} == set(came)
    (rows,) = tmp_path.glob("gpu-ops-*.json")
    found = {(row["contender"], row["status"]) for row in json.loads(rows.read_text())["rows"]}
    assert {("triton", "ok"), ("cuda:hopper", "ok"), ("flash", "ok"), ("cudnn", "ok"), ("sdpa_bias", "ok")} <= found
    assert len(list(tmp_path.iterdir())) <= 8, "no more files come back"


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["none", "sparse"])
@pytest.mark.parametrize("pair", backward.shapes(tiny=True), ids=lambda pair: pair[0].name)
def test_gradients_are_held_against_the_formula(pair: tuple[cases.Shape, cases.Shape], factor: str) -> None:
    problem, setting = problems.build(pair[1], torch.bfloat16, CPU), contenders.Setting(factor)
    call, grad = backward.prepared(contenders.CONTENDERS["cpu"], problem, setting)
    found = call()
    for whole in (True, False):
        assert backward.objection(found, problem, setting, grad, whole) is None
    other = contenders.Setting("none" if factor == "sparse" else "sparse")
    for whole in (True, False):
        assert "rounding explains" in str(backward.objection(found, problem, other, grad, whole))
    names = backward.PACK_TENSORS if isinstance(problem, problems.PackProblem) else backward.DENSE_TENSORS
    for i, name in enumerate(names):
        wrong = (*found[:i], found[i] * 1.1, *found[i + 1 :])
        assert name in str(backward.objection(wrong, problem, setting, grad, whole=True))


def test_wrong_gradients_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = contenders.CONTENDERS["cpu"]
    pair = backward.shapes(tiny=True)[1]
    right = backward.measure(contender, pair, Stopwatch(CPU, 0.0))
    assert [row["status"] for row in right] == ["ok", "ok"]
    monkeypatch.setitem(contenders.CONTENDERS, "cpu", replace(contender, prepare=without_suppression))
    wrong = backward.measure(contenders.CONTENDERS["cpu"], pair, Stopwatch(CPU, 0.0))
    assert [row["status"] for row in wrong] == ["ok", "wrong"]
    assert "ms" not in wrong[1]


# The bundle ------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A bundle with nothing real in it."""
    folder = tmp_path / "made"
    kernel = folder / "triton-cache" / "AB12"
    kernel.mkdir(parents=True)
    (kernel / "attention.cubin").write_bytes(b"code")
    (kernel / "attention.ttir").write_text("left behind")
    group = {"child_paths": {"attention.cubin": str(kernel / "attention.cubin")}}
    (kernel / "__grp__attention.json").write_text(json.dumps(group))
    assert bundle.slim(folder / "triton-cache") == 1
    (folder / "_cuda.so").write_text("module")
    (folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("module")
    (folder / "ladder").write_text("program")
    made = {"commit": "abc", "sources": machine.sources(), "python": sysconfig.get_config_var("EXT_SUFFIX")}
    made["triton"] = bundle.version("triton")
    (folder / bundle.PROVENANCE.name).write_text(json.dumps(made))
    bundle.write_archive(tmp_path / "bundle.tar.gz", folder, [path.name for path in folder.iterdir()])
    return tmp_path / "bundle.tar.gz"


def test_a_bundle_is_unpacked(archive: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    unpacked = bundle.unpack(archive, tmp_path / "place", package)
    assert unpacked.parts == ("kernels", "module", "ladder")
    assert unpacked.objections == ()
    cache = Path(unpacked.variables["TRITON_CACHE_DIR"])
    group = json.loads((cache / "AB12" / "__grp__attention.json").read_text())
    assert Path(group["child_paths"]["attention.cubin"]).read_bytes() == b"code", "paths hold where it is now"
    assert not (cache / "AB12" / "attention.ttir").exists()
    assert bundle.cached_kernels(unpacked.variables) == 1
    assert [path.name for path in package.iterdir()] == [f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"]


@pytest.mark.parametrize(
    ("name", "left"),
    [("triton", ("module", "ladder")), ("cuda", ("kernels",)), ("tables", ("kernels", "module", "ladder"))],
)
def test_a_bundle_that_is_older_than_its_sources(
    name: str, left: tuple[str, ...], archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "sources", lambda: machine.sources() | {name: "changed since"})
    unpacked = bundle.unpack(archive, tmp_path / "place", tmp_path)
    assert unpacked.parts == left
    assert all("older than" in objection for objection in unpacked.objections)
    assert len(unpacked.objections) == 3 - len(left)
    assert ("TRITON_CACHE_DIR" in unpacked.variables) == ("kernels" in left)
    assert bundle.check(archive) == (0 if len(left) == 3 else 1)


def test_a_bundle_for_another_python_or_triton(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "version", lambda name: "0.1")
    monkeypatch.setattr(bundle.sysconfig, "get_config_var", lambda name: ".cpython-399.so")
    unpacked = bundle.unpack(archive, tmp_path / "place", tmp_path)
    assert unpacked.parts == ("ladder",)
    assert "they are Triton" in unpacked.objections[0]
    assert "not for .cpython-399.so" in unpacked.objections[1]


def test_the_bundle_that_lies_here_is_as_new_as_its_sources() -> None:
    if not bundle.ARCHIVE.is_file():
        pytest.skip("make gpu-bundle has not been run")
    assert bundle.check(bundle.ARCHIVE) == 0, "make gpu-bundle makes it anew"


def test_the_commit_is_known_without_git(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no git")))
    monkeypatch.setattr(machine, "PROVENANCE", tmp_path / "place" / "provenance.json")
    assert machine.commit() is None
    bundle.unpack(archive, tmp_path / "place", tmp_path)
    assert machine.commit() == "abc"
    monkeypatch.setattr(machine, "sources", lambda: {"package": "another"})
    assert machine.commit() == "abc-dirty"


def test_newest_glibc_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"\x00GLIBC_2.2.5\x00GLIBC_2.34\x00GLIBC_2.4\x00")
    assert bundle.glibc(tmp_path / "program") == (2, 34)


def test_nothing_but_torch_is_imported() -> None:
    """A GPU machine may have neither click nor rich nor pytest-benchmark."""
    code = (
        "import sys\n"
        "for name in ('click', 'rich', 'pytest', 'pytest_benchmark', 'hypothesis', 'psutil', 'transformers'):\n"
        "    sys.modules[name] = None\n"  # importing it raises
        "import benchmarks.gpu_check, benchmarks.gpu.__main__, benchmarks.gpu.small_shapes, benchmarks.gpu.bundle\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=gpu_check.REPOSITORY, check=True, timeout=120)


def test_the_explanation_needs_what_the_check_says(tmp_path: Path) -> None:
    """transformers itself needs regex."""
    code = (
        "import sys\n"
        "for name in ('click', 'rich', 'pytest', 'sentencex', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.gpu import explanation\n"
        "sys.exit(explanation.main('--device cpu --preset tiny --rounds 1 --output'.split() + sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=gpu_check.REPOSITORY, check=True, timeout=120, capture_output=True)


# A whole explanation ---------------------------------------------------------------------------------------------


def explained(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--device", "cpu", "--preset", "tiny", "--rounds", "1", "--output", str(tmp_path)]
    code = explanation.main([*arguments, *options])
    return code, json.loads(next(tmp_path.glob("gpu-explanation-tiny-*.json")).read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explanation(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = explained(tmp_path, "--dtype", dtype)
    assert code == program.PASSED
    assert record["agreement"]["right"]
    assert record["agreement"]["path"] == "packed"
    entry = record["rounds"][0]
    n, m = record["prompt_tokens"], record["target_tokens"]
    suffixes = sum(n - i + m - 1 for i in range(n))
    riders = (n - n // 2 + m - 1) + m
    assert 0 <= entry["tokens_through_model"] - (n + m - 1) - suffixes - riders <= 0.06 * suffixes, "more than padding"
    assert entry["largest_forward"] >= suffixes
    assert record["share_of_linear_rate"] == pytest.approx(
        entry["flops"] / entry["seconds"] / record["linear_flops_per_second"]
    )
    assert "path: packed" in capsys.readouterr().out


def test_what_takes_less_is_timed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = explained(tmp_path, "--dtype", "float32", "--tokens", "100")
    assert code == program.PASSED
    assert set(record["shorter"]) == {"exact=16", "recompute=1"}
    tokens = {name: entry["tokens_through_model"] for name, entry in record["shorter"].items()}
    assert tokens["recompute=1"] < tokens["exact=16"] < record["rounds"][0]["tokens_through_model"]
    assert all(entry["seconds"] > 0 for entry in record["shorter"].values())
    assert re.search(r"exact=16: \d+\.\d\d s; [\d,]+ tokens\n", capsys.readouterr().out)


def test_a_failure_of_what_takes_less_leaves_the_exact_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = explanation.ak.Explainer.explain

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "exact" in kwargs:
            raise RuntimeError("no\nmore")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(explanation.ak.Explainer, "explain", fails)
    code, record = explained(tmp_path, "--dtype", "float32")
    assert code == program.PASSED
    assert record["shorter"]["exact=16"] == {"error": "RuntimeError: no"}
    assert record["shorter"]["recompute=1"]["seconds"] > 0
    assert "exact=16: RuntimeError: no\n" in capsys.readouterr().out


def test_wrong_scores_get_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explainer = explanation.ak.Explainer
    stronger = {"factor": 0.09}  # where 0.1 is asked for
    monkeypatch.setattr(explanation.ak, "Explainer", lambda *args, **kwargs: explainer(*args, **kwargs | stronger))
    code, record = explained(tmp_path, "--dtype", "float32")
    assert code == program.FAILED
    assert not record["agreement"]["right"]
    assert "rounds" not in record
    assert "no time is reported: scores are off by up to" in capsys.readouterr().out


def test_the_full_row_way_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = explanation.ak.Explainer

    def unpackable(*args: Any, **kwargs: Any) -> Any:
        made = explainer(*args, **kwargs)
        made.runner.unpackable = "because"
        return made

    monkeypatch.setattr(explanation.ak, "Explainer", unpackable)
    code, record = explained(tmp_path, "--dtype", "float32")
    assert code == program.FAILED
    assert record["agreement"]["objection"] == "the explainer went the batched way, not the packed one"
    assert "rounds" not in record


def test_a_check_that_zeros_would_pass_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "FACTOR", 1.0)
    code, record = explained(tmp_path, "--dtype", "float32")
    assert code == program.FAILED
    assert "zeros would pass" in record["agreement"]["objection"]


def test_a_model_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausts(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GB")

    monkeypatch.setattr(explanation, "random_model", exhausts)
    assert explanation.main(["--device", "cpu", "--preset", "tiny", "--output", str(tmp_path)]) == program.NOTHING_RUN
    assert "preset tiny does not fit this device: CUDA out of memory" in capsys.readouterr().err


def test_question_has_a_token_per_word() -> None:
    question = explanation.Question.random(12, 50, CPU)
    encoded = explanation.word_tokenizer(50)(question.prompt, return_offsets_mapping=True, add_special_tokens=False)
    assert encoded["input_ids"] == question.ids[:12].tolist()
    first, last = question.span(3, 6)
    assert question.prompt[first:last] == " ".join(f"w{i}" for i in question.ids[3:6].tolist())
    assert [tuple(o) for o in encoded["offset_mapping"]] == [question.span(i, i + 1) for i in range(12)]


def test_options_of_gpu_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/where/it/comes/back")
    options = gpu_check.arguments(["--only", "c,smoke*"])
    assert [step.name for step in options.steps] == ["smoke hopper", "headline 128", "headline 64"]
    assert options.output == Path("/where/it/comes/back")
    with pytest.raises(SystemExit):
        gpu_check.arguments(["--only", "benches"])
    assert "'benches' is none of a (shapes triton), b (smoke hopper)" in capsys.readouterr().err
    assert gpu_check.main(["--list", "--budget", "330"]) == 0
    listed = capsys.readouterr().out
    assert "in 330 s" in listed
    assert all(step.name in listed for step in plan.plan())
