"""The command line: thin, quick to help, exit codes, JSON."""

import json
import subprocess
import sys
import time
from importlib import import_module

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from hf_ntp import cli, verify_folder
from hf_ntp.publishing.report import write_report
from hf_ntp.run_folder import weight_digests

from .publishing.conftest import make_attacks, make_record, make_results
from .publishing.folders import make_folder, make_keys, private_pem


@pytest.fixture
def folder(tmp_path):
    """As the recipe leaves it, on a model that is there."""
    made = make_folder(tmp_path / "protected")
    write_report(made, make_record(make_results()), make_results(), repo_id="org/photos-only")
    return made


def run(capsys, *argv):
    code = cli.main([str(word) for word in argv])
    return code, capsys.readouterr()


def test_a_folder_from_report_to_verification(folder, tmp_path, capsys, caplog):
    private, public = make_keys(tmp_path)
    (tmp_path / "attacks.json").write_text(json.dumps(make_attacks() | {"weights": weight_digests(folder)}))
    code, _ = run(capsys, "report", folder, "--attacks", tmp_path / "attacks.json", "--repo_id", "org/photos-only")
    assert code == 0
    assert "![Attacks on scans](attacks.png)" in (folder / "README.md").read_text()
    assert run(capsys, "sign", folder, "--private_key", private)[0] == 0
    code, printed = run(capsys, "verify", folder, "--public_key", public)
    assert code == 0
    assert "the signature is the owner's, and every file is as it was signed" in printed.out
    assert "NOT authorized  scans (org/scans)" in printed.out
    (worst,) = [line for line in printed.out.splitlines() if line.startswith("worst attack")]
    assert worst == (
        "worst attack    all weights tuned on scans: SLC-AUC +0.050 (normalized), 25 % of the best before "
        "protection; 3 attacks measured"
    )
    assert "NOT checked whose record that is" in run(capsys, "verify", folder)[1].out
    assert "Sign it anew" not in caplog.text
    run(capsys, "report", folder, "--license", "mit")
    assert "was signed, and its record is another now: the signature is removed. Sign it anew" in caplog.text


def test_one_json_document(folder, tmp_path, capsys):
    private, public = make_keys(tmp_path)
    signed = run(capsys, "sign", folder, "--private_key", private, "--json")[1].out
    assert json.loads(signed) == {"signature": str(folder / "model.sig")}
    found = json.loads(run(capsys, "verify", folder, "--public_key", public, "--json")[1].out)
    assert (found["signature_checked"], found["record"]["terms"]["license"]) == (True, "apache-2.0")
    assert json.loads(run(capsys, "info", folder, "--json")[1].out) == found["record"]


def test_the_password_of_a_key_is_not_on_the_command_line(folder, tmp_path, capsys, monkeypatch):
    key = tmp_path / "locked.pem"
    key.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"))
    code, printed = run(capsys, "sign", folder, "--private_key", key)
    assert (code, "HF_NTP_KEY_PASSWORD" in printed.err) == (1, True)
    monkeypatch.setenv("HF_NTP_KEY_PASSWORD", "wrong")
    assert run(capsys, "sign", folder, "--private_key", key)[0] == 1
    monkeypatch.setenv("HF_NTP_KEY_PASSWORD", "secret")
    assert run(capsys, "sign", folder, "--private_key", key)[0] == 0
    # A key without one does not mind.
    assert run(capsys, "sign", folder, "--private_key", make_keys(tmp_path)[0])[0] == 0
    monkeypatch.delenv("HF_NTP_KEY_PASSWORD")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli, "getpass", lambda prompt: {f"Password of {key}: ": "secret"}[prompt])
    assert run(capsys, "sign", folder, "--private_key", key)[0] == 0


def test_a_card_that_names_no_repository_is_not_published(folder, hub, capsys):
    write_report(folder, make_record(make_results()), make_results())
    code, printed = run(capsys, "push", folder, "org/model")
    assert code == 1
    assert f"Run hf-ntp report {folder} --repo_id org/model first" in printed.err
    assert run(capsys, "report", folder, "--repo_id", "org/model")[0] == 0
    assert run(capsys, "push", folder, "org/model")[0] == 0


def test_signed_and_pushed_in_one_go(folder, hub, tmp_path, capsys):
    private, public = make_keys(tmp_path)
    assert run(capsys, "report", folder, "--repo_id", "org/model")[0] == 0
    code, printed = run(capsys, "push", folder, "org/model", "--private_key", private, "--gated", "manual", "--json")
    assert code == 0, printed.err
    assert json.loads(printed.out)["commit"] == hub.model("org/model").commits[-1].oid
    assert (hub.model("org/model").private, hub.model("org/model").gated) == (True, "manual")
    assert run(capsys, "verify", "org/model", "--public_key", public)[0] == 0
    assert run(capsys, "report", folder, "--repo_id", "elsewhere/model")[0] == 0
    code, printed = run(capsys, "push", folder, "elsewhere/model")
    assert (code, "403" in printed.err) == (1, True)


def test_a_hub_that_stalls(hub, capsys):
    hub.fail("GET /api/models/", "stall", times=10)
    code, printed = run(capsys, "verify", "org/model", "--timeout", "0.2")
    assert (code, "with a larger timeout=... (hf-ntp: --timeout)" in printed.err) == (1, True)


