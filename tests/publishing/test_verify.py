import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification

from hf_ntp import read_record, sign_folder, verify_folder
from hf_ntp.publishing.errors import RecordError, VerificationError
from hf_ntp.publishing.record import write_record

from .folders import make_folder, make_keys, minimal_record

NOT_RECORDED = ("authorization.json", "model.sig")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Signed folder and public key; tests put back what they change, or copy it."""
    private, public = make_keys(tmp_path_factory.mktemp("keys"))
    folder = make_folder(tmp_path_factory.mktemp("published"))
    sign_folder(folder, private)
    return folder, public


@pytest.fixture(scope="module")
def signing_key(published):
    return published[1].with_name("key.pem")


@pytest.fixture
def copy(published, tmp_path):
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


@contextmanager
def holding(path, content):
    """Let the file hold this for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def refuses(folder, key=None, match=None):
    with pytest.raises(VerificationError, match=match):
        verify_folder(folder, key)


def test_a_published_folder_passes(published):
    folder, key = published
    count = sum(path.name != "model.sig" for path in folder.iterdir())
    for public_key in (None, key):
        found = verify_folder(folder, public_key)
        assert found == (read_record(folder), public_key is not None, count)
    AutoModelForImageClassification.from_pretrained(folder)


def test_what_the_hub_and_downloads_add_is_no_change(copy, published):
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    notes = copy / ".cache" / "huggingface"
    (notes / "download").mkdir(parents=True)
    (notes / "trees").mkdir()
    notes_of_a_download = ("download/README.md.metadata", "download/README.md.lock", f"trees/{'0d' * 20}.json")
    for name in (".gitignore", "CACHEDIR.TAG", *notes_of_a_download):
        (notes / name).write_text("")
    assert verify_folder(copy, published[1]).signed
    (notes / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    refuses(copy, match=r"added: \.cache/huggingface/model\.safetensors")


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file(published, data):
    folder, key = published
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with holding(path, bytes(content)):
        refuses(folder, key)
        if path.name not in NOT_RECORDED:
            refuses(folder)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_byte_of_the_signature(published, data):
    """Base64, JSON and the parts that are not signed leave no room."""
    folder, key = published
    path = folder / "model.sig"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with holding(path, bytes(content)):
        refuses(folder, key)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_files_cut_or_continued(published, data):
    folder, key = published
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    other = data.draw(
        st.one_of(
            st.integers(0, len(content) - 1).map(lambda size: content[:size]),
            st.binary(min_size=1, max_size=9).map(lambda more: content + more),
        )
    )
    with holding(path, other):
        refuses(folder, key)
        if path.name not in NOT_RECORDED:
            refuses(folder)


def places(value, place=()):
    """Path of every number in a JSON value."""
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*place, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place


def test_any_number_of_the_record(published):
    folder, key = published
    record = read_record(folder)
    path = folder / "authorization.json"
    assert path.read_text() == json.dumps(record, indent=2) + "\n"
    found = list(places(record))
    assert len(found) == 39
    for place in found:
        edited = json.loads(json.dumps(record))
        at = edited
        for part in place[:-1]:
            at = at[part]
        at[place[-1]] = at[place[-1]] / 2 if isinstance(at[place[-1]], float) else at[place[-1]] + 1
        with holding(path, (json.dumps(edited, indent=2) + "\n").encode()):
            refuses(folder, key)


def test_an_edited_record_is_found_by_its_signature_only(copy, published):
    record = {**minimal_record(), "terms": {"license": "mit", "text": "Everything is allowed."}}
    write_record(copy, record)
    assert not verify_folder(copy).signed
    refuses(copy, published[1], r"Hash mismatch for 'authorization\.json'")


def test_any_file_missing(published):
    folder, key = published
    for path in sorted(folder.iterdir()):
        away = folder.parent / f"{path.name}.away"
        path.rename(away)
        try:
            refuses(folder, key, rf"holds no {path.name}" if path.name in NOT_RECORDED else f"missing: {path.name}")
            if path.name != "model.sig":
                refuses(folder)
        finally:
            away.rename(path)


@settings(max_examples=25, deadline=None)
@given(
    name=st.from_regex(r"[a-z0-9_]{1,8}(/[A-Za-z]{1,8})?\.(json|md|txt|safetensors|png|yaml|py|bin)", fullmatch=True),
    content=st.binary(max_size=20),
)
def test_any_file_added(published, name, content):
    folder, key = published
    path = folder / name
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        refuses(folder, key)
        refuses(folder)
    finally:
        path.unlink()
        if path.parent != folder:
            path.parent.rmdir()


def test_a_renamed_file(copy, published):
    (copy / "slc.png").rename(copy / "figure.png")
    for key in (None, published[1]):
        refuses(copy, key, r"missing: slc\.png; added: figure\.png")


def test_each_kind_of_change_is_named(copy):
    (copy / "README.md").write_text("card")
    (copy / "slc.png").rename(copy / "figure.png")
    refuses(copy, match=r"changed: README\.md; missing: slc\.png; added: figure\.png\. Needed")


def test_swapped_weights(copy, published, tmp_path):
    other = make_folder(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", copy / "model.safetensors")
    for key in (None, published[1]):
        refuses(copy, key, r"changed: model\.safetensors")


def test_the_folder_of_another_owner(published, tmp_path):
    (tmp_path / "keys").mkdir()
    private, _ = make_keys(tmp_path / "keys")
    folder = make_folder(tmp_path / "other", seed=1)
    sign_folder(folder, private)
    refuses(folder, published[1], "Key mismatch")


def test_an_old_signature(copy, published):
    (copy / "README.md").write_text("card")
    write_record(copy, minimal_record())
    assert not verify_folder(copy).signed
    refuses(copy, published[1], r"README\.md")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name",
    "model.safetensors pytorch_model.bin training_args.bin a.pt a.pth a.pkl a.ckpt a.h5 a.msgpack A.PKL sub/a.npy "
    "results.json slc.png config.json".split(),
)
def test_pickles_are_not_loaded(copy, published, signing_key, tmp_path, name):
    marker = tmp_path / "executed"
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(pickle.dumps(Payload(marker)))
    for key in (None, published[1]):
        refuses(copy, key, name)
    # Whoever signs it: what is not data is refused, recorded or not. A picture is one whatever is in it.
    write_record(copy, minimal_record())
    if name != "slc.png":
        with pytest.raises(VerificationError, match=name):
            sign_folder(copy, signing_key)
        refuses(copy, match=name)
    assert not marker.exists()
    pickle.loads((copy / name).read_bytes())
    assert marker.exists(), "the test's own payload does nothing"


def test_remote_code(copy, published, signing_key, tmp_path):
    marker = tmp_path / "executed"
    (copy / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    write_record(copy, minimal_record())
    refuses(copy, match=r"programs, scripts or archives: evil\.py")
    (copy / "evil.py").unlink()
    write_record(copy, minimal_record())
    refuses(copy, match=r"config\.json asks for code from elsewhere, auto_map: .*evil\.Config")
    with pytest.raises(VerificationError, match="auto_map"):
        sign_folder(copy, signing_key)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}, "custom_pipelines"),
        ("config.json", {"text_config": [{"auto_map": {"AutoModel": "a/b--c.D"}}]}, "auto_map"),
        ("config.json", {"attn_implementation": "org/kernel"}, "attn_implementation"),
        ("config.json", {"_attn_implementation": {"": "org/kernel@main"}}, "_attn_implementation"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}, "auto_map"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}, "auto_map"),
        ("sub/config.json", {"auto_map": {"AutoModel": "evil.M"}}, "auto_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../evil.safetensors"}}, r"\.\./evil\.safetensors"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/evil.safetensors"}}, r"/evil\.safetensors"),
        ("model.safetensors.index.json", {"weight_map": {"a": "README.md"}}, r"README\.md"),
        ("model.safetensors.index.json", {"weight_map": "none.safetensors"}, r"none\.safetensors"),
        ("model.safetensors.index.json", {"weight_map": [1]}, r"names weights in \[1\]"),
    ],
)
def test_configurations_that_lead_elsewhere(copy, name, entries, message):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(json.dumps(entries))
    write_record(copy, minimal_record())
    refuses(copy, match=f"{name} .*{message}")


