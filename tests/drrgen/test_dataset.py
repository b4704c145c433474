"""The files beside the shards: many writers lose nothing, and only what is as it was written is trusted."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from drrgen import dataset, splits, status, temporary
from drrgen.dataset import Line, Rejection
from drrgen.errors import InputError

GOLDEN = Path(__file__).parents[1] / "contract" / "golden" / "1.2" / "tiny.h5"
SETTINGS = '{"grid": "5deg"}'


def make_shard(folder: Path, name: str, patient_id: str) -> Path:
    path = folder / f"{name}.h5"
    shutil.copy(GOLDEN, path)
    with h5py.File(path, "r+") as file:
        file.attrs["patient_id"] = patient_id
        file.attrs["config_json"] = SETTINGS
        file.attrs["config_sha256"] = hashlib.sha256(SETTINGS.encode()).hexdigest()
    return path


def begin(folder: Path, planned: tuple[str, ...] = (), finished: tuple[Line, ...] = (), todo: tuple[str, ...] = ()):
    dataset.begin(folder, "hash", SETTINGS, planned=planned, finished=finished, todo=todo)


def rejection(name: str, *codes: str) -> Rejection:
    return Rejection(f"{name}.h5", name, f"1.{name}", f"ct/{name}", list(codes or ["too-thick"]), "why")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of shards a, b and c, where c is without a line."""
    begin(tmp_path, planned=("a.h5", "b.h5", "c.h5"))
    for name in "abc":
        path = make_shard(tmp_path, name, f"patient {name}")
        if name != "c":
            dataset.add(tmp_path, dataset.line_of(path, seconds=2.5))
    return tmp_path


def test_a_line_says_what_the_shard_is(folder: Path) -> None:
    path = folder / "a.h5"
    with h5py.File(path) as file:
        attributes, largest = file.attrs, file["images/64"]
        expected = {
            "file": "a.h5",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": len(path.read_bytes()),
            "modified_ns": path.stat().st_mtime_ns,
            "patient_id": "patient a",
            "series_uid": file["ct"].attrs["series_uid"],
            "views": len(largest),
            "levels": [64, 32],
            "saturated": int((largest[:] == 65535).sum()),
            "config_sha256": attributes["config_sha256"],
            "dataset": attributes.get("dataset", ""),
            "licence": attributes["licence"],
            "attribution": attributes["attribution"],
            "seconds": 2.5,
        }
    line = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    assert line.pop("finished").endswith("+00:00")
    assert line == expected


def test_a_file_is_trusted_by_its_time_and_else_by_its_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, line = folder / "a.h5", dataset.read(folder).lines["a.h5"]
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # nothing is read
        assert dataset.confirmed(path, line) == line
    os.utime(path)
    touched = dataset.confirmed(path, line)
    assert touched == replace(line, modified_ns=path.stat().st_mtime_ns) != line
    with h5py.File(path, "r+") as file:
        file["images/64"][0, 0, 0] += 1
    assert path.stat().st_size == line.bytes
    assert dataset.confirmed(path, line) is None
    with path.open("ab") as more:
        more.write(b"!")
    os.utime(path, ns=(line.modified_ns, line.modified_ns))
    assert dataset.confirmed(path, line) is None


def test_beginning_adds_what_was_found_and_drops_what_is_made_again(folder: Path) -> None:
    dataset.reject(folder, rejection("d"), rejection("e"))
    before = dataset.read(folder)
    found = dataset.line_of(folder / "c.h5")
    stale = replace(before.lines["b.h5"], sha256="0" * 64)
    begin(folder, planned=("c.h5", "d.h5"), finished=(found, stale), todo=("a.h5", "d.h5"))
    after = dataset.read(folder)
    assert after.lines == {"b.h5": before.lines["b.h5"], "c.h5": found}
    assert after.rejected.keys() == {"e.h5"}
    assert after.planned == {"a.h5", "b.h5", "c.h5", "d.h5"}
    assert after.patients.keys() == {
        "patient a",
        "patient b",
        "patient c",
    }  # who reads a.h5 meanwhile finds its patient


