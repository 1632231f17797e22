"""What the command line takes for a text, in bytes as the system hands them over."""

import json
import os
import subprocess
import sys

import pytest

from atman_kernels.cli.prompts import check_texts, read_prompt
from atman_kernels.errors import InputError
from atman_kernels.evaluation.squad import read_items


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([b"explain", b"--model", b"m", b"caf\xe9"], "prompt is no text: character 3 is U+DCE9, the byte 0xE9"),
        ([b"explain", b"--model", b"m", b"--target", b"\xff", b"x"], "--target is no text: character 0 is U+DCFF"),
        ([b"explain", b"--model", b"m", b"--versus", b"a\xff", b"x"], "--versus is no text: character 1 is U+DCFF"),
        ([b"steer", b"--model", b"m", b"--suppress", b"\xe9", b"x"], "--suppress is no text: character 0 is U+DCE9"),
        ([b"steer", b"--model", b"m", b"--suppress", b"x", b"--amplify", b"\xe9", b"x"], "--amplify is no text"),
    ],
)
def test_arguments_that_are_not_utf_8(command, message):
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-c", b"from atman_kernels.cli import main; main()", *command],
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_texts_are_checked_without_a_process(tmp_path):
    check_texts({"--target": None, "--versus": "é🦊", "--suppress": ("a", "b")})
    with pytest.raises(InputError, match="--suppress is no text"):
        check_texts({"--suppress": ("a", "\udcff")})
    with pytest.raises(InputError, match="prompt is no text"):
        read_prompt("\ud83e", None)
    with pytest.raises(InputError, match="prompt is empty"):
        read_prompt(" \n", None)


@pytest.mark.parametrize("place", ["title", "context", "question", "text"])
def test_questions_in_files_hold_whole_characters(tmp_path, place):
    texts = {"title": "t", "context": "a dog", "question": "who?", "text": "dog"} | {place: "\ud83e"}
    entry = {"id": "1", "question": texts["question"], "answers": [{"text": texts["text"], "answer_start": 2}]}
    paragraph = {"context": texts["context"], "qas": [entry]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": texts["title"], "paragraphs": [paragraph]}]}))  # as \ud83e
    with pytest.raises(InputError, match=r"squad.json is not in SQuAD format: .* is no text: character 0 is U\+D83E"):
        read_items(file)
