"""The command line where it is run: streams in any encoding, closed, full or unread; files of any kind; odd values."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from atman_kernels.cli import main
from atman_kernels.cli.output import goes_to_standard_output

PROMPT = "The dög 🦊 is"
FULL = OSError(errno.ENOSPC, "No space left on device")
UNREAD = BrokenPipeError(errno.EPIPE, "Broken pipe")


class Outcome(NamedTuple):
    code: int
    out: bytes
    err: str


class Refusing(io.RawIOBase):
    """A stream that nothing can be written to."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, _: Any) -> int:
        raise self.error


class Kept(io.BytesIO):
    """What was written stays when the stream around it goes."""

    def close(self) -> None:
        pass


def stream(binary: Any, encoding: str = "utf-8") -> io.TextIOWrapper:
    """As strict as those of a process."""
    return io.TextIOWrapper(io.BufferedWriter(binary) if isinstance(binary, Refusing) else binary, encoding)


@pytest.fixture
def atman(monkeypatch):
    """Runs `atman` in this process, on streams of its own."""

    def run(
        *arguments: object, encoding: str = "utf-8", out: Any = None, err: Any = None, stdin: Any = None
    ) -> Outcome:
        out, err = out or Kept(), err or Kept()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stream(out, encoding))
            patch.setattr(sys, "stderr", stream(err, encoding))
            with pytest.raises(SystemExit) as end:
                main([str(argument) for argument in arguments], prog_name="atman")
        texts = [s.getvalue() if isinstance(s, Kept) else b"" for s in (out, err)]
        return Outcome(int(end.value.code or 0), texts[0], texts[1].decode(encoding))

    return run


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    from atman_kernels.hf.models.loading import load_model

    return load_model(tiny_llama, dtype="float32", device="cpu")


@pytest.fixture
def model(loaded, tiny_llama, monkeypatch):
    """The options of a model, which is loaded once for this file."""
    monkeypatch.setattr("atman_kernels.hf.models.loading.load_model", lambda *_, **__: loaded)
    return ("--model", tiny_llama, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 3)


