import base64
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from model_signing import hashing, signing, verifying

from hf_ntp import sign_folder
from hf_ntp.publishing.errors import VerificationError
from hf_ntp.publishing.record import write_record
from hf_ntp.publishing.signing import check_signature

from .folders import make_keys, minimal_record, private_pem, public_pem


@pytest.fixture
def keys(tmp_path):
    return make_keys(tmp_path)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("Card")
    (folder / "sub" / "notes.txt").write_text("Notes")
    write_record(folder, minimal_record())
    return folder


@pytest.fixture
def signed(folder, keys):
    sign_folder(folder, keys[0])
    return folder


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_round_trip(folder, tmp_path, curve):
    private, public = make_keys(tmp_path, curve)
    assert sign_folder(folder, private) == folder / "model.sig"
    check_signature(folder, public)
    assert {path.name for path in folder.iterdir()} == {"README.md", "authorization.json", "model.sig", "sub"}


def test_the_signature_names_every_file_and_the_record(signed):
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    assert [resource["name"] for resource in resources] == ["README.md", "authorization.json", "sub/notes.txt"]


def test_the_library_itself_accepts_the_signature(signed, keys):
    (signed / ".gitattributes").write_text("written by the Hub")
    check = verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    check.verify(signed, signed / "model.sig")
    (signed / "README.md").write_text("card")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'README\.md'"):
        check.verify(signed, signed / "model.sig")


def test_signatures_of_the_library_itself_are_accepted(folder, keys):
    hashed = hashing.Config().set_ignored_paths(paths=["model.sig"])
    signer = signing.Config().set_hashing_config(hashed).use_elliptic_key_signer(private_key=keys[0])
    signer.sign(folder, folder / "model.sig")
    check_signature(folder, keys[1])


def test_files_that_a_signature_ignores_are_found(folder, keys):
    hashed = hashing.Config().set_ignored_paths(paths=["model.sig", "sub"])
    signer = signing.Config().set_hashing_config(hashed).use_elliptic_key_signer(private_key=keys[0])
    signer.sign(folder, folder / "model.sig")
    with pytest.raises(VerificationError, match=r"sub/notes\.txt"):
        check_signature(folder, keys[1])


def test_signing_again_replaces_the_signature(signed, keys):
    (signed / "README.md").write_text("Other card")
    write_record(signed, minimal_record())
    with pytest.raises(VerificationError, match=r"README\.md"):
        check_signature(signed, keys[1])
    sign_folder(signed, keys[0])
    check_signature(signed, keys[1])


def test_the_signature_does_not_go_through_a_link(folder, keys, tmp_path):
    (folder / "model.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match="symbolic link"):
        sign_folder(folder, keys[0])
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "README.md").write_text("card"), r"changed: README\.md\. Needed.*hf-ntp report"),
        (lambda folder: (folder / "sub" / "notes.txt").unlink(), r"missing: sub/notes\.txt\."),
        (lambda folder: (folder / "new.txt").write_text(""), r"added: new\.txt\."),
        (lambda folder: (folder / "training_args.bin").write_text(""), r"training_args\.bin"),
        (lambda folder: os.mkfifo(folder / "new.txt"), "pipe"),
        (lambda folder: (folder / "authorization.json").write_text("{}"), "schema_version"),
    ],
)
def test_a_folder_unlike_its_record_is_not_signed(folder, keys, edit, message):
    edit(folder)
    with pytest.raises(ValueError, match=message):
        sign_folder(folder, keys[0])
    assert not (folder / "model.sig").exists()


def test_a_folder_without_record_is_not_signed(folder, keys):
    (folder / "authorization.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no authorization\.json"):
        sign_folder(folder, keys[0])