def test_only_the_file_that_is_there_gets_its_line(folder: Path) -> None:
    """Of two that have made the same shard, the first comes late; the second adds what is there."""
    path = folder / "c.h5"
    first = dataset.line_of(path, seconds=1)
    shutil.copy(GOLDEN, path)
    dataset.add(folder, first)
    assert "c.h5" not in dataset.read(folder).lines
    second = dataset.line_of(path, seconds=1)
    path.unlink()
    dataset.add(folder, second)
    assert "c.h5" not in dataset.read(folder).lines


def test_a_series_is_rejected_until_it_is_rendered(folder: Path) -> None:
    dataset.reject(folder, rejection("a"), rejection("c"))
    assert dataset.read(folder).rejected.keys() == {"c.h5"}
    dataset.reject(folder, rejection("c", "incomplete", "too-thick"))
    assert dataset.read(folder).rejected["c.h5"].codes == ["incomplete", "too-thick"]
    dataset.add(folder, dataset.line_of(folder / "c.h5"))
    assert dataset.read(folder).rejected == {}
    assert (folder / "rejected.jsonl").read_text() == ""


def test_the_data_set_is_described_by_its_lines(folder: Path) -> None:
    dataset.reject(folder, rejection("d"))
    told = json.loads((folder / "dataset.json").read_text())
    lines = dataset.read(folder).lines.values()
    assert told["config"] == {"grid": "5deg"}
    counts = told["counts"]
    assert {name: counts[name] for name in ("planned", "rejected", "patients", "shards")} == {
        "planned": 3,
        "rejected": 1,
        "patients": 2,
        "shards": 2,
    }
    assert (
        counts["views"] == sum(line.views for line in lines) == sum(one["views"] for one in counts["splits"].values())
    )
    assert told["bytes"] == sum(path.stat().st_size for path in (folder / "a.h5", folder / "b.h5"))
    assert told["statistics"]["seconds"] == 5.0
    with h5py.File(GOLDEN) as file:
        assert told["licence"] == [file.attrs["licence"]]


def _add_ten(folder: Path, number: int) -> None:
    for count in range(10):
        name = f"{number}-{count}"
        shutil.copy(GOLDEN, folder / f"{name}.h5")
        dataset.add(folder, replace(dataset.line_of(folder / f"{name}.h5", seconds=1.0), patient_id=name))
    dataset.reject(folder, rejection(f"no {number}"))


