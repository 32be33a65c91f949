import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil, ViTMAEConfig, ViTMAEForPreTraining

from hf_ntp import load_protected, push_folder, read_record, sign_folder
from hf_ntp.evaluation.cache import local_folder
from hf_ntp.models import load_model
from hf_ntp.publishing.fetching import fetch_record, verify_checkpoint
from hf_ntp.publishing.hub import push_metric
from hf_ntp.publishing.hub_requests import HubError
from hf_ntp.publishing.record import RecordError, write_record
from hf_ntp.publishing.report import compress_report

from ..conftest import tiny_resnet, tiny_vit
from ..hub_server import GIT_ATTRIBUTES, OWNER, READER, STRANGER
from .folders import make_keys, minimal_record

REPO = "org/model"
CARD = "---\nlicense: apache-2.0\ntags:\n- non-transferable-pruning\n---\n# A protected model\n"
# The small model of each kind that is pushed and loaded.
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
MODELS = {
    "vit": tiny_vit,
    "resnet": tiny_resnet,
    "mae": lambda: ViTMAEForPreTraining(
        ViTMAEConfig(
            **TINY,
            intermediate_size=24,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        )
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY)),
}


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def write_folder(path, model=None, **files):
    path.mkdir()
    (model or tiny_vit()).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)
    (path / ".gitattributes").write_bytes(GIT_ATTRIBUTES + b"*.png filter=lfs diff=lfs merge=lfs -text\n")
    (path / "README.md").write_text(CARD)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    write_record(path, minimal_record())
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "made")


def content(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stored", ["dense", "sparse"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_pushed_is_loaded(hub, tmp_path, kind, stored):
    model = MODELS[kind]()
    if stored == "sparse":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.95, 0.0)
    folder = write_folder(tmp_path / "made", model)
    if stored == "sparse":
        folder = compress_report(folder, tmp_path / "small")
        assert not (folder / "model.safetensors").exists()
    private, public = make_keys(tmp_path)
    sign_folder(folder, private)
    push_folder(folder, REPO)
    loaded = load_protected(REPO, public_key=public)
    assert type(loaded.model) is type(model)
    assert equal_weights(loaded.model, model)
    assert loaded.processor.size == {"height": 8, "width": 8}
    assert loaded.record["terms"]["text"] == "Photos only."
    assert hub.model(REPO).files == content(folder)
    assert ModelCard.load(REPO).data.tags == ["non-transferable-pruning"]


def test_a_download_into_a_folder_verifies(hub, folder, tmp_path):
    """Whatever notes this version of huggingface_hub leaves there."""
    push_folder(folder, REPO)
    snapshot_download(REPO, local_dir=tmp_path / "download")
    assert (tmp_path / "download" / ".cache" / "huggingface").is_dir()
    load_protected(str(tmp_path / "download"), verify="digests")


def test_a_checkpoint_in_several_files_is_attacked_as_any_other(hub, tmp_path):
    """Which file holds what is in one more."""
    folder = write_folder(tmp_path / "made")
    (folder / "model.safetensors").unlink()
    tiny_vit().save_pretrained(folder, max_shard_size="4KB")
    write_record(folder, minimal_record())
    push_folder(folder, "org/shards")
    fetched = local_folder("org/shards")
    assert len(list(Path(fetched).glob("*.safetensors"))) > 1
    assert equal_weights(load_model(fetched), tiny_vit())


def test_an_unknown_checkpoint_to_attack(hub, monkeypatch):
    for name in ("org/unknown", "no such/folder/here"):
        with pytest.raises(FileNotFoundError, match=f"{name} is neither a folder nor a name on the Hub"):
            local_folder(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="org/unknown is neither a folder nor a name on the Hub"):
        local_folder("org/unknown")


def test_all_files_arrive_in_one_commit_of_a_private_repository(hub, folder):
    made = push_folder(folder, REPO, commit_message="First")
    repo = hub.model(REPO)
    assert repo.private
    assert [commit.message for commit in repo.commits] == ["initial commit", "First"]
    assert made.oid == repo.commits[-1].oid
    with pytest.raises(HubError, match=r"404.*Needed.*hf auth login"):
        load_protected(REPO, verify=False, token=STRANGER)