def test_encrypted_keys(folder, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "locked.pem", tmp_path / "locked.pub.pem"
    private.write_bytes(private_pem(key, b"secret"))
    public.write_bytes(public_pem(key))
    for password in ("secret", b"secret"):
        sign_folder(folder, private, password)
        check_signature(folder, public)
    with pytest.raises(VerificationError, match="encrypted key without a password"):
        sign_folder(folder, private)
    with pytest.raises(VerificationError, match=r"cannot be read .*password"):
        sign_folder(folder, private, "wrong")
    private.write_bytes(private_pem(key))
    with pytest.raises(VerificationError, match="not encrypted and a password"):
        sign_folder(folder, private, "secret")


def wrong_keys():
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ed_key = ed25519.Ed25519PrivateKey.generate()
    odd_curve = ec.generate_private_key(ec.SECP256K1())
    return {
        "RSA": (private_pem(rsa_key), public_pem(rsa_key), "RSA.*P-256"),
        "Ed25519": (private_pem(ed_key), public_pem(ed_key), "Ed25519.*P-256"),
        "secp256k1": (private_pem(odd_curve), public_pem(odd_curve), "curve secp256k1 found.*P-256"),
        "swapped": (public_pem(odd_curve), private_pem(odd_curve), "a (private|public) key found"),
        "DER": (b"\x30\x77\x02\x01", b"\x30\x77\x02\x01", "not PEM"),
        "empty": (b"", b"", "not PEM"),
        "broken": (b"-----BEGIN EC PRIVATE KEY-----\nMHcC\n", b"-----BEGIN PUBLIC KEY-----\nMHcC\n", "PEM"),
    }


@pytest.mark.parametrize("kind", list(wrong_keys()))
def test_keys_that_do_not_fit(signed, tmp_path, kind):
    private, public, message = wrong_keys()[kind]
    path = tmp_path / "wrong.pem"
    path.write_bytes(private)
    with pytest.raises(VerificationError, match=message):
        sign_folder(signed, path)
    path.write_bytes(public)
    with pytest.raises(VerificationError, match=message):
        check_signature(signed, path)


def test_keys_that_are_not_there(signed, tmp_path):
    with pytest.raises(VerificationError, match=r"no readable file \(No such file.*openssl"):
        sign_folder(signed, tmp_path / "none.pem")
    with pytest.raises(VerificationError, match=r"no readable file.*Get it from the owner of the model"):
        check_signature(signed, tmp_path)


def test_no_signature(folder, keys):
    with pytest.raises(VerificationError, match=r"holds no model\.sig.*sign_folder"):
        check_signature(folder, keys[1])


def test_signature_by_another_key(signed, tmp_path):
    (tmp_path / "other").mkdir()
    _, other = make_keys(tmp_path / "other")
    with pytest.raises(VerificationError, match="Key mismatch"):
        check_signature(signed, other)


def test_signature_by_another_key_that_names_this_one(signed, keys, tmp_path):
    """What says which key was used is not signed itself."""
    ours = json.loads((signed / "model.sig").read_text())["verificationMaterial"]
    (tmp_path / "other").mkdir()
    sign_folder(signed, make_keys(tmp_path / "other")[0])
    theirs = json.loads((signed / "model.sig").read_text())
    (signed / "model.sig").write_text(json.dumps({**theirs, "verificationMaterial": ours}, separators=(",", ":")))
    with pytest.raises(VerificationError, match="does not verify"):
        check_signature(signed, keys[1])


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "garbage", "[" * 100_000, '{"dsseEnvelope": {"signatures": []}}', " " * (9 << 20)],
    ids=range(8),
)
def test_garbage_signatures(signed, keys, text):
    (signed / "model.sig").write_text(text)
    with pytest.raises(VerificationError, match=r"model\.sig"):
        check_signature(signed, keys[1])


@pytest.mark.parametrize(
    "edit", [lambda t: t + "\n", lambda t: t.replace(":", ": ", 1), lambda t: t[:-2] + ',"a":1}}']
)
def test_signatures_have_one_spelling(signed, keys, edit):
    path = signed / "model.sig"
    path.write_text(edit(path.read_text()))
    with pytest.raises(VerificationError, match="was changed"):
        check_signature(signed, keys[1])


@pytest.mark.parametrize("hint", [None, "", "00", 64 * "0", {}])
def test_signatures_say_which_key_made_them(signed, keys, hint, capsys):
    bundle = json.loads((signed / "model.sig").read_text())
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint
    (signed / "model.sig").write_text(json.dumps(bundle, separators=(",", ":")))
    with pytest.raises(VerificationError, match=r"model\.sig"):
        check_signature(signed, keys[1])
    assert capsys.readouterr().out == ""


def test_known_digests_are_not_computed_again(signed, keys):
    digests = dict.fromkeys(["README.md", "authorization.json", "sub/notes.txt"], "0" * 64)
    with pytest.raises(VerificationError, match="Hash mismatch"):
        check_signature(signed, keys[1], digests)
