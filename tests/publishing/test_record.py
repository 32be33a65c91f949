import hashlib
import json
import os
import time
import tracemalloc

import pytest

from hf_ntp import read_record
from hf_ntp.publishing.record import RecordError, file_digests, validate_record, write_record
from hf_ntp.publishing.strict_json import strict_json

from .folders import minimal_record


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_bytes(b"")
    write_record(tmp_path, minimal_record())
    return tmp_path


@pytest.fixture
def record(folder):
    return read_record(folder)


def put(record, place, value):
    for key in place[:-1]:
        record = record[key]
    record[place[-1]] = value


def test_round_trip(record):
    expected = {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "sub/notes.txt": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert record == {**minimal_record(), "files": expected}


def test_digests_leave_out_record_signature_and_what_downloads_add(folder):
    (folder / "model.sig").write_text("x")
    (folder / ".gitattributes").write_text("x")
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.metadata").write_text("x")
    assert set(file_digests(folder)) == {"model.safetensors", "sub/notes.txt"}
    (notes / "surprise.json").write_text("{}")
    assert ".cache/huggingface/download/surprise.json" in file_digests(folder)


def test_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no authorization\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema_version"], 1, "schema_version 1; needed: 2"),
        (["schema_version"], 3, "schema_version 3; needed: 2"),
        (["schema_version"], 2.0, r"schema_version 2\.0; needed: 2"),
        (["schema_version"], "2" * 1000, "schema_version '2{60,80};"),
        (["source_accuracy", "after"], 1.5, "source_accuracy/after"),
        (["source_accuracy", "after"], "0.9", "source_accuracy/after"),
        (["files"], {"../evil.safetensors": "a" * 64}, "files"),
        (["files"], {"/etc/passwd": "a" * 64}, "files"),
        (["files"], {"model.safetensors": "short"}, r"files/model\.safetensors"),
        (["authorized_domains"], [], "authorized_domains"),
        (["surprise"], 1, "surprise"),
        (["evidence", 0, "worst_case", "slc_auc"], 2, "evidence/0/worst_case/slc_auc"),
    ],
)
def test_values_that_do_not_fit_the_schema(record, place, value, message):
    put(record, place, value)
    with pytest.raises(RecordError, match=message):
        validate_record(record)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["evidence", 0, "worst_case", "attack"], "nonexistent", "nonexistent is no attack on scans"),
        (["evidence", 0, "worst_case", "slc_auc"], -0.9, "full is no attack on scans, or not the best one"),
        (["evidence", 0, "domain"], "elsewhere", "measurements are of elsewhere"),
        (["authorized_domains", 0, "name"], "scans", "named twice"),
        (["sparsity", "achieved"], 0.99, r"700 zeros of 1000 weights, all together a share of 0\.99"),
        (["sparsity", "prunable_weights"], 999, "as many weights as all together"),
    ],
)
def test_records_that_contradict_themselves(record, place, value, message):
    put(record, place, value)
    with pytest.raises(RecordError, match=message):
        validate_record(record)


def test_every_required_field_is_required(record):
    for key in list(record):
        with pytest.raises(RecordError, match="schema"):
            validate_record({k: v for k, v in record.items() if k != key})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["source_accuracy", "after"], float("nan"), "finite"),
        (["method", "settings", "rho"], float("inf"), "finite"),
        (["method", "settings", "rho"], 10**60, "61 characters"),
        (["method", "settings", "rho"], object(), "JSON"),
        (["terms", "text"], "\ud800", "JSON"),
        (["terms", "text"], "x" * (5 << 20), "larger than"),
        (["schema_version"], 1, "needed: 2"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, place, value, message):
    (tmp_path / "model.safetensors").write_bytes(b"")
    record = minimal_record()
    put(record, place, value)
    with pytest.raises(RecordError, match=message):
        write_record(tmp_path, record)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "schema_version None"),
        (b"null", "schema_version None"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"schema_version": 2, "schema_version": 2}', "'schema_version' stands there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands there twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 3_000_000 + b"}", "3000000 characters"),
        (b'{"a": 0.' + b"1" * 3_000_000 + b"}", "3000002 characters"),
        (b"[" * 2_000_000, "nested deeper"),
        (b'{"a":' * 500_000, "nested deeper"),
        (b"[" * 100 + b"]" * 100, "nested deeper than 64 levels"),
        (b"[" + b"0," * 2_000_000 + b"0]", "more than 300000 values"),
        (b"[" + b"{}," * 1_000_000 + b"0]", "more than 300000 values"),
        (b"\xff\xfe{}", "utf-8"),
        ('{"schema_version": 2}'.encode("utf-16"), "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\x80\x04\x95", "utf-8"),
        (b" " * (100 << 20), "larger than"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value.replace(" ", "_"),
)
def test_files_that_are_not_records(tmp_path, content, message):
    (tmp_path / "authorization.json").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(RecordError, match=message):
        read_record(tmp_path)
    assert time.perf_counter() - start < 5


def test_reading_needs_bounded_memory(tmp_path):
    with open(tmp_path / "authorization.json", "wb") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="larger than"):
            read_record(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_largest_records_are_checked_quickly(record):
    record["evidence"][0]["seeds"] = list(range(290_000))
    start = time.perf_counter()
    validate_record(strict_json(json.dumps(record).encode()))
    assert time.perf_counter() - start < 15


def test_depth_is_counted_to_the_last_level():
    assert strict_json(b"[" * 63 + b"]" * 63)
    with pytest.raises(ValueError, match="nested deeper"):
        strict_json(b"[" * 65 + b"]" * 65)


def test_a_link_is_not_a_record(folder, tmp_path):
    elsewhere = folder / "elsewhere.json"
    (folder / "authorization.json").rename(elsewhere)
    (folder / "authorization.json").symlink_to(elsewhere)
    with pytest.raises(RecordError, match="symbolic link"):
        read_record(folder)
    assert read_record(folder, links_into=tmp_path)["schema_version"] == 2
    with pytest.raises(RecordError, match="needed: one into"):
        read_record(folder, links_into=folder / "sub")


def test_a_pipe_a_device_and_a_folder_are_not_records(tmp_path):
    path = tmp_path / "authorization.json"
    os.mkfifo(path)
    with pytest.raises(RecordError, match="pipe"):
        read_record(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(RecordError, match="device"):
        read_record(tmp_path, links_into="/dev")
    path.unlink()
    path.mkdir()
    with pytest.raises(RecordError, match="regular file"):
        read_record(tmp_path)


def test_messages_hold_no_control_characters(record):
    record["sparsity"]["layers"]["\x1b[2Jall is well\n"] = 1
    with pytest.raises(RecordError) as caught:
        validate_record(record)
    assert str(caught.value).isprintable()


def test_records_are_not_written_over_links(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(RecordError, match="symbolic link"):
        write_record(tmp_path, minimal_record())