def test_a_public_repository_is_private_until_it_is_complete(hub, folder):
    push_folder(folder, REPO, private=False)
    assert not hub.model(REPO).private
    (settings,) = hub.requests("PUT .*/settings")
    assert settings > max(hub.requests("POST .*/commit/"))
    assert load_protected(REPO, verify=False, token=STRANGER).record


def test_a_public_repository_is_not_filled_by_mistake(hub, folder):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match=r"is public; needed: a private.*private=False"):
        push_folder(folder, REPO)
    assert len(hub.model(REPO).commits) == 1


def test_the_gate_is_set_before_any_weights_arrive(hub, folder):
    push_folder(folder, REPO, private=False, gated="manual")
    gate, public = hub.requests("PUT .*/settings")
    assert gate < min(hub.requests("PUT /lfs/") + hub.requests("POST .*/preupload/"))
    assert public > max(hub.requests("POST .*/commit/"))
    assert hub.model(REPO).gated == "manual"
    with pytest.raises(HubError, match="access to this gated repository"):
        load_protected(REPO, verify=False, token=STRANGER)
    # An update does not open it.
    push_folder(folder, REPO, private=False)
    assert hub.model(REPO).gated == "manual"


def test_a_public_repository_is_gated_first_too(hub, folder):
    HfApi().create_repo(REPO)
    push_folder(folder, REPO, private=False, gated="auto")
    (gate,) = hub.requests("PUT .*/settings")
    assert gate < min(hub.requests("POST .*/preupload/"))
    assert hub.model(REPO).gated == "auto"


@pytest.mark.parametrize("status", [403, 500])
def test_without_its_gate_nothing_is_published(hub, folder, status):
    hub.fail("PUT .*/settings", status)
    with pytest.raises(HubError, match=f"{status}.*Nothing was published"):
        push_folder(folder, REPO, private=False, gated="auto")
    assert not hub.blobs
    assert hub.model(REPO).private
    push_folder(folder, REPO, private=False, gated="auto")
    assert hub.model(REPO).gated == "auto"


def test_a_second_push_updates_and_removes(hub, tmp_path):
    push_folder(write_folder(tmp_path / "old", notes__txt="stale", kept__txt="kept"), REPO)
    new = write_folder(tmp_path / "new", tiny_vit(seed=1), kept__txt="kept")
    push_folder(new, REPO)
    assert hub.model(REPO).files == content(new)
    assert equal_weights(load_protected(REPO, verify="digests").model, tiny_vit(seed=1))
    count = len(hub.model(REPO).commits)
    push_folder(new, REPO)
    assert len(hub.model(REPO).commits) == count


def test_a_gitignore_that_is_there_does_not_hold_back_files(hub, folder):
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=b"*.json\n*.safetensors\n", path_in_repo=".gitignore", repo_id=REPO)
    push_folder(folder, REPO)
    assert hub.model(REPO).files == content(folder)


def test_revisions(hub, tmp_path):
    first = push_folder(write_folder(tmp_path / "first"), REPO)
    push_folder(write_folder(tmp_path / "second", tiny_vit(seed=1)), REPO, branch="trial")
    push_folder(write_folder(tmp_path / "third", tiny_vit(seed=2)), REPO)

    for revision, seed in {None: 2, "trial": 1, first.oid: 0, "main": 2}.items():
        loaded = load_protected(REPO, revision=revision, verify="digests")
        assert equal_weights(loaded.model, tiny_vit(seed=seed)), revision
    with pytest.raises(HubError, match="a branch, tag or commit that exists"):
        load_protected(REPO, revision="nowhere", verify="digests")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("request_", ["PUT /lfs/", "POST .*/commit/"])
