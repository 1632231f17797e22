"""The folder of results: every id once, whatever was cut off, and nobody else's results in it."""

import os
import re
from contextlib import closing, contextmanager

import pytest
import torch

import atman_kernels as ak
from atman_kernels.errors import InputError
from atman_kernels.result.data import AnswerLogprobs
from atman_kernels.scale import results
from atman_kernels.scale.results import Output, read_results, row_of

parquet = pytest.importorskip("pyarrow.parquet")

SETTINGS = {"id_column": "id", "model": "tiny", "options": {"layers": None}}
FACTS = {"dtype": "float32"}


def explanation(seed=0, **more):
    torch.manual_seed(seed)
    return ak.Explanation(
        prompt="The sky is",
        target=" blue é",
        units=(ak.Unit("The", 0, 3, (0,)), ak.Unit(" sky is", 3, 10, (1, 2)), ak.Unit(" blue", 0, 5, (3,), "target")),
        scores=torch.randn(3, 2),
        target_tokens=(" blue", " é"),
        base_logprobs=torch.randn(2),
        settings={"mode": "log_additive", "layers": [1]},
        stats={"seconds": 0.5},
        **more,
    )


def rows(*ids, **more):
    return [
        {"id": i, "error": None, "fingerprint": f"f{i}", "version": "1"} | row_of(explanation(i)) | more for i in ids
    ]


@contextmanager
def opened(folder, settings=SETTINGS, facts=FACTS, id_type=int):
    """The folder as a run has it."""
    with closing(Output(folder, settings, id_type)) as output:
        output.begin(facts)
        yield output


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "out"


def ids(folder):
    """As any reader of Parquet sees them."""
    return parquet.read_table(folder)["id"].to_pylist()


def test_explanations_come_back_as_they_were(folder):
    """Every field of them, whatever it is."""
    originals = [
        explanation(0),
        explanation(1, standard_errors=torch.rand(3), measure="a share", value="logit"),
        explanation(2, exact=(True, False, True), recompute=2),
        explanation(3, versus=" red", logprobs=AnswerLogprobs(-0.5, -2.0)),
    ]
    with opened(folder) as output:
        output.add([rows(i, **row_of(each))[0] for i, each in enumerate(originals)])
        output.add([{"id": 9, "error": "InputError: no", "fingerprint": "f"}])
    *found, failed = read_results(folder)
    assert [(each.id, each.error) for each in found] == [(i, None) for i in range(len(originals))]
    assert failed == (9, None, "InputError: no")
    for each, original in zip(found, originals, strict=True):
        assert each.explanation.to_json() == original.to_json()


def test_a_run_goes_on_where_another_stopped(folder, monkeypatch):
    monkeypatch.setattr(results, "ROWS_PER_PART", 3)
    expected = []
    for start in range(0, 14, 2):
        with opened(folder) as output:
            assert output.fingerprints == {i: f"f{i}" for i in expected}
            output.add(rows(start))
            output.add(rows(start + 1, error="fails"))
        expected += [start, start + 1]
        assert ids(folder) == expected
        assert output.failed == start // 2 + 1
    assert len(list(folder.glob("*.parquet"))) == 5


def test_what_is_written_now_and_then_is_there_before_the_end(folder, monkeypatch):
    monkeypatch.setattr(results, "SECONDS_BETWEEN_WRITES", 0.0)
    with opened(folder) as output:
        for i in range(3):
            output.add(rows(i))
            assert ids(folder) == list(range(i + 1))
    assert [file.name for file in folder.glob("*.parquet")] == ["part-00000.parquet"]


def test_a_part_that_is_gone_is_not_written_over(folder, monkeypatch):
    monkeypatch.setattr(results, "ROWS_PER_PART", 1)
    with opened(folder) as output:
        for i in range(3):
            output.add(rows(i))
    (folder / "part-00001.parquet").unlink()
    with opened(folder) as output:
        assert list(output.fingerprints) == [0, 2]
        output.add(rows(1))
    assert sorted(ids(folder)) == [0, 1, 2]


def test_what_a_killed_process_left_is_no_obstacle(folder):
    with opened(folder) as output:
        output.add(rows(0))
    (folder / ".1234.tmp").write_bytes(b"half a file")
    with opened(folder) as output:
        output.add(rows(1))
    assert ids(folder) == [0, 1]
    assert not list(folder.glob(".*.tmp"))


def test_a_damaged_part_is_named(folder):
    with opened(folder) as output:
        output.add(rows(0))
    (folder / "part-00000.parquet").write_bytes(b"PAR1")
    with (
        pytest.raises(InputError, match=r"part-00000.parquet cannot be read: .*; without it, its rows"),
        opened(folder),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": SETTINGS | {"model": "other"}}, "holds results with model = 'tiny', this run has 'other'"),
        ({"settings": SETTINGS | {"options": {"layers": [1]}}}, "options = {'layers': None}, this run has"),
        ({"settings": SETTINGS | {"new": 1}}, "new = None, this run has 1"),
        ({"facts": {"dtype": "bfloat16"}}, "dtype = 'float32', the model has 'bfloat16'"),
    ],
)
def test_another_run_s_folder_is_left_alone(folder, changed, message):
    with opened(folder) as output:
        output.add(rows(0))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=re.escape(message)), opened(folder, **changed):
        pass
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_other_things_are_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"holds other things \(thesis.txt\)"), opened(folder):
        pass
    assert os.listdir(folder) == ["thesis.txt"]
    with pytest.raises(InputError, match="must be a folder"), opened(folder / "thesis.txt"):
        pass
    with pytest.raises(InputError, match="is no folder of explanations"):
        next(read_results(folder))


def test_two_processes_cannot_write_at_once(folder):
    with opened(folder) as output:
        output.add(rows(0))
        with pytest.raises(InputError, match="is being written to by another process"), opened(folder):
            pass
    with opened(folder) as output:  # and then they can
        assert list(output.fingerprints) == [0]


def test_nothing_is_left_of_a_run_that_never_began(folder):
    Output(folder, SETTINGS, int).close()
    assert not folder.exists()


def test_an_id_column_must_not_hide_a_result(folder):
    with pytest.raises(InputError, match="'scores' is the name of a column of the results"):
        Output(folder, {"id_column": "scores"}, int)


def test_ids_keep_their_name_and_type(folder):
    with opened(folder, SETTINGS | {"id_column": "key"}, id_type=str) as output:
        output.add([{"key": "007", "error": "x", "fingerprint": "f"}])
    assert parquet.read_table(folder)["key"].to_pylist() == ["007"]
    assert next(read_results(folder)).id == "007"
