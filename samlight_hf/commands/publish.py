"""`samlight publish` and `samlight card`: upload a checkpoint to the Hub, and write its model card."""

import argparse
import dataclasses
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.atomic_files import atomic_write
from ..utils.messages import one_line
from .options import (
    EXAMPLE_IMAGES,
    not_empty,
    parse_not_negative,
)


if TYPE_CHECKING:
    from ..publishing.upload import PublishedRevision


def add_card_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folder", type=not_empty, metavar="FOLDER", help="the checkpoint's, with config.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it, such as FOLDER/README.md (stdout)")
    parser.add_argument("--repo-id", metavar="REPO", help="org/name that the examples load from (FOLDER)")
    parser.add_argument("--revision", metavar="NAME", help="tag or commit that the examples load")
    _add_fact_arguments(parser)


def add_publish_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "folder", type=not_empty, metavar="FOLDER", help="the checkpoint's: a student, or any checkpoint-N"
    )
    parser.add_argument("repo_id", type=not_empty, metavar="REPO", help="org/name; made where there is none")
    parser.add_argument(
        "--dry-run", action="store_true", help="build and verify, list files and show the card; no network"
    )
    parser.add_argument(
        "--private", action="store_true", default=None, help="for a new repository; refused for a public one"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="made where there is none (main)")
    parser.add_argument("--tag", metavar="TAG", help="name the commit; the card's examples then load it by this name")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument(
        "--max-shard-size", type=_shard_size, metavar="SIZE", help="split the weights, such as 2GB (one file)"
    )
    parser.add_argument(
        "--retries", type=parse_not_negative, default=4, metavar="N", help="after failures that may pass (%(default)s)"
    )
    parser.add_argument(
        "--image", "--picture", dest="image", type=Path, metavar="FILE", help="to verify on (a bundled photograph)"
    )
    parser.add_argument("--card", type=Path, metavar="FILE", help="a model card of your own")
    space = parser.add_argument_group("a Space, a page on which anyone can try the model (docs/app.md)")
    space.add_argument("--space", nargs="?", const="", metavar="SPACE", help="publish one too: org/name (REPO)")
    space.add_argument("--space-out", type=Path, metavar="DIR", help="write its folder here as well, to run it")
    _add_fact_arguments(parser)


def _shard_size(text: str) -> str:
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB.")
    return text


def _add_fact_arguments(parser: argparse.ArgumentParser):
    card = parser.add_argument_group("what the card says (docs/publishing.md); without, what lies in FOLDER")
    card.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="report.json of `samlight evaluate` (evaluation.json)"
    )
    card.add_argument(
        "--training", type=Path, nargs="+", metavar="JSON", help="result.json of the stages (training.json)"
    )
    card.add_argument("--benchmark", type=Path, metavar="JSON", help="of benchmarks/run.py")
    card.add_argument(
        "--license", metavar="ID", help="of the weights, as the Hub names it: apache-2.0, ..., other (card.yaml)"
    )
    card.add_argument("--license-name", metavar="NAME", help="with --license other")
    card.add_argument("--license-link", metavar="URL", help="with --license other")
    card.add_argument("--base-model", metavar="REPO", help="the teacher's Hub name (card.yaml)")


def run_card(args: argparse.Namespace) -> int:
    """Print the model card, or write it to `--out`. Returns the exit status."""
    card = _card(args, args.repo_id, args.revision)
    if args.out is None:
        print(card, end="")
    else:
        atomic_write(args.out, lambda path: path.write_text(card, encoding="utf-8"))
        print(f"Card: {args.out}")
    return 0


def run_publish(args: argparse.Namespace) -> int:
    """Build the folder, verify it, upload it in one commit, and print how to load that commit.

    Returns:
        The exit status.

    Raises:
        ArgumentTypeError: for names that the Hub does not take, and for weights without a licence.
    """
    from ..publishing.build import build_folder
    from ..publishing.card import CardFacts
    from ..publishing.checks import metadata_of
    from ..publishing.space import check_space, check_space_folder, thresholds_of
    from ..publishing.upload import check_target, publish, verify_folder

    wants_space = args.space is not None or args.space_out is not None
    space_id = args.space or args.repo_id
    try:
        check_target(args.repo_id, args.revision, args.tag, args.pr)
        check_target(space_id, None, None, False)
        if args.space_out is not None:
            check_space_folder(args.space_out)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if args.card is None:
        card = _card(args, args.repo_id, args.tag or args.revision)  # what is on main may be another model
        _tell_unused_card(Path(args.folder))
    else:
        card = _own_card(args)
    if not metadata_of(card).get("license"):
        raise argparse.ArgumentTypeError(
            "the weights have no licence, so nobody may use them. Say it with --license, or license: in card.yaml; "
            "it follows from the training data and the teacher."
        )
    thresholds = thresholds_of(CardFacts.read(args.folder).thresholds)
    if args.space is not None and not args.dry_run:
        check_space(space_id, private=args.private, retries=args.retries)
    with tempfile.TemporaryDirectory(prefix="samlight-publish-") as place:
        folder = Path(place) / "folder"
        files = build_folder(args.folder, folder, card, args.max_shard_size)
        report = verify_folder(folder, args.image)
        for file in files:
            print(f"{file.stat().st_size:>14,}  {file.name}")
        print(f"{report.num_bytes:>14,}  bytes in {len(files)} files")
        print(
            f"Verified on {report.image} in {report.seconds:.0f} s: without this package, transformers computes the "
            f"same {len(report.outputs)} outputs bit by bit."
        )
        if args.dry_run:
            print(f"\n--- README.md ---\n{card}--- end of README.md ---\n")
        published = publish(
            folder, args.repo_id, private=args.private, revision=args.revision, tag=args.tag, create_pr=args.pr,
            dry_run=args.dry_run, commit_message=args.message, retries=args.retries, verify=False,
        )  # fmt: skip
    _tell(published)
    if wants_space:
        _publish_space(args, space_id, published, thresholds)
    return 0


