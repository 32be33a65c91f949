"""Signatures over model folders, in the format of OpenSSF Model Signing.

``model_signing verify key`` on the command line checks them, too. For keyless signatures with Sigstore, which need a
network and an identity, call that library directly, on a folder with its record::

    hashed = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"])
    signer = model_signing.signing.Config().set_hashing_config(hashed).use_sigstore_signer(identity_token=token)
    signer.sign(folder, folder / "model.sig")

    verifier = model_signing.verifying.Config().use_sigstore_verifier(identity=owner, oidc_issuer=issuer)
    verifier.verify(folder, folder / "model.sig")
    hf_ntp.verify_folder(folder)  # types, digests and record
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..run_folder import clear_unfinished, whole_file
from .contents import check_contents
from .errors import VerificationError, listed
from .files import folder_files, read_bounded, regular_file, sha256_of
from .record import SIGNATURE_FILE, check_files, read_record
from .strict_json import strict_json

if TYPE_CHECKING:
    from model_signing.manifest import Manifest

_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_MAX_KEY_BYTES = 64 << 10
_MAX_SIGNATURE_BYTES = 8 << 20
# Told to other verifiers, which would count these files otherwise; see folder_files for the reasons.
_IGNORED = [SIGNATURE_FILE, ".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore"]


def sign_folder(folder: str | Path, private_key: str | Path, password: str | bytes | None = None) -> Path:
    """Sign every file of a model folder, record included, with an elliptic-curve key; replaces an older signature.

    Args:
        folder: Folder of a protected model with its record.
        private_key: PEM file with a key on P-256, P-384 or P-521, as ``openssl ecparam -name prime256v1 -genkey``
            writes it. Keep it outside of the folder.
        password: Of an encrypted key.

    Returns:
        Path of the signature, ``model.sig`` in the folder.

    Raises:
        FileNotFoundError: If there is no record.
        RecordError: If record, files or key are not fit for it: a folder that was edited after its record was written
            is not signed.
    """
    from model_signing.signing import Config

    secret = password.encode() if isinstance(password, str) else password
    _check_private_key(private_key, secret)
    clear_unfinished(Path(folder))
    files = check_contents(folder)
    digests = sha256_of({name: path for name, path in files.items() if name != SIGNATURE_FILE})
    check_files(read_record(folder), digests)
    # The library types the password as str and then needs bytes.
    signer: Any = Config().use_elliptic_key_signer(private_key=private_key, password=secret)  # type: ignore[arg-type]
    with TemporaryDirectory() as scratch:
        written = Path(scratch) / SIGNATURE_FILE
        signer.set_hashing_config(_KnownDigests(digests)).sign(folder, written)
        text = _bundle_text(json.loads(written.read_text(encoding="utf-8")))
    signature = Path(folder) / SIGNATURE_FILE
    with whole_file(signature) as staged:
        staged.write_text(text, encoding="utf-8")
    return signature


def check_signature(
    folder: str | Path,
    public_key: str | Path,
    digests: Mapping[str, str] | None = None,
    links_into: str | Path | None = None,
) -> None:
    """Check that the signature of a model folder is by this key and over exactly these files.

    A signature says who, not when: an older folder that the owner once signed passes, too.

    Args:
        folder: Folder of a protected model.
        public_key: PEM file of the owner, got from the owner and not from the folder.
        digests: SHA-256 of every file but the signature, by name, where known; otherwise the files are hashed here.
        links_into: Folder that symbolic links may lead into, as in :func:`~hf_ntp.verify_folder`.

    Raises:
        VerificationError: If the key cannot be used, or the signature is missing, garbage, by another key or over
            other files.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing.verifying import Config

    check_public_key(public_key)
    files = folder_files(folder, links_into)
    if SIGNATURE_FILE not in files:
        raise VerificationError(
            f"{folder} holds no {SIGNATURE_FILE}, but a key to check it with was given; needed: a folder signed with "
            "sign_folder. Ask the owner for one, or leave public_key out to check the digests alone."
        )
    signature = regular_file(files.pop(SIGNATURE_FILE))
    _check_spelling(signature)
    verifier: Any = Config().use_elliptic_key_verifier(public_key=public_key)
    verifier.set_hashing_config(_KnownDigests(sha256_of(files) if digests is None else digests))
    try:
        verifier.verify(folder, signature)
    except InvalidSignature as error:
        raise VerificationError(
            f"{folder}: {SIGNATURE_FILE} does not verify with {public_key}: what it signs was changed. Download the "
            "folder anew."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(
            f"{folder}: {SIGNATURE_FILE} does not verify with {public_key} ({_told(error)}); needed: a signature by "
            "this key over exactly the files there. Download the folder anew and check with its owner that the key is "
            "theirs."
        ) from error


def check_signed_files(signature: Path, digests: Mapping[str, str]) -> None:
    """Check that a signature is over the files of its folder; whose it is takes a key to tell.

    Args:
        signature: A regular file.
        digests: SHA-256 of every other file of the folder, by name.

    Raises:
        VerificationError: If it is garbage, or over other files.
    """
    _check_spelling(signature)
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    try:
        resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        signed = {resource["name"]: resource["digest"] for resource in resources}
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{signature} says of no files what they are ({type(error).__name__}); needed: the file as sign_folder "
            "wrote it. Sign the folder anew, or remove it."
        ) from error
    if differing := sorted(name for name in {*signed, *digests} if signed.get(name) != digests.get(name)):
        raise VerificationError(
            f"{signature} was made for other files (by {listed(differing)}): nobody could verify it. Sign the folder "
            "anew (hf-ntp sign), or remove the signature."
        )


