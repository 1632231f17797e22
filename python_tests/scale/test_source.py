"""Data sets of every kind give the same rows, and what does not fit is one error before anything runs."""

import json

import pytest

from atman_kernels.errors import InputError
from atman_kernels.scale.source import Row, Source

ROWS = [
    {"id": "007", "prompt": 'A "quoted", long\nprompt', "target": " yes"},
    {"id": "8", "prompt": "été — 日本", "target": None},
]


def written(folder, kind, rows=ROWS):
    """The rows as a file of that kind."""
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    elif kind == "csv":
        import csv

        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow")

        table = arrow.Table.from_pylist(rows)
        if kind == "parquet":
            arrow.parquet.write_table(table, file, row_group_size=1)
        else:  # as `datasets` saves it
            file.mkdir()
            with arrow.ipc.new_stream(str(file / "data-00000.arrow"), table.schema) as stream:
                stream.write_table(table)
            (file / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000.arrow"}]}))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "datasets"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    source = Source(written(tmp_path, kind), target_column="target")
    assert list(source.rows()) == [Row(**row) for row in ROWS]
    assert source.fingerprints() == {row["id"]: Row(**row).fingerprint for row in ROWS}
    assert [row.target for row in Source(source.path).rows()] == [None, None]


def test_a_folder_is_its_files_in_order(tmp_path):
    written(tmp_path, "jsonl", ROWS[:1]).rename(tmp_path / "b.jsonl")
    written(tmp_path, "jsonl", ROWS[1:]).rename(tmp_path / "a.jsonl")
    (tmp_path / "_note.txt").touch()
    assert [row.id for row in Source(tmp_path).rows()] == ["8", "007"]


def test_prompts_may_be_chat_messages(tmp_path):
    messages = [{"role": "user", "content": "Why?"}]
    for kind in ("jsonl", "parquet"):
        (row,) = Source(written(tmp_path, kind, [{"id": 1, "prompt": messages}])).rows()
        assert row.prompt == messages


def test_another_prompt_has_another_fingerprint():
    marks = {Row(1, "a", None).fingerprint, Row(1, "b", None).fingerprint, Row(1, "a", "x").fingerprint}
    assert len(marks) == 3
    assert Row(2, "a", None).fingerprint in marks


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"key": 1, "prompt": "a"}], "no column 'id'; there are 'key', 'prompt'"),
        ([{"id": 1, "prompt": "a"}, {"id": 2, "text": "b"}], "line 2: no column 'prompt'; there are 'id', 'text'"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "line 2: the id 1 is there twice"),
        ([{"id": 1, "prompt": "a"}, {"id": "2", "prompt": "b"}], "texts or all integers, got str '2' after int 1"),
        ([{"id": None, "prompt": "a"}], "'id' must be a text or an integer, got None"),
        ([{"id": True, "prompt": "a"}], "'id' must be a text or an integer, got bool True"),
        ([{"id": 2.0, "prompt": "a"}], "'id' must be a text or an integer, got float 2.0"),
        ([{"id": 1 << 63, "prompt": "a"}], "must be an integer of 64 bits"),
        ([{"id": 1, "prompt": "a"}, {"id": 2, "prompt": 7}], "line 2: 'prompt' must be a text or a list of chat"),
        ([{"id": 1, "prompt": ["a", "b"]}], "'prompt' must be a text or a list of chat messages"),
        ([{"id": 1, "prompt": "a", "target": 3}], "'target' must be a text or empty, got int 3"),
        ([{"id": 1, "prompt": "a"}], "no row has a 'target'"),
        ([], "has no rows"),
    ],
)
def test_what_does_not_fit_is_one_error(tmp_path, rows, message):
    source = Source(written(tmp_path, "jsonl", rows), target_column="target")
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        source.fingerprints()


@pytest.mark.parametrize("kind", ["csv", "parquet", "datasets"])
def test_columns_are_looked_for_before_rows(tmp_path, kind):
    source = Source(written(tmp_path, kind), prompt_column="text")
    with pytest.raises(InputError, match="no column 'text'; there are 'id', 'prompt', 'target'"):
        source.fingerprints()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1', "line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 must be a JSON object, got list"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.csv", b"id,prompt\n1,a,b\n", "line 2 has another number of fields"),
        ("a.csv", b"id,prompt\n1\n", "line 2 has another number of fields"),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.arrow/state.json", b"{}", "cannot be read"),
        ("a.txt", b"", "must be one of .parquet"),
        ("a.d/dataset_dict.json", b"{}", "has the splits ; give the folder of one"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Source(file if file.parent == tmp_path else file.parent).fingerprints()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"id_column": 3}, "id_column must be a text, got int 3"),
        ({"id_column": "prompt"}, "must be different columns"),
        ({"target_column": ""}, "target_column is empty"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        Source(**{"path": written(tmp_path, "jsonl"), **arguments})
