import json

import pytest

from hf_ntp import read_record
from hf_ntp.publishing.record import RecordError, validate_record, weight_digests, write_record
from hf_ntp.run_folder import file_digest


@pytest.fixture
def folder(tmp_path, record):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    record["weights"] = weight_digests(tmp_path)
    write_record(tmp_path, record)
    return tmp_path


def test_round_trip(folder, record):
    assert read_record(folder) == record


def test_digests_by_hand(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_changed_missing_and_added_weights_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(RecordError, match=r"changed, missing or added: model\.safetensors"):
        read_record(folder)
    read_record(folder, check_weights=False)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(RecordError, match=r"other\.safetensors"):
        read_record(folder)


def test_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no authorization\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema_version"], 2, "schema_version 2; needed: 1"),
        (["source_accuracy", "after"], 1.5, "source_accuracy/after"),
        (["source_accuracy", "after"], "0.9", "source_accuracy/after"),
        (["weights"], {"../evil.safetensors": "a" * 64}, "weights"),
        (["weights"], {"model.safetensors": "short"}, r"weights/model\.safetensors"),
        (["authorized_domains"], [], "authorized_domains"),
        (["surprise"], 1, "surprise"),
        (["evidence", "slc_auc", "unprotected", "normalized"], 2, "evidence/slc_auc/unprotected/normalized"),
    ],
)
def test_values_that_do_not_fit_the_schema(record, place, value, message):
    at = record
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(RecordError, match=message):
        validate_record(record)


def test_every_required_field_is_required(record):
    for key in list(record):
        with pytest.raises(RecordError, match="schema"):
            validate_record({k: v for k, v in record.items() if k != key})


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"schema_version": NaN}'])
def test_files_that_are_not_records(tmp_path, text):
    (tmp_path / "authorization.json").write_text(text)
    with pytest.raises(RecordError):
        read_record(tmp_path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path, record):
    record["source_accuracy"]["after"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, record)
    assert not list(tmp_path.iterdir())


def test_huge_files_are_refused(tmp_path):
    (tmp_path / "authorization.json").write_text(json.dumps({"schema_version": 1, "x": "y" * (5 << 20)}))
    with pytest.raises(RecordError, match="larger than"):
        read_record(tmp_path)
