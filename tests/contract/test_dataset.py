"""What drrgen writes beside the shards is what the document says, and svdrr trains on whom it says."""

import json
import re
import shutil
from pathlib import Path
from types import NoneType

import pytest
from tests.contract import schema

import drrgen.dataset
import drrgen.errors
import drrgen.splits
import svdrr.data
import svdrr.errors
import svdrr.shards

FILES = ("manifest.jsonl", "rejected.jsonl", "splits.json", "dataset.json")
KINDS = {
    "string": (str,),
    "int": (int,),
    "float or null": (float, NoneType),
    "object": (dict,),
    "list of int": (list,),
    "list of string": (list,),
}


def rows() -> list[tuple[str, str, str, str]]:
    """(file, field, type, required) of every field in the document."""
    found = schema.tables("shard-schema.md")["file", "field", "type", "meaning", "required"]
    return [
        (file.strip("`"), field, kind, required)
        for file, names, kind, _, required in found
        for field in re.findall(r"`(\w+)`", names)
    ]


@pytest.fixture
def folder(shard_path: Path, tmp_path: Path) -> Path:
    """What `render` has written, and a rejection."""
    folder = tmp_path / "shards"
    shutil.copytree(shard_path.parent, folder)
    drrgen.dataset.reject(
        folder, drrgen.dataset.Rejection("X.h5", "X", "1.2", "ct/x", ["too-thick"], "too-thick: 9 mm")
    )
    return folder


def objects(path: Path) -> list[dict]:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def write(path: Path, found: list[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))


def test_drrgen_writes_the_fields_of_the_document_and_no_others(folder: Path) -> None:
    assert {file for file, *_ in rows()} == set(FILES)
    for name in FILES:
        fields = {field: kind for file, field, kind, _ in rows() if file == name}
        (found,) = objects(folder / name)
        assert found.keys() == fields.keys()
        for field, kind in fields.items():
            assert isinstance(found[field], KINDS[kind]), field
            if kind.startswith("list of"):
                assert all(isinstance(one, KINDS[kind.removeprefix("list of ")]) for one in found[field]), field


@pytest.mark.parametrize(
    ("name", "field"), [(file, field) for file, field, _, required in rows() if required == "MUST"]
)
def test_what_must_be_there_is_missed(folder: Path, name: str, field: str) -> None:
    found = objects(folder / name)
    del found[0][field]
    write(folder / name, found)
    with pytest.raises(drrgen.errors.InputError, match=re.escape(str(folder / name))):
        drrgen.dataset.read(folder)


def test_what_may_be_there_is_not_missed(folder: Path) -> None:
    optional = [(file, field) for file, field, _, required in rows() if required == "MAY"]
    assert len(optional) > 5
    before = drrgen.dataset.read(folder)
    for name, field in optional:
        found = objects(folder / name)
        del found[0][field]
        write(folder / name, found)
    after = drrgen.dataset.read(folder)
    assert (after.lines, after.rejected, after.patients) == (before.lines, before.rejected, before.patients)


def test_the_rules_are_those_of_the_document() -> None:
    table = schema.tables("shard-schema.md")["rule", "`test`", "`val`", "`train`"]
    assert [row[0].strip("`") for row in table] == list(drrgen.splits.RULES)
    numbers = re.findall(r"\b\d{4}\b", table[1][1])
    assert {f"LIDC-IDRI-{number}" for number in numbers} == drrgen.splits.PUBLISHED_TEST
    names = [f"LIDC-IDRI-{number:04d}" for number in range(1, 1019)]
    assert [drrgen.splits.split(name, "hash") for name in names] == [svdrr.data.split(name) for name in names]


def test_svdrr_trains_on_whom_the_folder_says(folder: Path) -> None:
    """By the rule of the folder, whatever it is; by the hash where the folder says nothing."""
    (shard,) = svdrr.shards.open_folder(folder)
    path = folder / "splits.json"
    for split in drrgen.splits.SPLITS:
        path.write_text(json.dumps({"rule": "ours", "patients": {shard.patient_id: split}, "mood": "good"}))
        assert svdrr.data.splits([shard]) == [split]
    path.unlink()
    assert svdrr.data.splits([shard]) == [drrgen.splits.split(shard.patient_id, "hash")]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"rule": "hash", "patients": {}}', "does not list patient PHANTOM-0000"),
        ('{"rule": "hash", "patients": {"PHANTOM-0000": "tarin"}}', "train, val, test"),
        ('{"rule": "hash"}', "delete it"),
        ('{"rule": "hash", "pati', "delete it"),
        ("[]", "delete it"),
        ('{"patients": "all"}', "delete it"),
    ],
)
def test_svdrr_refuses_splits_that_leave_a_patient_out(folder: Path, text: str, what: str) -> None:
    (folder / "splits.json").write_text(text)
    with pytest.raises(svdrr.errors.InputError, match=what) as refusal:
        svdrr.data.splits(svdrr.shards.open_folder(folder))
    assert str(folder / "splits.json") in str(refusal.value)
    assert "\n" not in str(refusal.value)