@pytest.fixture(params=["explain", "steer"])
def command(request, model):
    rest = ("--target", " Pilot 🦊") if request.param == "explain" else ("--suppress", "dög")
    return (request.param, *model, *rest, PROMPT)


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(
        "atman_kernels.hf.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )


# --- encodings ---


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_results_and_messages_in_every_encoding(atman, command, encoding):
    found = atman(*command, encoding=encoding)
    assert (found.code, "Error" in found.err) == (0, False)
    assert ("🦊" if encoding.startswith("utf") else r"\U0001f98a") in found.out.decode(encoding)


def test_signs_of_ours_in_ascii(atman, model):
    steer = ("steer", *model, "--suppress", "dög", PROMPT)
    assert rb"[d\xf6g x0.1]" in atman(*steer, encoding="ascii").out
    assert "[dög ×0.1]" in atman(*steer, encoding="cp1252").out.decode("cp1252")


def test_json_is_ascii_whatever_the_stream(atman, command):
    for encoding in ("ascii", "cp1252", "utf-8"):
        assert json.loads(atman(*command, "--json", "-", encoding=encoding).out.decode("ascii"))["prompt"] == PROMPT


def test_messages_are_displayed_and_not_obeyed(atman):
    assert "␛[31m⟨RLO⟩⟨U+DCFF⟩ cannot be read" in atman("explain", "--model", "m", "--file", "\x1b[31m\u202e\udcff").err


def test_help_is_ascii():
    """click writes it by itself, in UTF-8 even where the stream is ASCII."""
    for words in ([], ["explain"], ["steer"], ["demo"], ["doctor"], ["bench"], ["bench", "ops"], ["bench", "quality"]):
        assert CliRunner().invoke(main, [*words, "--help"]).output.isascii(), words


def test_the_other_tables_in_ascii(atman):
    for arguments in (("doctor",), ("bench", "ops", "--length", 8)):
        found = atman(*arguments, encoding="ascii")
        assert (found.code, found.err) == (0, "")


def test_table_of_quality_shows_text_as_it_is(monkeypatch):
    from atman_kernels.cli.bench_quality import show
    from atman_kernels.evaluation.quality import Summary

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", errors="backslashreplace"))
    show([Summary("log_additive κ=0.5", 0, {}, {}, "no [red]values[/red] :smile:")])
    assert b"no [red]values[/red] :smile:" in raw.getvalue()
    assert rb"\u03ba=0.5" in raw.getvalue()


# --- streams that are closed, full or unread ---


def test_full_disk_below_standard_output(atman, command, tmp_path):
    found = atman(*command, "--json", tmp_path / "result.json", out=Refusing(FULL))
    assert found.code == 1
    assert found.err.splitlines()[-1] == "Error: standard output cannot be written: No space left on device"
    assert json.loads((tmp_path / "result.json").read_text())["prompt"] == PROMPT


def test_standard_output_that_nobody_reads(atman, command):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as unread:
        found = atman(*command, out=unread)
    assert (found.code, "Error" in found.err) == (1, False)


@pytest.mark.parametrize("error", [FULL, UNREAD])
def test_a_lost_message_is_no_lost_result(atman, command, error):
    found = atman(*command, err=Refusing(error))
    assert (found.code, "🦊" in found.out.decode()) == (0, True)


def test_streams_of_a_process():
    """Whatever a file is that is opened later, it is not standard output."""
    code = """
import os, sys
from atman_kernels.cli import main
try:
    main({!r})
finally:
    assert os.open(os.devnull, os.O_RDONLY) > 2
"""

    def atman(shell: str, *arguments: str) -> tuple[int, str]:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", code.format([*arguments])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert atman("<&-", "explain", "--model", "m", "-")[1].startswith("Error: standard input is closed")
    assert atman(">&-", "explain", "--model", "m", "x") == (
        2, "Error: standard output is closed; send it to a file, or to /dev/null if it is not wanted\n"
    )  # fmt: skip
    assert atman("2>&-", "explain", "--model", "m") == (2, "")
    full = (1, "Error: standard output cannot be written: No space left on device\n")
    assert atman(">/dev/full", "--help") == full


def test_prompts_without_an_end(atman, monkeypatch, no_model):
    monkeypatch.setattr("atman_kernels.cli.prompts.MOST_BYTES", 1 << 20)
    with open("/dev/zero") as endless:
        found = atman("explain", "--model", "m", "-", stdin=endless)
    assert found.err == "Error: standard input holds more than 1 MiB; no prompt is that long\n"
    assert "/dev/zero holds more than 1 MiB" in atman("explain", "--model", "m", "--file", "/dev/zero").err
    assert "Is a directory" in atman("explain", "--model", "m", "--file", "/").err


# --- files ---


def test_standard_output_by_any_name_takes_the_result(atman, command):
    for name in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        assert goes_to_standard_output(name)
        assert json.loads(atman(*command, "--json", name).out)["prompt"] == PROMPT


def test_a_page_on_standard_output_is_utf8(atman, model):
    found = atman("explain", *model, "--html", "-", PROMPT, encoding="cp1252")
    assert found.out.startswith(b"<!doctype html>")
    assert "🦊" in found.out.decode("utf-8")


def test_pipes(atman, command):
    """What a shell puts in the place of >(…)."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader:
        found = atman(*command, "--json", f"/dev/fd/{write}")
        os.close(write)
        assert json.loads(reader.read())["prompt"] == PROMPT
    assert found.out


@pytest.mark.parametrize("options", [("--json", "/dev/full"), ("--json", "{pipe}")])
def test_a_result_that_cannot_be_written_is_shown(atman, command, options):
    read, write = os.pipe()
    os.close(read)
    found = atman(*command, *(option.format(pipe=f"/dev/fd/{write}") for option in options))
    os.close(write)
    assert (found.code, "🦊" in found.out.decode()) == (1, True)
    assert "Error: --json: /dev/f" in found.err.splitlines()[-1]
    assert "cannot be written" in found.err


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "must be a file in an existing folder"),
        (".", "must be a file in an existing folder"),
        ("folder/", "must be a file in an existing folder"),
        ("none/file", "must be a file in an existing folder"),
        ("/proc/file", "'/proc/file' cannot be written: "),
        ("loop", "'loop' cannot be written: "),
        ("x" * 300, "cannot be written: File name too long"),
        ("/dev/fd/987654", "cannot be written: Bad file descriptor"),
        ("prompt.txt", "would overwrite --file"),
        ("./link", "would overwrite --file"),
    ],
)
def test_destinations_are_tried_before_the_work(atman, no_model, monkeypatch, tmp_path, option, path, message):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    Path("prompt.txt").write_text(PROMPT)
    os.symlink("prompt.txt", "link")
    commands = ["explain"] if option == "--html" else ["explain", "steer"]
    for command in commands:
        rest = ("--suppress", "dög") if command == "steer" else ()
        found = atman(command, "--model", "m", *rest, "--file", "prompt.txt", option, path)
        assert (found.code, found.err.startswith(f"Error: {option} ")) == (2, True)
        assert message in found.err
        assert ".tmp" not in found.err
    assert Path("prompt.txt").read_text() == PROMPT
    assert sorted(os.listdir()) == ["link", "loop", "prompt.txt"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("-", "-"), "cannot both go to standard output"),
        (("/dev/stdout", "-"), "cannot both go to standard output"),
        (("new", "./new"), "must be different files"),
        (("old", "link"), "must be different files"),
    ],
)
def test_two_results_need_two_places(atman, no_model, monkeypatch, tmp_path, paths, message):
    monkeypatch.chdir(tmp_path)
    Path("old").touch()
    os.symlink("old", "link")
    assert message in atman("explain", "--model", "m", "--html", paths[0], "--json", paths[1], PROMPT).err


def test_demo_and_quality_try_their_files_too(atman, no_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    questions = [{"id": "0", "question": "Who?", "answers": [{"text": "Pilot", "answer_start": 0}]}]
    content = {"data": [{"title": "t", "paragraphs": [{"context": "Pilot barks.", "qas": questions}]}]}
    Path("squad.json").write_text(json.dumps(content))
    quality = ("bench", "quality", "--squad", "squad.json", "--split", "all")
    for arguments, message in (
        (("demo", "--html", "/proc/x.html"), "--html '/proc/x.html' cannot be written"),
        ((*quality, "--json", "/proc/x"), "--json '/proc/x' cannot be written"),
        ((*quality, "--results", "/proc/x"), "--results '/proc/x' cannot be written"),
        ((*quality, "--results", "/dev/null"), "must be a file, which a later run can read"),
        ((*quality, "--json", "squad.json"), "--json would overwrite --squad"),
        ((*quality, "--json", "quality.jsonl"), "--results and --json must be different files"),
    ):
        found = atman(*arguments)
        assert (found.code, message in found.err) == (2, True), found.err


# --- odd values ---

HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--layers", "0-9999999999"), "no model has a layer 9999999999"),
        (("explain", "--layers", HUGE), "no model has a layer"),
        (("explain", "--layers", "5-2"), "the lower number of a range first"),
        (("explain", "--layers", ""), "expected layer numbers"),
        (("explain", "--seed", HUGE), "--seed"),
        (("explain", "--seed", str(2**63)), "--seed"),
        (("explain", "--seed", "-1"), "--seed"),
        (("explain", "--permutations", "-4"), "--permutations"),
        (("explain", "--permutations", "1000000000000"), "--permutations"),
        (("explain", "--factor", "nan"), "'nan' is not a finite number"),
        (("explain", "--factor", "inf"), "--factor"),
        (("explain", "--factor", "1e300"), "--factor"),
        (("steer", "--amplify", "dög", "--amplify-factor", "1e300"), "--amplify-factor"),
        (("explain", "--threshold", "nan"), "'nan' is not a finite number"),
        (("explain", "--top", "-3"), "--top"),
        (("explain", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("steer", "--suppress", "dög", "--layers", "1-99999999999999999999"), "no model has a layer"),
        (("steer", "--suppress", "dög", "--seed", str(2**64)), "--seed"),
        (("steer", "--suppress", "dög", "--factor", "nan"), "'nan' is not a finite number"),
        (("steer", "--amplify", "dög", "--amplify-factor", "inf"), "--amplify-factor"),
        (("steer", "--suppress", "dög", "--temperature", "nan"), "'nan' is not a finite number"),
        (("steer", "--suppress", "dög", "--temperature", "1e-320"), "--temperature"),
        (("steer", "--suppress", "dög", "--beams", "99999999999"), "--beams"),
        (("steer", "--suppress", "dög", "--occurrence", HUGE), "expected a number"),
        (("bench", "ops", "--length", "99999999999"), "--length"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_values_are_refused_in_one_line_before_the_work(atman, no_model, arguments, message):
    found = atman(*arguments, *(() if arguments[0] == "bench" else ("--model", "m", PROMPT)))
    assert (found.code, message in found.err, found.err.count("\n")) == (2, True, 1), found.err


def test_layers_count_no_further_than_models_go(atman, model):
    found = atman("explain", *model, "--layers", "0000000000000000-1", "--json", "-", PROMPT)
    assert json.loads(found.out)["settings"]["layers"] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.gguf", b"GGUF"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": 3}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("model.safetensors", b"\x08"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"null"),
        ("tokenizer_config.json", b"[1"),
        ("chat_template.jinja", b"\xff"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[2:22],
)
def test_damaged_model_files(atman, tiny_llama, tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("ATMAN_KERNELS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        os.symlink(file, folder / file.name)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    source = ("--gguf", folder / name) if name.endswith(".gguf") else ("--model", folder)
    found = atman("explain", *source, "--dtype", "float32", "--quiet", PROMPT)
    assert (found.code, found.err.count("\n")) == (2, 1), found.err
    assert "cannot be loaded" in found.err


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "9" * 5000,
        '{"data": {}}',
        '{"data": [{"paragraphs": [{"context": null, "qas": [{"question": "?"}]}]}]}',
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 3}]}]}]}',
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?", "answers": [{"text": 3}]}]}]}]}',
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?", "answers": {"text": "a"}}]}]}]}',
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?", "answers": '
        '[{"text": "a", "answer_start": "0"}]}]}]}]}',
    ],
    ids=range(8),
)
def test_damaged_questions(atman, no_model, tmp_path, content):
    (tmp_path / "squad.json").write_text(content)
    for arguments in (("explain", "--item", 0), ("bench", "quality", "--split", "all")):
        found = atman(*arguments, "--model", "m", "--squad", tmp_path / "squad.json")
        assert (found.code, found.err.count("\n"), "squad.json" in found.err or "--item" in found.err) == (2, 1, True)


@pytest.mark.parametrize("line", ["3", "null", '{"setting": 3}', '{"setting": "atman"}', "[" * 100_000])
def test_damaged_results(tmp_path, line):
    from atman_kernels.errors import InputError
    from atman_kernels.evaluation.results import ResultFile

    ResultFile(tmp_path / "results", {})
    with (tmp_path / "results").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="is no result file"):
        ResultFile(tmp_path / "results", {})


# --- where the process stands ---


@pytest.mark.parametrize("columns", ["0", "00"])
def test_a_terminal_without_a_width_loses_nothing(atman, command, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    outcome = atman(*command)
    assert outcome.code == 0
    assert len(outcome.out.split()) > 10


@pytest.mark.parametrize("options", [(), ("--traceback",)])
def test_a_working_folder_that_is_gone(tmp_path, options):
    """transformers asks for it as it is imported, so this takes a process of its own."""
    gone = tmp_path / "gone"
    gone.mkdir()
    program = (
        "import os, sys; os.chdir(sys.argv.pop(1)); os.rmdir(os.getcwd()); from atman_kernels.cli import main; main()"
    )
    command = [sys.executable, "-c", program, str(gone), *options, "explain", "--model", "m", "a"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (result.returncode, result.stdout) == (1 if options else 2, "")
    assert "the working folder cannot be read" in result.stderr
    assert ("Traceback" in result.stderr) == bool(options)