def test_an_interrupted_upload_leaves_no_half_model(hub, tmp_path, request_):
    old, new = write_folder(tmp_path / "old"), write_folder(tmp_path / "new", tiny_vit(seed=1))
    push_folder(old, REPO)
    hub.fail(request_, "cut", times=10)
    with pytest.raises(HubError, match=r"no connection.*same call") as caught:
        push_folder(new, REPO)
    assert caught.value.__cause__ is not None
    assert hub.model(REPO).files == content(old)
    hub.faults.clear()
    push_folder(new, REPO)
    assert hub.model(REPO).files == content(new)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", r"401 \(Invalid credentials.*Needed: a valid token.*hf auth login"),
        (False, r"401.*Needed: a valid token.*hf auth login"),
        (READER, r"403 \(.*Needed: a token with write access"),
        (STRANGER, r"403 \(.*Needed: a token with write access"),
    ],
)
def test_tokens_that_do_not_do(hub, folder, token, message):
    with pytest.raises(HubError, match=message) as caught:
        push_folder(folder, REPO, token=token)
    assert "Nothing was published" in str(caught.value)
    assert str(token) not in str(caught.value) or token is False
    assert not hub.repos


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("POST .*/repos/create", 500, "500.*a Hub that works"),
        ("GET /api/models/", 404, "404.*exists"),
        ("POST .*/preupload/", 500, "500.*a Hub that works.*Nothing was published"),
        ("POST .*/preupload/", 404, "404"),
        ("POST .*/commit/", 409, "409.*nobody else changes"),
        ("POST .*/commit/", 412, "412.*nobody else changes"),
        ("POST .*/commit/", 500, "500.*as a whole or not at all"),
        ("POST .*/validate-yaml", 503, "503.*a Hub that works"),
    ],
)
def test_what_the_hub_may_answer(hub, folder, request_, status, message):
    hub.fail(request_, status, times=10)
    with pytest.raises(HubError, match=message):
        push_folder(folder, REPO)
    hub.faults.clear()
    push_folder(folder, REPO)
    assert hub.model(REPO).files == content(folder)


def test_a_commit_by_somebody_else_in_between(hub, folder, monkeypatch):
    upload = HfApi.preupload_lfs_files

    def interrupted(self, *arguments, **options):
        upload(self, *arguments, **options)
        repo = hub.model(REPO)
        repo.commit("main", "somebody else's", {**repo.files, "theirs.txt": b""})

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    with pytest.raises(HubError, match=r"412 \(A commit has happened since"):
        push_folder(folder, REPO)
    assert "theirs.txt" in hub.model(REPO).files
    monkeypatch.undo()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("request_", ["POST .*/repos/create", "GET /api/models/", "PUT /lfs/", "POST .*/commit/"])
def test_a_stalled_connection_ends(hub, folder, request_):
    hub.fail(request_, "stall", times=10)
    with pytest.raises(HubError, match=r"stalled \(ReadTimeout\).*timeout="):
        push_folder(folder, REPO, timeout=0.2)
    hub.faults.clear()
    push_folder(folder, REPO)
    assert hub.model(REPO).files == content(folder)


@pytest.mark.usefixtures("no_waiting")
def test_loading_does_not_stall(hub, folder):
    push_folder(folder, REPO)
    hub.fail("GET /api/models/", "stall", times=10)
    with pytest.raises(HubError, match="stalled"):
        load_protected(REPO, verify="digests", timeout=0.2)