def test_no_line_is_lost_among_many_writers_and_readers_see_whole_files(tmp_path: Path) -> None:
    begin(tmp_path)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_ten, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    counts = [0]
    while any(writer.is_alive() for writer in writers):
        counts.append(len(dataset.read(tmp_path).lines))  # raises where it finds half a file
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert counts == sorted(counts)
    records = dataset.read(tmp_path)
    names = {f"{number}-{count}" for number in range(4) for count in range(10)}
    assert records.lines.keys() == {f"{name}.h5" for name in names}
    assert records.rejected.keys() == {f"no {number}.h5" for number in range(4)}
    assert records.patients == {name: splits.split(name, "hash") for name in names}
    listed = [json.loads(line)["file"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert listed == sorted(listed)
    assert json.loads((tmp_path / "dataset.json").read_text())["counts"]["shards"] == 40


def test_a_writer_that_is_killed_leaves_whole_files_and_no_lock(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from drrgen import dataset as d; f = Path(sys.argv[1])\n"
    code += "while True: d.add(f, d.line_of(f / 'c.h5', seconds=1)); print(flush=True)"
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        assert dataset.read(folder).lines.keys() == {"a.h5", "b.h5", "c.h5"}
    dataset.add(folder, dataset.line_of(folder / "c.h5", seconds=1))
    temporary.sweep(folder)
    shown = {"a.h5", "b.h5", "c.h5", "manifest.jsonl", "rejected.jsonl", "splits.json", "dataset.json"}
    assert {path.name for path in folder.iterdir()} == shown | {".lock"}


def test_a_file_system_without_locks_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"no locks on this file system .*choose an --out") as refusal:
        dataset.add(folder, dataset.line_of(folder / "c.h5"))
    assert refusal.value.errno == errno.ENOLCK
    assert "c.h5" not in dataset.read(folder).lines


DAMAGE = [
    ("manifest.jsonl", lambda text: text[:-20], "line 2", "delete this line"),
    (
        "manifest.jsonl",
        lambda text: text.replace('"views": ', '"views": "many", "": ', 1),
        "line 1: views is 'many'",
        "",
    ),
    ("manifest.jsonl", lambda text: text.replace('"sha256"', '"sha255"', 1), "line 1: no sha256", "delete this line"),
    ("manifest.jsonl", lambda text: text.replace("[64, 32]", '[64, "32"]', 1), "line 1: levels", "delete this line"),
    ("manifest.jsonl", lambda text: text.replace("+00:00", ""), "line 1: finished", "delete this line"),
    ("manifest.jsonl", lambda text: text + "[1]\n", "line 3: not an object", "delete this line"),
    ("rejected.jsonl", lambda text: text + "no JSON\n", "line 2", "delete this line"),
    ("rejected.jsonl", lambda text: text.replace('["too-thick"]', "[]"), "line 1: codes", "delete this line"),
    ("splits.json", lambda text: text[: len(text) // 2], "line", "delete the file"),
    ("splits.json", lambda text: "[]", "line 1", "delete the file"),
    ("splits.json", lambda text: text.replace("train", "tarin"), "train, val, test", "delete the file"),
    ("splits.json", lambda text: '{"rule": "hash"}', "patients", "delete the file"),
    ("dataset.json", lambda text: "", "line 1", "delete the file"),
    ("dataset.json", lambda text: text.replace('"schema_version": "1.', '"schema_version": "2.'), "2.0", "install"),
    ("dataset.json", lambda text: text.replace('"drr-dataset"', '"other"'), "other", "choose another folder"),
    ("dataset.json", lambda text: text.replace('"planned": [', '"planned": [1,'), "planned", "delete the file"),
]


@pytest.mark.parametrize(("name", "damage", "what", "cure"), DAMAGE)
def test_damage_is_one_line_with_its_place_and_the_cure(folder: Path, name: str, damage, what: str, cure: str) -> None:
    dataset.reject(folder, rejection("d"))
    before = {path: path.read_text() for path in folder.glob("*.json*")}
    path = folder / name
    before[path] = damage(before[path])
    path.write_text(before[path])
    for attempt in (lambda: dataset.read(folder), lambda: begin(folder)):
        with pytest.raises(InputError) as refusal:
            attempt()
        line = str(refusal.value)
        assert str(path) in line
        assert what in line
        assert cure in line
        assert "\n" not in line
    assert {path: path.read_text() for path in folder.glob("*.json*")} == before  # nothing is made worse


def test_fields_of_later_versions_are_passed_over(folder: Path) -> None:
    before = dataset.read(folder)
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text().replace("{", '{"mood": "good", ', 1))
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"1.0"', '"1.7"').replace("{", '{"mood": "good", ', 1))
    assert dataset.read(folder) == before


def test_another_rule_is_refused_and_changes_nothing(folder: Path) -> None:
    before = {path: path.read_text() for path in folder.glob("*.json*")}
    with pytest.raises(InputError, match=r"splits.json: .* by the rule hash, not lidc-idri-drr: give --splits hash"):
        dataset.begin(folder, "lidc-idri-drr", SETTINGS, planned=["x.h5"], finished=[], todo=["a.h5"])
    assert {path: path.read_text() for path in folder.glob("*.json*")} == before


def test_adding_cases_moves_nobody(folder: Path) -> None:
    path = folder / "splits.json"
    by_hand = json.loads(path.read_text())
    by_hand["patients"]["patient a"] = other = "test" if by_hand["patients"]["patient a"] == "train" else "train"
    path.write_text(json.dumps(by_hand))
    dataset.add(folder, dataset.line_of(folder / "c.h5"))
    patients = json.loads(path.read_text())["patients"]
    assert patients["patient a"] == other
    assert patients["patient b"] == by_hand["patients"]["patient b"]
    assert patients.keys() == {"patient a", "patient b", "patient c"}


def test_splits_that_are_gone_are_not_guessed(folder: Path) -> None:
    """The rule that the folder had is not known any more; the next run says it."""
    (folder / "splits.json").unlink()
    with pytest.raises(InputError, match=r"splits\.json is gone"):
        dataset.add(folder, dataset.line_of(folder / "c.h5"))
    dataset.begin(folder, "lidc-idri-drr", SETTINGS, planned=[], finished=[], todo=[])
    assert dataset.read(folder).patients.keys() == {"patient a", "patient b"}


def test_the_published_patients_are_the_test_of_their_rule() -> None:
    names = [f"LIDC-IDRI-{number:04d}" for number in range(1, 1013)]
    by_rule = {name: splits.split(name, "lidc-idri-drr") for name in names}
    assert {name for name in names if by_rule[name] == "test"} == splits.PUBLISHED_TEST
    assert len(splits.PUBLISHED_TEST) == 16
    others = set(names) - splits.PUBLISHED_TEST
    assert all((by_rule[name] == "val") == (splits.split(name, "hash") == "val") for name in others)
    with pytest.raises(InputError, match="hash, lidc-idri-drr"):
        splits.split("LIDC-IDRI-0001", "random")


def test_status_counts_what_is_there_and_names_what_is_not(folder: Path) -> None:
    """a is there, b is cut, c is without a line, d was rejected, e is missing, f is no shard."""
    line = dataset.read(folder).lines["b.h5"]
    with (folder / "b.h5").open("r+b") as file:
        file.truncate(line.bytes - 1)
    begin(folder, planned=("d.h5", "e.h5"))
    dataset.reject(folder, rejection("d", "incomplete", "too-thick"))
    (folder / "f.h5").write_text("no shard")
    left = folder / ".x.h5.tmp-elsewhere-1"
    left.touch()
    os.utime(left, (0, 0))
    temporary.name_for(folder / "y.h5").touch()
    found = status.status(folder)
    assert (found.shards, found.patients, found.views) == (2, 2, 2 * line.views)
    assert found.bytes == sum((folder / name).stat().st_size for name in ("a.h5", "c.h5"))
    assert found.rejected == {"incomplete": 1}
    assert found.missing == ["b.h5", "e.h5", "f.h5"]
    assert found.damaged == ["b.h5", "f.h5"]
    assert found.unlisted == ["c.h5"]
    assert found.left_over == [left.name]
    assert not found.is_done
    total = {what: sum(one[what] for one in found.splits.values()) for what in ("patients", "shards", "views")}
    assert total == {"patients": 2, "shards": 2, "views": found.views}


def test_what_an_overwriting_run_has_not_come_to_is_missing(folder: Path) -> None:
    """It drops the lines of all that it will make again; a shard of the settings before is none of its own."""
    dataset.begin(folder, "hash", '{"grid": "15deg"}', planned=("a.h5", "b.h5", "c.h5"), finished=(), todo=("a.h5",))
    found = status.status(folder)
    assert (found.missing, found.damaged, found.unlisted) == (["a.h5", "c.h5"], [], [])


def test_the_rate_is_of_the_time_in_which_anyone_worked(folder: Path) -> None:
    """Two processes, 100 s to a shard, side by side, are 72 shards an hour; a day without work changes nothing."""
    lines = []
    for name, day in (("p", 1), ("q", 1), ("r", 2), ("s", 2)):
        line = dataset.line_of(make_shard(folder, name, name), seconds=100)
        lines.append(replace(line, views=50, finished=f"2025-01-0{day}T12:00:00+00:00"))
    (folder / "manifest.jsonl").unlink()
    begin(folder, planned=[f"{number}.h5" for number in range(36)], finished=lines)
    found = status.status(folder)
    assert found.shards_per_hour == pytest.approx(72)
    assert found.views_per_s == pytest.approx(1.0)
    assert len(found.missing) == 36
    assert found.hours_left == pytest.approx(0.5)