def test_harmless_configurations_pass(copy):
    config = json.loads((copy / "config.json").read_text())
    harmless = {"auto_map": None, "custom_pipelines": {}, "attn_implementation": "paged|eager"}
    (copy / "config.json").write_text(json.dumps({**config, **harmless}))
    shards = {"weight_map": {"a": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(shards))
    write_record(copy, minimal_record())
    verify_folder(copy)


def test_configurations_with_two_meanings(copy):
    (copy / "config.json").write_text('{"auto_map": {"AutoModel": "evil.M"}, "auto_map": null}')
    write_record(copy, minimal_record())
    refuses(copy, match=r"config\.json is not valid JSON \(key 'auto_map' stands there twice")


@pytest.mark.parametrize(
    "name", ["model.onnx", "page.html", "run.sh", "x.svg", "x.sig", "sub/model.sig", "blob", "a.zip"]
)
def test_types_that_are_not_needed(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("")
    write_record(copy, minimal_record())
    refuses(copy, match=f": {name};")


def test_types_are_judged_before_anything_is_read(copy, monkeypatch):
    (copy / "a.pkl").write_text("")
    monkeypatch.setattr(os, "open", None)
    monkeypatch.setattr("hf_ntp.publishing.contents.safe_open", None)
    refuses(copy, match=r"a\.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        (2**63).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      ',
    ],
    ids=range(6),
)
def test_broken_safetensors(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    write_record(copy, minimal_record())
    refuses(copy, match=r"model\.safetensors is not a whole safetensors file")


def test_names_that_differ_only_in_case(copy):
    (copy / "readme.md").write_text("")
    refuses(copy, match=r"differ only in case")


@pytest.mark.parametrize(
    "name", ["a b.md", "ü.md", "a\nb.md", "-a.md", "..a.md", "a\\b.md", "a" * 240 + "/" + "b" * 30]
)
def test_odd_names(copy, name):
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(VerificationError, match="file name") as caught:
        verify_folder(copy)
    assert str(caught.value).isprintable()


def test_too_many_files(copy, monkeypatch):
    monkeypatch.setattr("hf_ntp.publishing.files._MAX_ENTRIES", 3)
    refuses(copy, match="more than 3 files")


def test_links_pipes_and_devices(copy, tmp_path):
    (copy / "x.txt").symlink_to("README.md")
    refuses(copy, match=r"x\.txt is a symbolic link")
    (copy / "x.txt").unlink()
    (copy / "sub").symlink_to(tmp_path)
    refuses(copy, match="sub is a symbolic link")
    (copy / "sub").unlink()
    os.mkfifo(copy / "x.txt")
    refuses(copy, match=r"x\.txt is a folder, pipe")


def test_a_snapshot_in_the_hugging_face_cache(copy, published, tmp_path):
    """snapshots/<commit>/<name> leads to blobs/<digest>, which may lead to a store for all models."""
    snapshot, blobs, shared = (tmp_path / "hub" / name for name in ("m/snapshots/c0ffee", "m/blobs", "blobs"))
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for index, path in enumerate(sorted(copy.iterdir())):
        home = (blobs, shared)[index % 2] / str(index)
        path.rename(home)
        if home.parent == shared:
            (blobs / str(index)).symlink_to(os.path.relpath(home, blobs))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    refuses(snapshot, published[1], "HF_HUB_CACHE")
    assert verify_folder(snapshot, published[1], links_into=tmp_path / "hub").signed
    with pytest.raises(VerificationError, match="needed: one into"):
        verify_folder(snapshot, published[1], links_into=blobs)
    (shared / "1").write_text("changed")
    with pytest.raises(VerificationError):
        verify_folder(snapshot, published[1], links_into=tmp_path / "hub")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../../none")
    with pytest.raises(VerificationError, match="link to nowhere"):
        verify_folder(snapshot, links_into=tmp_path / "hub")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(blobs)
    with pytest.raises(VerificationError, match="regular file"):
        verify_folder(snapshot, links_into=tmp_path / "hub")


def test_no_folder_no_record_no_key(copy, tmp_path):
    refuses(tmp_path / "none", match="is not a folder")
    refuses(copy / "README.md", match="is not a folder")
    refuses(copy, tmp_path / "none.pem", match="no readable file")
    (copy / "authorization.json").unlink()
    refuses(copy, match=r"holds no authorization\.json")


def test_errors_are_record_errors(tmp_path):
    with pytest.raises(RecordError):
        verify_folder(tmp_path)