@pytest.mark.usefixtures("no_waiting")
def test_no_network(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for call in (lambda: push_folder(folder, REPO), lambda: load_protected(REPO, verify="digests")):
        with pytest.raises(HubError, match=r"no connection to the Hub.*HF_ENDPOINT"):
            call()


def test_offline_from_the_cache(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    load_protected(REPO, verify="digests")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.log)
    assert equal_weights(load_protected(REPO, verify="digests").model, tiny_vit())
    assert len(hub.log) == count
    for call in (lambda: load_protected("org/other", verify="digests"), lambda: push_folder(folder, REPO)):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            call()


def test_without_a_connection_a_part_in_the_cache_is_no_tampering(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    fetch_record(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set and the local cache does not hold it all"):
        load_protected(REPO, verify="digests")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_protected(REPO, verify="digests")


def test_a_card_that_names_another_repository_is_not_published(hub, folder):
    (folder / "README.md").write_text(CARD + '\nAutoModel.from_pretrained("org/other")\n')
    write_record(folder, minimal_record())
    for name in (REPO, "other/other"):
        with pytest.raises(ValueError, match=f"tells people to load 'org/other'; needed: '{name}'"):
            push_folder(folder, name)
    assert not hub.repos
    assert push_folder(folder, "other").repo_url.repo_id == "org/other", "a name without an owner is one's own"


def test_a_card_may_name_other_repositories_too(hub, folder):
    card = f'{CARD}\nAutoModel.from_pretrained("org/base")\n\nAutoModel.from_pretrained("{REPO}")\n'
    (folder / "README.md").write_text(card)
    write_record(folder, minimal_record())
    push_folder(folder, REPO)


@pytest.mark.parametrize("signature", ["stale", "garbage"])
def test_a_signature_that_nobody_can_verify_is_not_published(hub, folder, tmp_path, signature):
    private, _ = make_keys(tmp_path)
    sign_folder(folder, private)
    if signature == "garbage":
        (folder / "model.sig").write_text("garbage")
    else:
        record = minimal_record()
        record["terms"]["text"] = "Other terms."
        write_record(folder, record)
    with pytest.raises(RecordError, match=r"not a signature|was made for other files \(by authorization\.json\)"):
        push_folder(folder, REPO)
    assert not hub.repos


def test_files_that_are_not_there_are_asked_for_once(hub, folder):
    push_folder(folder, REPO)
    names = {f"made-up-{i}.json": "0" * 64 for i in range(50)}
    record = read_record(folder) | {"files": read_record(folder)["files"] | names}
    (folder / "authorization.json").write_text(json.dumps(record))
    HfApi().upload_file(path_or_fileobj=folder / "authorization.json", path_in_repo="authorization.json", repo_id=REPO)
    before = len(hub.log)
    with pytest.raises(RecordError, match="missing: made-up-0"):
        verify_checkpoint(REPO)
    assert sum("made-up" in str(request) for request in hub.log[before:]) == 1


def test_changed_folders_are_not_published(hub, folder):
    (folder / "README.md").write_text("changed")
    with pytest.raises(RecordError):
        push_folder(folder, REPO)
    assert not hub.log


def test_without_git_attributes_those_of_the_hub_stay(hub, folder):
    (folder / ".gitattributes").unlink()
    push_folder(folder, REPO)
    assert hub.model(REPO).files == {**content(folder), ".gitattributes": GIT_ATTRIBUTES}
    load_protected(REPO, verify="digests")


def test_signed_from_end_to_end(hub, folder, tmp_path):
    secret, public = make_keys(tmp_path)
    with pytest.raises(RecordError):
        push_folder(folder, REPO, public_key=public)
    assert not hub.log
    sign_folder(folder, secret)
    push_folder(folder, REPO, public_key=public)
    assert equal_weights(load_protected(REPO, public_key=public).model, tiny_vit())
    assert "model.sig" in hub.model(REPO).files

    repo = hub.model(REPO)
    repo.commit("main", "tampered", {**repo.files, "README.md": b"changed"})
    with pytest.raises(RecordError):
        load_protected(REPO, public_key=public)


def test_verification_and_record_by_name(hub, folder):
    push_folder(folder, REPO)
    assert not verify_checkpoint(REPO).signed
    hub.log.clear()
    assert fetch_record(REPO) == fetch_record(folder) == read_record(folder)
    assert not hub.requests(".*safetensors")
    HfApi().create_repo("org/empty")
    with pytest.raises(RecordError, match=r"holds no authorization\.json"):
        fetch_record("org/empty")
    with pytest.raises(HubError, match="exists"):
        fetch_record("org/missing")


def test_changes_on_the_hub_are_found(hub, folder):
    push_folder(folder, REPO)
    repo = hub.model(REPO)
    repo.commit("main", "tampered", {**repo.files, "README.md": b"changed"})
    with pytest.raises(RecordError):
        load_protected(REPO, verify="digests")
    assert load_protected(REPO, verify=False).record


def test_everything_is_verified_by_default(folder):
    with pytest.raises(ValueError, match=r"found no public_key.*verify='digests'"):
        load_protected(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "digest"}, "found verify='digest'; needed"),
        ({"verify": "digests", "public_key": "owner.pub"}, "not used"),
        ({"trust_remote_code": True}, "found trust_remote_code; .*no code from the repository"),
        ({"use_safetensors": False}, "found use_safetensors"),
        ({"revision": "main"}, "found revision='main' with the folder"),
    ],
)
def test_arguments_that_do_not_go_together(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_protected(folder, **{"verify": False, **options})


def test_neither_folder_nor_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name"):
        load_protected(tmp_path / "missing", verify="digests")


def test_a_folder_with_little_in_it(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    loaded = load_protected(tmp_path, verify=False)
    assert loaded.processor is None
    assert loaded.record is None


@pytest.mark.parametrize("name", ["Trainer", "models", "NoSuchModel", "AutoModel", None])
def test_only_model_classes_of_transformers(tmp_path, name):
    tiny_vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": name and [name]}))
    with pytest.raises(ValueError, match=rf"model class {name!r}; needed: one of transformers"):
        load_protected(tmp_path, verify=False)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": {"a": 1}},
        {"architectures": 3},
        {"hidden_act": "nope"},
        {"hidden_size": 32},
        {"quantization_config": "x"},
    ],
)
def test_settings_that_do_not_fit(tmp_path, config):
    tiny_vit().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=r"cannot be loaded .* needed: a model as save_pretrained writes it"):
        load_protected(tmp_path, verify=False)


