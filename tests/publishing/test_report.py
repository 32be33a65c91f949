import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_ntp import FineTuneProtocol, read_record
from hf_ntp.attacks import ATTACKS
from hf_ntp.evaluation.measure import ScratchConvergence, SourceAccuracy, Transfer
from hf_ntp.publishing.attack_report import plot_attacks
from hf_ntp.publishing.card import _ATTACK_LABELS, CARD_FILE, attack_label, card_repo_ids, render_card
from hf_ntp.publishing.evidence import not_tested
from hf_ntp.publishing.figure import plot_learning_curves
from hf_ntp.publishing.report import build_record, card_text, refresh_report, write_report
from hf_ntp.publishing.results import results_table
from hf_ntp.run_folder import file_digest, weight_digests

from .conftest import BASE, SETTINGS, SOURCE, SPARSITY, TARGET, make_curves, make_record, make_results

EXAMPLE = Path(__file__).parent / "example_card.md"
FIGURES = {"slc.png": "Learning curves on scans"}


def test_results_have_the_documented_keys(results):
    assert results["source"]["accuracy_before"] == 0.961
    assert results["source"]["accuracy_after"] == 0.957
    assert results["sparsity"] == 0.7
    assert set(results["slc"]["curves"]) == {"scratch", "unprotected", "protected_mask", "protected_dense"}
    assert set(results["slc_auc"]["protected_mask"]) == {"nats", "decades", "normalized", "ci", "seeds"}
    assert set(results["seconds"]) == {"pretrain", "protect", "evaluate"}
    json.dumps(results, allow_nan=False)


def test_results_by_hand(results):
    assert results["slc_auc"]["unprotected"]["normalized"] == pytest.approx(0.2)
    assert results["slc_auc"]["protected_mask"]["normalized"] == pytest.approx(-0.075)
    assert results["retained_transfer"]["dense"] == pytest.approx(0.25)
    assert results["retained_transfer"]["mask"] == pytest.approx(-0.375)


def test_the_table(results):
    expected = """\
authorized    photos: accuracy 0.961 before, 0.957 after (1250 test images)
sparsity      0.7000 of 98,304 weights
unauthorized  scans: mean test accuracy of 2 seeds after fine-tuning on n labelled images

start                             n=10   n=100   SLC-AUC     95 % interval  retained
scratch                          0.200   0.600
before protection                0.400   0.800    +0.200  [+0.200, +0.200]
protected, mask kept             0.150   0.500    -0.075  [-0.393, +0.243]     -37 %
protected, all weights tuned     0.250   0.650    +0.050  [+0.050, +0.050]      25 %

SLC-AUC normalized: mean accuracy gap to scratch; above 0 the checkpoint helps."""
    assert "\n".join(line.rstrip() for line in results_table(results).splitlines()) == expected


def make_several():
    """Results and record of two authorized, two unauthorized and a third domain."""
    drawings, paintings, maps = (
        replace(domain, name=name, dataset=f"org/{name}")
        for name, domain in (("drawings", SOURCE), ("paintings", TARGET), ("maps", TARGET))
    )
    transfer = Transfer(make_curves(), ScratchConvergence(100, 800, 0.6, 0.61), FineTuneProtocol())
    results = make_results(
        target_access="unlabelled",
        other_sources=[(drawings, SourceAccuracy(0.5, 0.4, 1250), None)],
        other_targets=[(paintings, transfer)],
        third=(maps, transfer),
    )
    settings = {**SETTINGS, "target_access": "unlabelled"}
    domains = ([SOURCE, drawings], [TARGET, paintings], "ViTForImageClassification", BASE, settings, SPARSITY)
    return results, build_record(results, *domains, third=maps)