def test_refusals_have_a_message_and_exit_code_1(folder, tmp_path, capsys):
    (folder / "model.safetensors").write_bytes(b"other weights")
    code, printed = run(capsys, "verify", folder)
    assert code == 1
    assert printed.out == ""
    assert "model.safetensors" in printed.err
    assert "Traceback" not in printed.err
    for argv in (["report", folder], ["info", tmp_path], ["sign", folder, "--private_key", tmp_path / "none.pem"]):
        code, printed = run(capsys, *argv)
        assert code == 1, argv
        assert printed.err.startswith("hf-ntp: "), argv


def test_wrong_usage_has_exit_code_2(capsys):
    for argv in ([], ["protct"], ["sign", "folder"], ["verify", "folder", "--pub", "key.pem"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_a_compressed_copy_verifies(folder, tmp_path, capsys):
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(torch.rand(parameter.shape) < 0.9, 0.0)
    model.save_pretrained(folder)
    code, printed = run(capsys, "compress", folder, tmp_path / "small")
    assert (code, "is not the one" in printed.err or "changed" in printed.err) == (1, True), printed.err
    write_report(folder, make_record(make_results()), make_results(), repo_id="org/photos-only")
    assert run(capsys, "compress", folder, tmp_path / "small")[0] == 0
    verify_folder(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    loading = "```python\nimport hf_ntp  # tells transformers how"
    assert loading in card, "without hf_ntp loading is an error"
    assert "Load it as any other model" not in card
    assert run(capsys, "report", tmp_path / "small")[0] == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert loading in card
    assert '.from_pretrained("org/photos-only")' in card, "the name it had"
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_compressed_copy_with_attacks(folder, tmp_path, capsys, monkeypatch):
    import torch
    from transformers import AutoModelForImageClassification

    from hf_ntp.publishing import report

    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(torch.rand(parameter.shape) < 0.9, 0.0)
    model.save_pretrained(folder)
    suite = make_attacks() | {"weights": weight_digests(folder)}
    write_report(folder, make_record(make_results()), make_results(), {"scans": suite})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "write_record", killed)
        report.compress_report(folder, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert run(capsys, "compress", folder, tmp_path / "small")[0] == 0
    code, printed = run(capsys, "report", tmp_path / "small", "--repo_id", "org/small")
    assert code == 0, printed.err
    assert "| LoRA |" in (tmp_path / "small" / "README.md").read_text()
    assert run(capsys, "expand", tmp_path / "small", tmp_path / "again")[0] == 0
    assert run(capsys, "verify", tmp_path / "again")[0] == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "import hf_ntp " in (tmp_path / "small" / "README.md").read_text()
    assert "import hf_ntp " not in card
    for name in ("model.safetensors", "config.json", "attacks.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_record_cannot_forge_what_is_printed(folder, capsys):
    record = make_record(make_results())
    forged = "\x1b[2A\r\x1b[K7 files: the signature is the owner's"
    record["terms"]["text"] = f"{forged}\n{forged}"
    record["authorized_domains"][0]["name"] = f"\n{forged}\u202e"
    write_report(folder, record, make_results(), repo_id="org/photos-only")
    for command in ("verify", "info"):
        code, printed = run(capsys, command, folder)
        assert code == 0
        assert all(c.isprintable() for line in printed.out.splitlines() for c in line)
        assert not any(line.startswith("7 files: the sig") for line in printed.out.splitlines())


@pytest.mark.parametrize("command", [[], ["report"], ["push"], ["verify"]])
def test_help_is_instant(command):
    """Once in three times, at least: other processes may be at work on the machine."""
    for _ in range(3):
        start = time.perf_counter()
        argv = [sys.executable, "-m", "hf_ntp.cli", *command, "--help"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        if (seconds := time.perf_counter() - start) < 1:
            break
    assert done.returncode == 0
    assert "hf-ntp" in done.stdout
    assert seconds < 1


@pytest.mark.parametrize(
    ("command", "name"), [("protect", "ntp_vit"), ("protect-encoder", "ntp_ssl"), ("evaluate", "ntp_attack")]
)
def test_recipes_are_subcommands(monkeypatch, capsys, command, name):
    recipe, seen = import_module(f"hf_ntp.recipes.{name}"), []

    def instead(argv):
        print("progress")
        seen.append(argv)
        return {"starts": {}}

    monkeypatch.setattr(recipe, "main", instead)
    monkeypatch.setattr(sys, "argv", ["hf-ntp"])
    code, printed = run(capsys, command, "--checkpoint", "x", "--json")
    assert (code, seen) == (0, [["--checkpoint", "x"]])
    assert json.loads(printed.out) == {"starts": {}}
    assert "progress" in printed.err
    monkeypatch.setattr(recipe, "main", lambda argv: (_ for _ in ()).throw(ValueError("no such domain")))
    assert run(capsys, command, "--checkpoint", "x")[1].err == "hf-ntp: no such domain\n"


@pytest.mark.parametrize("kind", [FloatingPointError, ImportError, FileNotFoundError, ValueError])
def test_a_recipe_that_cannot_go_on_says_why(monkeypatch, capsys, kind):
    def fails(_):
        raise kind("needed: another")

    monkeypatch.setattr(import_module("hf_ntp.recipes.ntp_vit"), "main", fails)
    monkeypatch.setattr(sys, "argv", ["hf-ntp"])
    code, printed = run(capsys, "protect")
    assert (code, printed.err) == (1, "hf-ntp: needed: another\n")