def _told(error: Exception) -> str:
    """What the library found; of files that differ the names, without digests as escaped bytes."""
    names = re.findall(r"Hash mismatch for \\*'(.+?)\\*'", str(error))
    return f"Hash mismatch for {', '.join(map(repr, names))}" if names else str(error)[:600]


class _KnownDigests:
    """Stands in for ``model_signing.hashing.Config`` with digests that are known already.

    Hashing is most of the time and the record needs the same digests. It also decides itself what counts as a file:
    nothing that a signature lists as ignored escapes the check.
    """

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = {name: digest for name, digest in digests.items() if name != SIGNATURE_FILE}

    def hash(self, model_path: str | Path, files_to_hash: None = None) -> Manifest:
        """Manifest of all files, as one per file with SHA-256."""
        from model_signing._hashing.hashing import Digest
        from model_signing.manifest import FileManifestItem, Manifest, SerializationType

        items = [
            FileManifestItem(path=Path(name), digest=Digest("sha256", bytes.fromhex(digest)))
            for name, digest in self._digests.items()
        ]
        way = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": _IGNORED}
        return Manifest(Path(model_path).resolve().name, items, SerializationType.from_args(way))

    def add_ignored_paths(self, **_: Any) -> None:
        """Called with what the signature lists as ignored; nothing is."""


def _bundle_text(bundle: Any) -> str:
    """The one spelling of a signature: JSON and base64 would allow many, and a changed byte should show."""
    envelope = bundle["dsseEnvelope"]
    (signature,) = envelope["signatures"]
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    if len(hint) != 64:
        # The library would go on without comparing keys.
        raise ValueError(f"SHA-256 of the public key expected, {str(hint)[:80]!r} found")
    spelled = {
        "mediaType": bundle["mediaType"],
        "verificationMaterial": {
            "publicKey": {"hint": hint},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": _base64_text(envelope["payload"]),
            "payloadType": envelope["payloadType"],
            "signatures": [{"sig": _base64_text(signature["sig"]), "keyid": ""}],
        },
    }
    return json.dumps(spelled, separators=(",", ":"))


def _base64_text(text: str) -> str:
    return base64.b64encode(base64.b64decode(text, validate=True)).decode()


def _check_spelling(path: Path) -> None:
    data = read_bounded(path, _MAX_SIGNATURE_BYTES)
    try:
        matches = _bundle_text(strict_json(data)).encode() == data
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{path} is not a signature by an elliptic-curve key ({type(error).__name__}: {str(error)[:200]}); "
            "needed: the file as sign_folder wrote it. Download it anew."
        ) from error
    if not matches:
        raise VerificationError(f"{path} was changed; needed: the file as sign_folder wrote it. Download it anew.")


def check_public_key(path: str | Path) -> None:
    """Refuse what is not the PEM file of a public key on P-256, P-384 or P-521.

    Raises:
        VerificationError: Saying what was found instead.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    wrong = partial(_wrong_key, path, private=False)
    data = _read_pem(path, wrong, "public key")
    if b"PRIVATE KEY" in data:
        raise wrong("a private key", "its public half, as `openssl ec -pubout` writes it")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise wrong("PEM without a readable public key", "as `openssl ec -pubout` writes it") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise wrong(_kind(key), f"an elliptic-curve key on {', '.join(_CURVES.values())}")


def _check_private_key(path: str | Path, password: bytes | None) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    wrong = partial(_wrong_key, path, private=True)
    data = _read_pem(path, wrong, "private key")
    if b"PUBLIC KEY" in data:
        raise wrong("a public key", "the private key that belongs to it")
    try:
        key = load_pem_private_key(data, password)
    except TypeError as error:
        if password is None:
            raise wrong("an encrypted key without a password", "its password=") from error
        raise wrong("a key that is not encrypted and a password", "no password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise wrong(f"PEM that cannot be read ({error})", "an intact key and its password") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise wrong(_kind(key), f"an elliptic-curve key on {', '.join(_CURVES.values())}")


def _read_pem(path: str | Path, wrong: Callable[[str, str], VerificationError], what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise wrong(f"no readable file ({error.strerror})", f"a PEM file with a {what}") from error
    if b"-----BEGIN " not in data:
        raise wrong("a file that is not PEM", f'a {what} that starts with "-----BEGIN"')
    return data


def _kind(key: Any) -> str:
    curve = getattr(getattr(key, "curve", None), "name", None)
    return f"a key on the curve {curve}" if curve else f"a key of type {type(key).__name__}"


def _wrong_key(path: str | Path, found: str, needed: str, private: bool) -> VerificationError:
    fix = (
        "Make a key with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`."
        if private
        else "Get it from the owner of the model, who makes it with `openssl ec -in key.pem -pubout -out key.pub.pem`."
    )
    return VerificationError(f"{path}: {found} found; needed: {needed}. {fix}")