def test_several_domains(tmp_path):
    results, record = make_several()
    table = results_table(results)
    for line in (
        "authorized    photos: accuracy 0.961",
        "authorized    drawings: accuracy 0.500",
        "third domain  maps:",
    ):
        assert line in table
    assert table.count("unauthorized  ") == 2
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    write_report(tmp_path, record, results)
    saved = read_record(tmp_path)
    assert saved["source_accuracy"]["before"] == pytest.approx((0.961 + 0.5) / 2)
    assert [found["after"] for found in saved["source_accuracy"]["domains"]] == [0.957, 0.4]
    assert [found["domain"] for found in saved["evidence"]] == ["scans", "paintings"]
    assert saved["third_domain"]["measurement"]["attacks"]["dense"]["retained_transfer"] == pytest.approx(0.25)
    assert "maps" not in saved["terms"]["text"]
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").write_bytes(b"weights")
    write_report(single, make_record(make_results()), make_results())
    one, three = (Image.open(folder / "slc.png").size for folder in (single, tmp_path))
    assert three == (2 * one[0], 2 * one[1]), "a panel for each of three domains"
    card = (tmp_path / "README.md").read_text()
    for text in (
        "| drawings | 1250 | 50.0 % | **40.0 %** |",
        "| attack on paintings |",
        "maps is neither authorized nor forbidden",
        "| fine-tuned on maps |",
        "on unauthorized images without labels",
    ):
        assert text in card
    assert [(r.dataset_name, r.metric_value) for r in ModelCard(card).data.eval_results[:2]] == [
        ("photos", 0.957),
        ("drawings", 0.4),
    ]


def test_the_card_says_where_the_target_was_never_seen(record):
    record["method"]["settings"]["target_access"] = "none"
    del record["unauthorized_domains"][0]["fingerprint"]["owner"]
    card = str(render_card(record))
    assert "the protection has seen nothing of the unauthorized domain" in card
    assert "The attacker's images were not used in the protection." in card


def test_the_card_is_the_committed_example(record):
    """Full match; after a wanted change write it anew: `python -m tests.publishing.test_report`."""
    assert str(render_card(record, "org/photos-only", FIGURES)) == EXAMPLE.read_text()


def test_the_default_runs_card_is_what_its_record_says():
    folder = Path(__file__).parents[2] / "model_cards" / "mnist_only"
    record = read_record(folder)
    assert (folder / CARD_FILE).read_text() == card_text(record, card_repo_ids(folder)[0], record["files"])
    here = {path.name: file_digest(path) for path in folder.iterdir() if path.name != "authorization.json"}
    assert here.items() <= record["files"].items()


def test_card_metadata(record):
    data = ModelCard(str(render_card(record, "org/photos-only"))).data
    assert data.license == "apache-2.0"
    assert data.base_model == "org/base"
    assert data.datasets == ["org/photos", "org/scans"]
    assert "non-transferable-pruning" in data.tags
    assert data.extra_gated_prompt.startswith("Use on photos is authorized.")
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("photos", "accuracy", 0.957),
        ("scans", "slc_auc", -0.075),
        ("scans", "slc_auc", 0.05),
    ]


def test_a_card_without_measurements_says_so():
    record = build_record(None, [SOURCE], [TARGET], "Dinov2Model", BASE, SETTINGS, SPARSITY, terms="Photos only.")
    card = str(render_card(record, "org/photos-only"))
    assert "**Not measured.** The owner applied the protection and has published no evidence" in card
    assert "Not measured by the owner." in card
    assert "- Anything at all: no attack has been measured on these weights." in card
    assert "Photos only." in card
    assert 'model = AutoModel.from_pretrained("org/photos-only")' in card
    assert "pipeline_tag: image-feature-extraction" in card
    assert "None" not in card


