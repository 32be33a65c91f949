"""The command `hf-ntp`: every subcommand is one function of the public API.

Exit codes: 0 done, 1 refused or failed with a message on standard error, 2 wrong usage. With `--json` standard output
is one JSON document, and everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from getpass import getpass
from importlib import import_module
from pathlib import Path
from typing import Any
from unicodedata import category

from .interruption import EXPECTED, unwind_on_sigterm

# Nothing heavy is imported before a subcommand needs it: `hf-ntp --help` is instant.


_PASSWORD = "HF_NTP_KEY_PASSWORD"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        help: One line.
        run: Takes the parsed options and returns what `--json` prints.
        show: The same for people.
        options: Adds its options to a parser.
    """

    help: str
    run: Callable[[Namespace], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    options: Callable[[ArgumentParser], None]


# These read their options themselves: they are the recipes, with all options of the Trainer.
_RECIPES = {
    "protect": ("ntp_vit", "Protect a model, measure it and write the folder to publish."),
    "protect-encoder": ("ntp_ssl", "Protect an encoder without a head and without labels of the authorized domain."),
    "evaluate": ("ntp_attack", "Attack a checkpoint: learning curves, SLC-AUC and retained transfer per attack."),
}


def _folder(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a protected model")


def _checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder or Hub id of a protected model")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    _hub_options(parser)


def _hub_options(parser: ArgumentParser) -> None:
    parser.add_argument("--token", help="access token; default the one of `hf auth login`")
    parser.add_argument("--timeout", type=float, help="seconds that a request may make no progress")


def _on_the_hub(options: Namespace) -> dict[str, Any]:
    return {"token": options.token, **({} if options.timeout is None else {"timeout": options.timeout})}


def _report_options(parser: ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument(
        "--attacks",
        help="results.json of `hf-ntp evaluate` on this model, to be added; it replaces one on the same domain, and "
        "has to have its attacks. Controls and a third domain are not published",
    )
    parser.add_argument("--repo_id", help="what the card says to load; default what it says already")
    parser.add_argument("--license", help="licence id; default what the record says already")
    parser.add_argument("--terms", help="what you allow, in words; default what the record says already")


def _report(options: Namespace) -> dict[str, Any]:
    from .publishing.report import refresh_report

    refresh_report(options.folder, options.attacks, options.repo_id, options.license, options.terms)
    return {"folder": options.folder, "files": sorted(_read(options.folder)["files"])}


def _compress_options(parser: ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("out", help="folder to make")


def _compress(options: Namespace) -> dict[str, Any]:
    from .publishing.report import compress_report

    return {"folder": str(compress_report(options.folder, options.out))}


def _expand(options: Namespace) -> dict[str, Any]:
    from .publishing.report import expand_report

    return {"folder": str(expand_report(options.folder, options.out))}


def _sign_options(parser: ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument(
        "--private_key",
        required=True,
        help=f"elliptic-curve key, PEM; the password of an encrypted one is taken from {_PASSWORD}, or asked for",
    )


def _password(private_key: str) -> str | None:
    """Password of a key that is encrypted: not from the command line, which others see and shells remember."""
    try:
        encrypted = b"ENCRYPTED" in Path(private_key).read_bytes()
    except OSError:
        return None  # who signs will say what is wrong with it
    if not encrypted:
        return None
    if (given := os.environ.get(_PASSWORD)) is not None:
        return given
    if not sys.stdin.isatty():
        raise ValueError(
            f"{private_key} is encrypted and {_PASSWORD} is not set; needed: its password. Set it, or sign in a "
            "terminal, where it is asked for."
        )
    return getpass(f"Password of {private_key}: ")


def _sign(options: Namespace) -> dict[str, Any]:
    from .publishing.signing import sign_folder

    return {"signature": str(sign_folder(options.folder, options.private_key, _password(options.private_key)))}


def _verify_options(parser: ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument("--public_key", help="the owner's, PEM; without it only the record's digests are checked")


def _verify(options: Namespace) -> dict[str, Any]:
    from .publishing.fetching import verify_checkpoint

    found = verify_checkpoint(options.checkpoint, options.revision, options.public_key, **_on_the_hub(options))
    return {"signature_checked": found.signed, "files": found.files, "record": found.record}


def _show_verify(found: dict[str, Any]) -> str:
    checked = (
        "the signature is the owner's, and every file is as it was signed"
        if found["signature_checked"]
        else "every file is as the record says; NOT checked whose record that is: pass --public_key"
    )
    return f"{found['files']} files: {checked}\n\n{_show_record(found['record'])}"


def _push_options(parser: ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("repo_id", help="ORG/NAME on the Hub; made when missing")
    parser.add_argument(
        "--public",
        action="store_true",
        help="make the repository public, also one that is private now; default private",
    )
    parser.add_argument("--gated", choices=["auto", "manual"], help="let visitors ask for access first")
    parser.add_argument("--branch", help="branch to push to; made when missing")
    parser.add_argument("--private_key", help="sign the folder first, as `hf-ntp sign` does")
    parser.add_argument("--public_key", help="check the signature before pushing")
    _hub_options(parser)


def _push(options: Namespace) -> dict[str, Any]:
    from .publishing.hub import push_folder
    from .publishing.signing import sign_folder

    if options.private_key is not None:
        sign_folder(options.folder, options.private_key, _password(options.private_key))
    commit = push_folder(
        options.folder,
        options.repo_id,
        private=not options.public,
        gated=options.gated or False,
        branch=options.branch,
        public_key=options.public_key,
        **_on_the_hub(options),
    )
    return {"commit": commit.oid, "url": commit.commit_url}


def _info(options: Namespace) -> dict[str, Any]:
    from .publishing.fetching import fetch_record

    return fetch_record(options.checkpoint, options.revision, **_on_the_hub(options))


def _read(folder: str) -> dict[str, Any]:
    from .publishing.record import read_record

    return read_record(folder)


def _show_record(record: dict[str, Any]) -> str:
    from .publishing.card import attack_label
    from .publishing.wording import percent

    lines = [f"{'terms':<16}{line}" for line in record["terms"]["text"].splitlines()]
    for word, side in (("authorized", "authorized_domains"), ("NOT authorized", "unauthorized_domains")):
        lines += [f"{word:<16}{domain['name']} ({domain['dataset']})" for domain in record[side]]
    sparsity, accuracy = record["sparsity"], record["source_accuracy"]
    lines.append(f"{'sparsity':<16}{sparsity['achieved']:.4f} of {sparsity['prunable_weights']:,} weights")
    if accuracy is not None:
        measure = accuracy["measure"].replace("_", " ")
        lines.append(f"{'source':<16}{measure} {accuracy['before']:.3f} before, {accuracy['after']:.3f} after")
    # A domain may have been measured twice, by the standard attacker and by the attack suite.
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for measurement in record["evidence"]:
        by_domain.setdefault(measurement["domain"], []).append(measurement)
    for domain, measured in by_domain.items():
        worst = max((measurement["worst_case"] for measurement in measured), key=lambda found: found["slc_auc"])
        attacks = set().union(*(measurement["attacks"] for measurement in measured))
        share = worst["retained_transfer"]
        retained = "" if share is None else f", {percent(share)} of the best before protection"
        lines.append(
            f"{'worst attack':<16}{attack_label(worst['attack'])} on {domain}: SLC-AUC "
            f"{worst['slc_auc']:+.3f} (normalized){retained}; {len(attacks)} attacks measured"
        )
    if not record["evidence"]:
        lines.append(f"{'evidence':<16}none was measured")
    lines += [f"{'not claimed':<16}{item}" for item in record["not_tested"]]
    # Nothing that a record says may move the cursor or begin a line: it could forge what stands above it.
    return "\n".join("".join(map(_printable, line)) for line in lines)


def _printable(character: str) -> str:
    harmless = character.isprintable() or category(character) == "Zs"
    return character if harmless else ascii(character)[1:-1]


COMMANDS = {
    "report": Command(
        "Write figures, card and record of a folder anew, with attacks added; a card that you edited is kept.",
        _report,
        lambda found: f"wrote the report of {found['folder']}: {', '.join(found['files'])}",
        _report_options,
    ),
    "compress": Command(
        "Copy a folder with the weights stored without their zeros; loads only where hf_ntp is imported.",
        _compress,
        lambda found: f"wrote {found['folder']}; sign it anew",
        _compress_options,
    ),
    "expand": Command(
        "Undo compress.",
        _expand,
        lambda found: f"wrote {found['folder']}; sign it anew",
        _compress_options,
    ),
    "sign": Command(
        "Sign a folder with an elliptic-curve key.",
        _sign,
        lambda found: f"wrote {found['signature']}",
        _sign_options,
    ),
    "verify": Command(
        "Check that a model is what its owner published.", _verify, _show_verify, _verify_options
    ),
    "push": Command(
        "Publish a folder on the Hub, in one commit.", _push, lambda found: f"pushed: {found['url']}", _push_options
    ),
    "info": Command("Show the authorization record of a model.", _info, _show_record, _checkpoint),
}  # fmt: skip


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="hf-ntp", description="Protect, measure, publish and verify vision encoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in _RECIPES.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        command.options(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _recipe(name: str, argv: list[str]) -> None:
    as_json = "--json" in argv
    sys.argv[0] = f"hf-ntp {name}"  # what its help calls it
    run = import_module(f"hf_ntp.recipes.{_RECIPES[name][0]}").main
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        found = run([word for word in argv if word != "--json"])
    if as_json:
        print(json.dumps(found))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    if argv is None:
        unwind_on_sigterm()
        argv = sys.argv[1:]
    try:
        if argv and argv[0] in _RECIPES:
            _recipe(argv[0], argv[1:])
            return 0
        options = _parser().parse_args(argv)
        command = COMMANDS[options.command]
        with redirect_stdout(sys.stderr):
            found = command.run(options)
        print(json.dumps(found) if options.json else command.show(found))
    except EXPECTED as error:
        print(f"hf-ntp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