def test_weights_that_are_missing(tmp_path):
    model = tiny_vit()
    kept = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"no values for 2 weights of ViT.*classifier\.bias"):
        load_protected(tmp_path, verify=False)


def test_model_options_reach_the_model(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    model = load_protected(tmp_path, verify=False, num_labels=5, ignore_mismatched_sizes=True).model
    assert model.config.num_labels == 5


def test_plain_transformers_loads_it(hub, folder, tmp_path):
    """As anybody would: a fresh process, nothing of ours."""
    push_folder(folder, REPO)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({REPO!r})\n"
        "assert 'hf_ntp' not in sys.modules\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'loaded.pt')!r})\n"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": OWNER}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **settings}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    loaded, expected = torch.load(tmp_path / "loaded.pt"), tiny_vit().state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_the_metric_becomes_a_space(hub, monkeypatch, tmp_path):
    import evaluate

    push_metric("org/slc_auc", private=False)
    space = hub.repos["space", "org/slc_auc"]
    assert space.sdk == "gradio"
    assert not space.private
    assert set(space.files) == {".gitattributes", "README.md", "app.py", "requirements.txt", "slc_auc.py"}
    monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", hub.url + "/spaces/{path}/resolve/{revision}/{name}")
    monkeypatch.setattr(evaluate.config, "DOWNLOADED_EVALUATE_PATH", str(tmp_path / "downloads"))
    metric = evaluate.load("org/slc_auc", cache_dir=str(tmp_path / "metrics"))
    result = metric.compute(predictions=[[0.5, 0.7]], references=[[0.3, 0.7]], sample_sizes=[10, 100])
    assert result["normalized"] == pytest.approx(0.1)


def test_the_space_runs_wherever_its_files_lie(hub, tmp_path):
    """Spaces keep them in a folder named app."""
    push_metric("org/slc_auc")
    app = tmp_path / "app"
    app.mkdir()
    for name, data in hub.repos["space", "org/slc_auc"].files.items():
        (app / name).write_bytes(data)
    namespace = {"__file__": str(app / "app.py"), "__name__": "app"}
    exec((app / "app.py").read_text(), namespace)
    assert namespace["score"]("0.5 0.7", "0.3 0.7", "10 100")["normalized"] == pytest.approx(0.1)


def test_the_space_has_the_name_of_its_script(hub):
    with pytest.raises(ValueError, match=r"needed: a repository named 'slc_auc'"):
        push_metric("org/slc-auc")
    assert not hub.log
    assert Path(push_metric("slc_auc").commit_url).parts[-4:-2] == ("org", "slc_auc")