def _publish_space(
    args: argparse.Namespace, space_id: str, published: "PublishedRevision", thresholds: tuple[float, float]
):
    """Write a Space of the published commit, and upload it where `--space` asks for that."""
    from ..publishing.space import SpaceSettings, build_space, publish_space

    # A pull request's commit is not in the repository yet: the Space then loads the newest.
    revision = None if published.pr_url else published.commit
    settings = SpaceSettings(args.repo_id, space_id, revision, thresholds)
    with tempfile.TemporaryDirectory(prefix="samlight-space-") as place:
        folder = Path(place) / "space" if args.space_out is None else args.space_out
        files = build_space(folder, settings, sorted(EXAMPLE_IMAGES.glob("*.jpg")))
        print(f"Space: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
        if args.space_out is not None:
            model = "" if published.commit else f"SAMLIGHT_MODEL={shlex.quote(args.folder)} "  # not on the Hub yet
            print(f"Written: {folder}; {model}python {shlex.quote(str(folder / 'app.py'))} runs it here.")
        if args.space is None:
            return
        if args.dry_run:
            print(f"Dry run: the Space {space_id} was not sent.")
            return
        print(f"Space: {publish_space(folder, space_id, private=args.private, retries=args.retries)}")
        if args.private:
            print("The model is private: set the secret HF_TOKEN in the Space's settings, or it cannot be loaded.")


def _tell(published: "PublishedRevision"):
    if published.commit is None:
        print(f"Dry run: nothing was sent. It would become {published.url}.")
        return
    print(f"Pull request: {published.pr_url}" if published.pr_url else f"Published: {published.url}")
    print(
        "Pinned: AutoModelForMaskGeneration.from_pretrained("
        f'"{published.repo_id}", revision="{published.commit}", trust_remote_code=True)'
    )


def _card(args: argparse.Namespace, repo_id: str | None, revision: str | None) -> str:
    from ..publishing.card import CardFacts, render_card

    options = {
        "license": args.license, "license_name": args.license_name, "license_link": args.license_link,
        "base_model": args.base_model,
    }  # fmt: skip
    if (args.license_name or args.license_link) and args.license not in (None, "other"):
        raise argparse.ArgumentTypeError(
            f"--license-name and --license-link go with --license other, not {args.license}."
        )
    facts = CardFacts.read(args.folder)
    if args.license:  # another licence has another name
        facts = dataclasses.replace(facts, license_name=None, license_link=None)
    facts = dataclasses.replace(facts, **{name: value for name, value in options.items() if value})
    return render_card(
        args.folder, evaluation=args.evaluation, training=args.training, benchmark=args.benchmark, facts=facts,
        repo_id=repo_id, revision=revision,
    )  # fmt: skip


def _own_card(args: argparse.Namespace) -> str:
    """Return the text of `--card`. Raises ArgumentTypeError for options that are only for a card that is made."""
    try:
        card = args.card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.card}: no text in UTF-8 ({one_line(error)}). Save it again as UTF-8.") from error
    facts = ("evaluation", "training", "benchmark", "license", "license_name", "license_link", "base_model")
    if given := [f"--{name.replace('_', '-')}" for name in facts if getattr(args, name)]:
        raise argparse.ArgumentTypeError(
            f"{given[0]} is for a card that is made here, and --card {args.card} is published as it is. Write it into "
            "that file, or leave one of them out."
        )
    return card


def _tell_unused_card(folder: Path):
    """Tell that the README.md in the folder is replaced by a new card, and how to publish it instead."""
    if (folder / "README.md").is_file():
        print(
            f"samlight: the card is made anew; --card {folder / 'README.md'} publishes the one that is there.",
            file=sys.stderr,
        )