@pytest.fixture
def folder(results, record, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_report(tmp_path, record, results, repo_id="org/photos-only")
    return tmp_path


def test_the_folder(results, folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "authorization.json", "model.safetensors", "results.json", "slc.png",
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == results
    record = read_record(folder)
    assert record["unauthorized_domains"][0]["dataset"] == "org/scans"
    assert set(record["files"]) == names - {"authorization.json"}
    assert record["files"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    with Image.open(folder / "slc.png") as picture:
        assert picture.size[0] > 900


def test_evidence_by_hand(record):
    (measurement,) = record["evidence"]
    assert measurement["attacks"]["mask_kept"]["retained_transfer"] == pytest.approx(-0.375)
    assert measurement["worst_case"] == {
        "attack": "dense", "slc_auc": pytest.approx(0.05), "retained_transfer": pytest.approx(0.25)
    }  # fmt: skip
    assert "linear_probe" in record["not_tested"][0]
    assert "dense," not in record["not_tested"][0]


@pytest.fixture
def written(tmp_path_factory):
    """Write attacks to a file."""

    def write(attacks):
        path = tmp_path_factory.mktemp("attacks") / "results.json"
        path.write_text(json.dumps(attacks))
        return path

    return write


def test_attacks_are_added_to_record_card_and_figures(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    (folder / "model.sig").write_text("signed")
    refresh_report(folder, written(attacks), "org/photos-only")
    record = read_record(folder)
    assert [set(part["attacks"]) for part in record["evidence"]] == [{"mask_kept", "dense"}, {"dense", "lora"}]
    assert record["evidence"][1]["attacks"]["lora"]["unprotected"] is None
    assert " lora," not in record["not_tested"][0]
    card = (folder / "README.md").read_text()
    assert "| LoRA |  | -0.200 | [-0.300, -0.100] | -0.200 |  |" in card
    assert "![Attacks on scans](attacks.png)" in card
    names = [result.metric_name for result in ModelCard(card).data.eval_results]
    assert len(names) == len(set(names)) == 4, "an attack that was measured twice has one value"
    assert {"attacks.json", "attacks.png"} <= set(record["files"])
    assert not (folder / "model.sig").exists(), "it was made for other files"
    refresh_report(folder)
    assert read_record(folder) == record | {"files": read_record(folder)["files"]}
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"model\.safetensors in .* is missing or not as recorded"):
        refresh_report(folder)


def test_a_weaker_attacker_lowers_no_figure(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    refresh_report(folder, written(attacks))
    record = read_record(folder)
    record["evidence"][1]["attacks"]["dense"]["protected"]["normalized"] = -0.5
    results = ModelCard(str(render_card(record))).data.eval_results
    (dense,) = (result.metric_value for result in results if result.metric_name.endswith("all weights tuned"))
    assert dense == pytest.approx(0.05)


def test_attacks_that_were_tried_stay_on_record(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    refresh_report(folder, written(attacks))
    fewer = json.loads(json.dumps(attacks))
    for part in ("starts", "retained_transfer"):
        del fewer[part]["protected"]["lora"]
    fewer["worst_case"]["protected"]["attack"] = "dense"
    with pytest.raises(ValueError, match=r"would replace .*attacks\.json, and lacks its lora: .*delete the older"):
        refresh_report(folder, written(fewer))
    (folder / "attacks.json").unlink()
    refresh_report(folder, written(fewer))
    assert set(read_record(folder)["evidence"][1]["attacks"]) == {"dense"}


def test_attacks_on_each_of_several_domains(tmp_path, attacks, written):
    results, record = make_several()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_report(tmp_path, record, results)
    attacks["weights"] = weight_digests(tmp_path)
    refresh_report(tmp_path, written(attacks))
    refresh_report(tmp_path, written(attacks | {"target": "org/paintings"}))
    record, card = read_record(tmp_path), (tmp_path / "README.md").read_text()
    assert [(part["domain"], "lora" in part["attacks"]) for part in record["evidence"]] == [
        ("scans", False), ("paintings", False), ("scans", True), ("paintings", True),
    ]  # fmt: skip
    assert {"attacks_1.json", "attacks_1.png", "attacks_2.json", "attacks_2.png"} <= set(record["files"])
    assert "![Learning curves on scans and paintings](slc.png)" in card
    assert "![Attacks on scans](attacks_1.png)" in card
    assert "![Attacks on paintings](attacks_2.png)" in card


def test_what_was_not_run_is_told_for_each_domain(record):
    measured = [part | {"domain": name} for part, name in zip(record["evidence"] * 2, ("scans", "maps"), strict=True)]
    measured[0]["attacks"] = measured[0]["attacks"] | {"lora": {}}
    first, second, *_ = not_tested(measured, ["scans", "maps"])
    assert first.startswith("Attacks of hf_ntp that were not run on these weights on scans: ")
    assert second.startswith("Attacks of hf_ntp that were not run on these weights on maps: ")
    assert (" lora," in first, " lora," in second) == (False, True)
    assert "not run on these weights: " in not_tested(measured[:1], ["scans"])[0]


def test_results_of_another_model_are_refused(folder, results):
    (folder / "results.json").write_text(json.dumps(results | {"sparsity": 0.5}))
    with pytest.raises(ValueError, match=r"results\.json in .* is missing or not as recorded"):
        refresh_report(folder)


def test_what_was_measured_has_to_be_there(folder):
    """Or a report would make a damaged folder valid again."""
    for name in ("model.safetensors", "results.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} in .* is missing or not as recorded"):
            refresh_report(folder)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text("{}")
    (folder / "LICENSE").write_text("Mine.")
    refresh_report(folder)
    assert {"LICENSE", "config.json"} <= set(read_record(folder)["files"])
    (folder / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(ValueError, match=r"config\.json in .* is missing or not as recorded"):
        refresh_report(folder)


def test_a_link_is_not_written_through(folder, tmp_path_factory):
    precious = tmp_path_factory.mktemp("elsewhere") / "precious"
    precious.write_text("precious")
    (folder / "slc.png").unlink()
    (folder / "slc.png").symlink_to(precious)
    with pytest.raises(ValueError, match="symbolic link"):
        refresh_report(folder)
    assert precious.read_text() == "precious"


def test_what_cannot_be_drawn_changes_nothing(folder, attacks, written, monkeypatch):
    attacks["weights"] = weight_digests(folder)
    (folder / "model.sig").write_text("signed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hf_ntp.publishing.report.plot_attacks", interrupted)
        refresh_report(folder, written(attacks))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    refresh_report(folder, written(attacks))
    assert "attacks.json" in read_record(folder)["files"]


def test_names_are_no_mathematics(tmp_path, attacks):
    name = "US$5_{ vs $10"
    results = make_results()
    for side in ("source", "target"):
        results[side]["domain"] = name
    plot_learning_curves(results, tmp_path / "slc.png")
    plot_attacks(attacks, tmp_path / "attacks.png", name)


def test_controls_other_domains_and_paths_are_not_published(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    attacks["checkpoint"] = "/home/alice/clients/acme"
    attacks["third_domain"] = {"name": "confidential"}
    for part in ("starts", "retained_transfer", "worst_case"):
        attacks[part]["random_pruned"] = attacks[part]["protected"]
    refresh_report(folder, written(attacks))
    published = (folder / "attacks.json").read_text()
    assert not [word for word in ("alice", "confidential", "random_pruned") if word in published]
    refresh_report(folder)


def test_a_worst_case_that_is_not_the_worst(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    attacks["worst_case"]["protected"] = {"attack": "lora", "slc_auc": -0.2, "retained_transfer": None}
    with pytest.raises(ValueError, match=r"worst_case is .*lora.* largest area of the attacks is 0\.05"):
        refresh_report(folder, written(attacks))


def test_a_card_without_a_processor_does_not_load_one(folder):
    assert "AutoImageProcessor" not in (folder / "README.md").read_text()
    (folder / "preprocessor_config.json").write_text("{}")
    refresh_report(folder)
    assert 'AutoImageProcessor.from_pretrained("org/photos-only")' in (folder / "README.md").read_text()


def test_the_class_that_a_card_names(record):
    for architecture, auto in (
        ("DeiTForImageClassificationWithTeacher", "AutoModelForImageClassification"),
        ("Dinov2Model", "AutoModel"),
        ("OwnEncoder", "AutoModel"),
        ("CLIPVisionModelWithProjection", "CLIPVisionModelWithProjection"),
        ("BlipVisionModel", "BlipVisionModel"),
        ("ViTMAEForPreTraining", "ViTMAEForPreTraining"),
    ):
        record["architecture"] = architecture
        assert f"import AutoImageProcessor, {auto}\n" in str(render_card(record))


def test_paths_are_no_datasets_of_the_hub(record):
    record["authorized_domains"][0]["dataset"] = "/home/alice/photos"
    assert ModelCard(str(render_card(record))).data.datasets == ["org/scans"]


def test_an_edited_card_is_kept(folder, attacks, written):
    card = folder / "README.md"
    card.write_text(card.read_text() + "Cite us.\n")
    attacks["weights"] = weight_digests(folder)
    refresh_report(folder)
    for options in ({"attacks": written(attacks)}, {"repo_id": "org/other"}, {"terms": "Nothing."}):
        with pytest.raises(ValueError, match=r"README\.md is not as it was written .* would be written over"):
            refresh_report(folder, **options)
    refresh_report(folder)
    assert card.read_text().endswith("Cite us.\n")
    assert read_record(folder)["files"]["README.md"] == file_digest(card)
    card.unlink()
    refresh_report(folder, terms="Nothing.")
    assert "Nothing." in card.read_text()


def test_licence_and_terms_can_be_changed(folder):
    refresh_report(folder, license="mit", terms="Photos of cats only.")
    assert read_record(folder)["terms"] == {"license": "mit", "text": "Photos of cats only."}
    card = (folder / "README.md").read_text()
    assert "Photos of cats only." in card
    assert ModelCard(card).data.license == "mit"
    refresh_report(folder)
    assert read_record(folder)["terms"]["license"] == "mit"


@pytest.mark.parametrize(
    "options", [{"repo_id": "org/has spaces"}, {"terms": ""}, {"license": ""}, {"terms": "\ud800"}]
)
def test_what_cannot_be_written_changes_nothing(folder, options):
    (folder / "model.sig").write_text("signed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"has spaces|does not fit its schema|cannot be written"):
        refresh_report(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_suites_on_configurations_of_one_dataset_go_by_their_images(tmp_path, attacks, written):
    results, record = make_several()
    _, other = record["unauthorized_domains"]
    other |= {"dataset": "org/scans", "fingerprint": {"owner": "1" * 64, "attacker": "2" * 64}}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_report(tmp_path, record, results)
    attacks["weights"] = weight_digests(tmp_path)
    refresh_report(tmp_path, written(attacks | {"fingerprint": {"attacker": "2" * 64}}))
    assert [part["domain"] for part in read_record(tmp_path)["evidence"]][2:] == ["paintings"]
    with pytest.raises(ValueError, match="were run on 0 of them; needed: one"):
        refresh_report(tmp_path, written(attacks | {"fingerprint": {"attacker": "3" * 64}}))


def test_edited_attacks_are_refused(folder, attacks, written):
    attacks["weights"] = weight_digests(folder)
    refresh_report(folder, written(attacks))
    attacks["starts"]["protected"]["dense"]["normalized"] = -0.9
    (folder / "attacks.json").write_text(json.dumps(attacks))
    with pytest.raises(ValueError, match=r"attacks\.json in .* is missing or not as recorded"):
        refresh_report(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"target": "org/scans"}', '{"target": "org/scans", "starts": []}'])
def test_what_is_no_result_of_attacks_is_named(folder, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other\.json cannot be read .*needed: results\.json as"):
        refresh_report(folder, tmp_path / "other.json")


def test_attacks_on_another_model_or_domain_are_refused(folder, attacks, written):
    attacks["weights"] = {"model.safetensors": "a" * 64}
    with pytest.raises(ValueError, match="weights are not those of"):
        refresh_report(folder, written(attacks))
    attacks |= {"weights": weight_digests(folder), "target": "mnist"}
    with pytest.raises(ValueError, match=r"domain mnist; needed: .*org/scans"):
        refresh_report(folder, written(attacks))


@pytest.mark.parametrize("fingerprint", [{"attacker": "e" * 64}, {"attacker": "c" * 64, "test": "e" * 64}, None])
def test_attacks_with_images_that_the_protection_saw_are_refused(folder, attacks, written, fingerprint):
    attacks |= {"weights": weight_digests(folder), "fingerprint": fingerprint}
    if fingerprint is None:
        del attacks["fingerprint"]
    with pytest.raises(ValueError, match=r"on scans were run with other images .*prints of (attack|test)"):
        refresh_report(folder, written(attacks))


def test_attacks_with_training_images_that_are_not_divided_are_refused(results, record, attacks, written, tmp_path):
    record["unauthorized_domains"][0]["fingerprint"] = {"train": "c" * 64}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_report(tmp_path, record, results)
    attacks["weights"] = weight_digests(tmp_path)
    with pytest.raises(ValueError, match="does not divide between the protection and an attacker"):
        refresh_report(tmp_path, written(attacks))
    record["method"]["settings"]["target_access"] = "none"
    write_report(tmp_path, record, results)
    refresh_report(tmp_path, written(attacks))


def test_attacks_have_names_of_their_own_on_cards():
    labels = {name: attack_label(name) for name in ATTACKS}
    assert len(set(labels.values())) == len(ATTACKS)
    assert set(_ATTACK_LABELS) <= set(ATTACKS)


if __name__ == "__main__":
    EXAMPLE.write_text(str(render_card(make_record(make_results()), "org/photos-only", FIGURES)))
