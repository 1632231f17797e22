"""The result object: its fields, its order, and that what is saved is what is loaded."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from rich.console import Console

from atman_kernels.errors import InputError
from atman_kernels.planning.units import Unit
from atman_kernels.result.data import LOG_PROBABILITY, RISE, AnswerLogprobs, ImageSize
from atman_kernels.result.explanation import Explanation

FIELDS: dict[str, Any] = {
    "prompt": "The sky is",
    "target": " blue!",
    "units": (Unit("The", 0, 3, (0,)), Unit(" sky", 3, 7, (1,)), Unit(" blue", 0, 5, (3,), "target")),
    "scores": torch.tensor([[0.5, -0.25], [2.0, 1.0], [0.0, 0.25]]),
    "target_tokens": (" blue", "!"),
    "base_logprobs": torch.tensor([-0.25, -1.5]),
    "settings": {"mode": "log_additive", "factor": 0.1, "layers": None},
    "stats": {"seconds": 1.5},
}
# Files that the package wrote before these facts had fields of their own, and what each says.
VERSION_1 = Path(__file__).parent / "version_1"
FACTS: dict[str, Any] = {"measure": RISE, "value": LOG_PROBABILITY, "versus": None, "logprobs": None, "images": ()}
OF_VERSION_1: dict[str, dict[str, Any]] = {
    "contrast": {
        "measure": "Shapley value of the log-probability, in nats; of the answer minus of the other answer",
        "versus": "w30",
        "logprobs": AnswerLogprobs(-13.043296813964844, -7.146841049194336),
    },
    "image": {"images": (ImageSize(24, 24),)},
    "cosine": {"measure": "fall of the cosine when suppressed", "value": "cosine"},
}
UNIT = {"text": "The", "start": 0, "end": 3, "token_indices": [0]}


def build(**changes: Any) -> Explanation:
    return Explanation(**FIELDS | changes)


def random_float32(count: int) -> torch.Tensor:
    """Every kind of finite float32: subnormal, huge, negative zero."""
    bits = torch.randint(-(2**31), 2**31, (4 * count,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([-0.0, 1e-45, 3.4028235e38]), values[values.isfinite()]])
    return values[:count]


class TestTotals:
    def test_total_sums_over_the_target(self):
        assert build().total.tolist() == [0.25, 3.0, 0.25]

    def test_top_is_highest_first_and_ties_keep_reading_order(self):
        units = FIELDS["units"]
        assert build().top(3) == [(units[1], 3.0), (units[0], 0.25), (units[2], 0.25)]

    def test_many_ties_keep_reading_order(self):
        units = tuple(Unit("x", 0, 1, (i,)) for i in range(500))
        tied = build(units=units, scores=torch.tensor([[1.0, 0.0], [0.0, 0.0]]).repeat(250, 1)).top(500)
        assert [unit for unit, _ in tied] == [*units[::2], *units[1::2]]

    def test_top_is_by_value_not_by_size(self):
        assert build(scores=torch.tensor([[-9.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).top(1)[0][1] == 1.0

    def test_top_of_more_than_there_are(self):
        assert len(build().top(99)) == 3

    @pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
    def test_top_refuses_what_is_no_count(self, k):
        with pytest.raises(InputError, match="k must be a positive integer"):
            build().top(k)

    def test_repr_is_short_and_names_the_strongest(self):
        text = repr(build(prompt="The sky is" + "x" * 10_000))
        assert "3 units × 2 target tokens" in text
        assert "' sky' +3.00" in text
        assert "log p = -1.75" in text
        assert len(text) < 250


class TestValidation:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompt": b"The sky is"}, "prompt must be a str, got bytes"),
            ({"target": None}, "target must be a str, got NoneType"),
            ({"units": ()}, "units must be a tuple of at least one Unit"),
            ({"units": list(FIELDS["units"])}, "units must be a tuple"),
            ({"units": (Unit("x", 9, 11, (0,)),)}, r"units\[0\] spans characters 9..11.*<= 10"),
            ({"units": (Unit("x", 3, 2, (0,)),)}, r"units\[0\] spans characters 3..2"),
            ({"units": (Unit("x", -1, 2, (0,)),)}, r"units\[0\] spans characters -1..2"),
            ({"units": (Unit("x", 0.0, 2, (0,)),)}, r"units\[0\] spans characters 0.0..2"),
            ({"units": (Unit("x", 0, 7, (0,), "target"),)}, "length of the target"),
            ({"units": (Unit("x", 0, 1, (0,), "answer"),)}, "source must be .* got 'answer'"),
            ({"units": (Unit("x", 0, 1, [0]),)}, r"units\[0\].token_indices must be"),
            ({"units": (Unit("x", 0, 1, (-1,)),)}, r"units\[0\].token_indices must be"),
            ({"units": (Unit(None, 0, 1, (0,)),)}, r"units\[0\].text must be a str"),
            ({"target_tokens": ()}, "target_tokens must be"),
            ({"target_tokens": "ab"}, "target_tokens must be"),
            ({"scores": [[0.0, 0.0]] * 3}, "scores must be a torch.Tensor, got list"),
            ({"scores": torch.zeros(3, 3)}, r"scores must have shape \(3, 2\), got \(3, 3\)"),
            ({"scores": torch.zeros(3, 2, dtype=torch.float64)}, "scores must be float32 on the CPU"),
            (
                {"scores": torch.zeros(3, 2, device="meta")},
                "scores must be float32 on the CPU, got .* on meta",
            ),
            ({"scores": torch.tensor([[0, 0], [0, float("nan")], [0, 0]])}, r"finite, got nan at \[1, 1\]"),
            ({"base_logprobs": torch.zeros(3)}, r"base_logprobs must have shape \(2,\)"),
            (
                {"base_logprobs": torch.tensor([0.0, -float("inf")])},
                r"base_logprobs must be finite, got -inf",
            ),
            ({"settings": None}, "settings must be a dict"),
            ({"settings": {"dtype": torch.float32}}, "settings must hold JSON types only"),
            ({"stats": {"peak": float("nan")}}, "stats must hold JSON types only"),
            ({"measure": None}, "measure must be a str, got NoneType"),
            ({"value": 3}, "value must be a str, got int"),
            ({"versus": b"no"}, "versus must be a str, got bytes"),
            ({"logprobs": (-1.0, -2.0)}, "logprobs must be AnswerLogprobs or None, got tuple"),
            ({"logprobs": AnswerLogprobs(-1.0, float("nan"))}, "logprobs.versus must be a finite number, got nan"),
            ({"logprobs": AnswerLogprobs("x", -2.0)}, "logprobs.target must be a finite number, got 'x'"),
            ({"images": [ImageSize(4, 2)]}, "images must be a tuple of ImageSize in pixels, got"),
            ({"images": ((4, 2),)}, "images must be a tuple of ImageSize in pixels, got"),
            ({"images": (ImageSize(4, 0),)}, "images must be a tuple of ImageSize in pixels, got"),
            ({"images": (ImageSize(True, 2),)}, "images must be a tuple of ImageSize in pixels, got"),
        ],
    )
    def test_each_wrong_field_is_named(self, changes, message):
        with pytest.raises(InputError, match=message):
            build(**changes)

    def test_settings_are_a_copy(self):
        settings = {"layers": [1]}
        explanation = build(settings=settings)
        settings["layers"].append(2)
        assert explanation.settings == {"layers": [1]}

    def test_fields_cannot_be_replaced(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            build().prompt = "other"


class TestFile:
    def test_round_trip_keeps_every_bit(self, tmp_path):
        scores = random_float32(3 * 500).view(3, 500)
        text = 'quotes " \\ \n\r\t\0 \x1b 👩‍🚀 שלום \ud800 </script> \u2028'
        explanation = build(
            prompt=text,
            units=(Unit("", 0, 0, (0,)), Unit("👩", 4, 9, (1, 2)), Unit(text, 0, len(text), (5, 3))),
            scores=scores,
            target_tokens=tuple(f"{text}{i}" for i in range(500)),
            base_logprobs=random_float32(500),
            settings={"nested": {"layers": [1, 2], "name": text}, "factor": 0.1},
        )
        explanation.save(tmp_path / "e.json")
        loaded = Explanation.load(tmp_path / "e.json")
        for field in dataclasses.fields(Explanation):
            saved, found = getattr(explanation, field.name), getattr(loaded, field.name)
            if isinstance(saved, torch.Tensor):
                assert found.dtype == torch.float32
                saved, found = saved.view(torch.int32).tolist(), found.view(torch.int32).tolist()
            assert found == saved, field.name

    @pytest.mark.parametrize("path", sorted(VERSION_1.iterdir()), ids=lambda path: path.stem)
    def test_a_file_of_version_1_is_read_exactly(self, tmp_path, path):
        """Every value of the file, as the package wrote it then, and where it belongs now."""
        content, loaded = json.loads(path.read_text()), Explanation.load(path)
        for name in ("prompt", "target", "settings", "stats"):
            assert getattr(loaded, name) == content[name], name
        for name in ("scores", "base_logprobs", "standard_errors"):
            found = getattr(loaded, name)
            assert (None if found is None else found.tolist()) == content[name], name
        later = {"name": None, "parent": None}
        units = [json.loads(json.dumps(dataclasses.asdict(unit))) for unit in loaded.units]
        assert units == [unit | later for unit in content["units"]]
        assert list(loaded.target_tokens) == content["target_tokens"]
        assert {name: getattr(loaded, name) for name in FACTS} == FACTS | OF_VERSION_1[path.stem]
        loaded.save(tmp_path / "again.json")
        again = json.loads((tmp_path / "again.json").read_text())
        assert content == {name: again[name] for name in content} | {"version": 1}

    def test_facts_have_fields_and_stay_in_the_settings(self, tmp_path):
        facts = OF_VERSION_1["contrast"] | OF_VERSION_1["image"] | {"value": "logit"}
        build(**facts).save(tmp_path / "e.json")
        loaded = Explanation.load(tmp_path / "e.json")
        assert {name: getattr(loaded, name) for name in FACTS} == facts
        assert loaded.settings == FIELDS["settings"] | {
            "measure": facts["measure"],
            "value": "logit",
            "versus": "w30",
            "logprobs": {"target": -13.043296813964844, "versus": -7.146841049194336},
            "images": [{"width": 24, "height": 24}],
        }

    def test_a_field_comes_before_its_setting(self):
        settings = {"versus": "other", "measure": "old", "images": [{"width": 1, "height": 1}]}
        explanation = build(settings=settings, versus="w30", measure="new", images=(ImageSize(24, 24),))
        assert (explanation.versus, explanation.measure, explanation.images) == ("w30", "new", (ImageSize(24, 24),))
        assert explanation.settings["versus"] == "w30"
        assert explanation.settings["images"] == [{"width": 24, "height": 24}]

    def test_file_says_what_it_is(self, tmp_path):
        build().save(str(tmp_path / "e.json"))
        content = json.loads((tmp_path / "e.json").read_text())
        assert (content["format"], content["version"]) == ("atman-explanation", 2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, 'expected "format": "atman-explanation", found \'other\''),
            ({"version": 4}, "version 4 cannot be read, only versions 1 to 3"),
            ({"version": 2.5}, "version 2.5 cannot be read"),
            ({"version": None}, "version None cannot be read"),
            ({"scores": [[0.0, 0.0]]}, r"scores must have shape \(3, 2\), got \(1, 2\)"),
            ({"scores": [[0.0, 0.0], [0.0], [0.0, 0.0]]}, "wrong form"),
            ({"scores": [["a", "b"]] * 3}, "wrong form"),
            ({"scores": [[0.0, float("nan")]] * 3}, "scores must be finite"),
            ({"scores": [[0.0, 1e39]] * 3}, "scores must be finite"),
            ({"scores": None}, "scores must be a list, got NoneType"),
            ({"base_logprobs": 0.0}, "base_logprobs must be a list, got float"),
            ({"target_tokens": "ab"}, "target_tokens must be a list, got str"),
            ({"target_tokens": [1, 2]}, "target_tokens must be"),
            ({"units": {}}, "units must be a list, got dict"),
            ({"units": ["The", " sky", " is"]}, "wrong form"),
            ({"units": [UNIT] * 3}, "source"),
            ({"prompt": None}, "prompt must be a str"),
            ({"stats": []}, "stats must be a dict"),
            ({"images": 3}, "images must be a list, got int"),
            ({"images": [{"width": 3}]}, "wrong form"),
            ({"images": [{"width": 3, "height": "x"}]}, "images must be a tuple of ImageSize"),
            ({"logprobs": {"target": -1.0}}, "wrong form"),
            ({"logprobs": {"target": -1.0, "versus": None}}, "logprobs.versus must be a finite number, got None"),
            *(
                ({"settings": {name: value}}, rf"settings\['{name}'\] must be {expected}, got")
                for name, expected, value in (
                    ("measure", "a str", 3),
                    ("value", "a str", ["logit"]),
                    ("versus", "a str", {"text": "no"}),
                    ("model", "a str", 1.5),
                    ("method", "a str", []),
                    ("mode", "a str", True),
                    ("factor", "a number", "0.1"),
                    ("factor", "a number", False),
                    ("factor", "a number", 10**400),
                    ("logprobs", "a dict of numbers", [1, 2]),
                    ("logprobs", "a dict of numbers", {"target": "x"}),
                )
            ),
            ({"units": [UNIT | {"box": [0, 0, 10**400, 9], "source": "image"}] * 3}, r"units\[0\].box must be"),
        ],
        ids=str,
    )
    def test_each_wrong_field_of_a_file_is_named(self, tmp_path, change, message):
        path = tmp_path / "e.json"
        build().save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=message) as caught:
            Explanation.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        "settings",
        [
            dict.fromkeys(("measure", "value", "versus", "model", "mode", "factor", "logprobs", "images")),
            {"images": 3},
            {"images": [{"width": "x", "height": [1]}]},
            {"units": {"a": []}, "layers": "all", "factor": 10**300, "\ud800": "\ud800\u202e"},
            {"measure": "\ud800", "value": "\ud800", "model": "\ud800"},
            {"versus": "\ud800"},
            json.loads("[" * 900 + "]" * 900) and {"nested": json.loads("[" * 900 + "]" * 900)},
        ],
        ids=lambda settings: repr(settings)[:30],
    )
    @pytest.mark.parametrize("scale", [1.0, 3e38])
    def test_what_loads_can_be_shown(self, tmp_path, settings, scale):
        build(settings={}).save(tmp_path / "e.json")
        content = json.loads((tmp_path / "e.json").read_text()) | {"settings": settings}
        content["scores"] = [[scale, scale], [-scale, scale], [-scale, -scale]]
        content["base_logprobs"] = [-scale, -scale]
        content["units"][0] |= {"source": "image", "box": [0, 0, 2, 2]}
        (tmp_path / "e.json").write_text(json.dumps(content))
        explanation = Explanation.load(tmp_path / "e.json")
        stream = io.StringIO()
        explanation.show(console=Console(file=stream))
        assert stream.getvalue().encode()
        assert explanation.to_html().encode()
        assert repr(explanation)
        for kind in ("bar", "heat"):
            plt.close(explanation.plot(kind).figure)

    @pytest.mark.parametrize("name", list(FIELDS))
    def test_each_missing_field_is_named(self, tmp_path, name):
        path = tmp_path / "e.json"
        build().save(path)
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"missing {name}"):
            Explanation.load(path)

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
        ids=["empty", "cut", "utf16", "deep", "int"],
    )
    def test_what_is_not_json_is_refused(self, tmp_path, data):
        (tmp_path / "e.json").write_bytes(data)
        with pytest.raises(InputError, match=r"e\.json is not a JSON file"):
            Explanation.load(tmp_path / "e.json")

    @pytest.mark.parametrize("data", ["[]", "3", "null", '"atman-explanation"', "{}"])
    def test_json_of_another_kind_is_refused(self, tmp_path, data):
        (tmp_path / "e.json").write_text(data)
        with pytest.raises(InputError, match="not an explanation"):
            Explanation.load(tmp_path / "e.json")

    def test_missing_file_is_reported_as_such(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Explanation.load(tmp_path / "none.json")


def _refuse(path, *_args):
    raise PermissionError(errno.EACCES, "Permission denied", path)


class TestWriting:
    """save and to_html share one way of writing."""

    @pytest.fixture(params=["save", "to_html"])
    def write(self, request):
        return getattr(build(), request.param)

    @pytest.mark.parametrize("failing", ["replace", "fsync"])
    @pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, write, tmp_path, monkeypatch, failing, failure):
        def fail(*_args):
            raise failure

        path = tmp_path / "file"
        path.write_text("old")
        monkeypatch.setattr(os, failing, fail)
        with pytest.raises(failure):
            write(path)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]

    def test_the_file_is_never_seen_half_written(self, write, tmp_path, monkeypatch):
        seen = []
        replace = os.replace

        def watch(source, target):
            seen.append((Path(source).parent, Path(target).exists(), Path(source).stat().st_size))
            replace(source, target)

        monkeypatch.setattr(os, "replace", watch)
        write(tmp_path / "file")
        assert seen == [(tmp_path, False, (tmp_path / "file").stat().st_size)]
        assert [file.name for file in tmp_path.iterdir()] == ["file"]

    def test_a_link_keeps_pointing_at_its_file(self, write, tmp_path):
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() != "old"

    def test_a_device_stays_a_device(self, write, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.set_blocking(reader, True)
            write_end = os.open(pipe, os.O_WRONLY)  # keeps the pipe open while it is read below
            write(pipe)
            assert os.read(reader, 1) in (b"{", b"<")
            os.close(write_end)
        finally:
            os.close(reader)
        assert stat.S_ISFIFO(pipe.stat().st_mode)

    def test_the_usual_permissions(self, write, tmp_path):
        (tmp_path / "ordinary").touch()
        write(tmp_path / "file")
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444])
    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_permissions_and_owner_stay(self, write, tmp_path, mode, umask):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 12345, 54321)
        before, umask_before = path.stat(), os.umask(umask)
        try:
            write(path)
        finally:
            os.umask(umask_before)
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert path.read_text() != "old"

    def test_nobody_else_ever_sees_what_is_private(self, write, tmp_path, monkeypatch):
        path, seen = tmp_path / "file", []
        path.touch(0o600)
        replace, chmod = os.replace, os.fchmod
        monkeypatch.setattr(os, "fchmod", lambda number, mode: (seen.append(os.fstat(number)), chmod(number, mode)))
        monkeypatch.setattr(os, "replace", lambda *files: (seen.append(os.stat(files[0])), replace(*files)))
        write(path)
        assert [stat.S_IMODE(found.st_mode) for found in seen] == [0o600, 0o600]

    def test_other_names_of_a_file_keep_their_content(self, write, tmp_path):
        (tmp_path / "one").write_text("old")
        os.link(tmp_path / "one", tmp_path / "other")
        write(tmp_path / "one")
        assert (tmp_path / "other").read_text() == (tmp_path / "one").read_text() != "old"

    def test_an_open_descriptor_goes_on_where_it_stands(self, write, tmp_path):
        """What a shell makes of `>> file` and /dev/stdout, or of >(…)."""
        with (tmp_path / "file").open("w+") as file:
            file.write("before")
            file.flush()
            write(f"/dev/fd/{file.fileno()}")
            file.write("after")
        text = (tmp_path / "file").read_text()
        assert text.startswith(("before{", "before<"))
        assert text.endswith("after")
        read, end = os.pipe()
        write(f"/proc/self/fd/{end}")
        os.close(end)
        with os.fdopen(read) as reader:
            assert reader.read() in text

    def test_a_file_in_a_folder_where_none_can_be_made(self, write, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("old")
        monkeypatch.setattr("atman_kernels.files.os.open", _refuse)
        write(tmp_path / "file")
        assert (tmp_path / "file").read_text() != "old"
        with pytest.raises(PermissionError, match=r"Permission denied: '.*/new'$"):  # not the hidden one beside it
            write(tmp_path / "new")

    @pytest.mark.parametrize("path", ["/proc/none", "loop", "x" * 300, "null\0byte", "/dev/fd/987654", "/dev/full"])
    def test_what_cannot_be_written_is_named(self, write, tmp_path, monkeypatch, path):
        monkeypatch.chdir(tmp_path)
        os.symlink("loop", "loop")
        with pytest.raises(OSError, match=r"\S") as caught:
            write(path)
        assert caught.value.filename == path
        assert os.listdir() == ["loop"]

    @pytest.mark.parametrize("name", ["", "none/file", "none/"])
    def test_no_place_to_write(self, write, tmp_path, name):
        with pytest.raises(InputError, match="path must be a file in an existing folder"):
            write(f"{tmp_path}/{name}")
