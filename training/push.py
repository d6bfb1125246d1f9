"""A trained run to the Hugging Face Hub: the recommender with its card, on request its data and a demo.

python training/push.py runs/sample me/my-recommender --dry-run
"""

import argparse
from pathlib import Path

from training.command_line import run_plainly, said_aloud
from training.hub.publish import Options, publish


def make_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, such as runs/sample; it is not changed")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="the model's repo, such as me/my-recommender")
    parser.add_argument(
        "--dataset",
        metavar="REPO",
        help="send the data too, as Parquet; the model's recipe then names them (say so at every push)",
    )
    parser.add_argument("--space", metavar="REPO", help="send a demo of the model too, a Gradio Space")
    parser.add_argument("--private", action="store_true", help="make the repos private")
    parser.add_argument("--revision", metavar="BRANCH", default="main", help="branch of model and data (default: main)")
    parser.add_argument("--tag", help="tag the model's new commit")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would go, with sizes, and what of it is about people"
    )
    parser.add_argument(
        "--without-user-embeddings", action="store_true",
        help="leave the users' embeddings out; the model then serves people by their history",
    )  # fmt: skip
    parser.add_argument(
        "--user-ids-are-words",
        action="store_true",
        help="raw user ids that were found in the files are common words too: send them",
    )
    return parser


def push(arguments: argparse.Namespace) -> None:
    """Send what the arguments ask for.

    Raises:
        InputError: naming what is wrong and the remedy; nothing here was changed.
    """
    options = Options(
        private=arguments.private,
        branch=arguments.revision,
        tag=arguments.tag,
        dry_run=arguments.dry_run,
        user_embeddings=not arguments.without_user_embeddings,
        ids_are_words=arguments.user_ids_are_words,
    )
    publish(arguments.run, arguments.repo, dataset=arguments.dataset, space=arguments.space, options=options)


def main() -> None:
    """The command line."""
    arguments = make_parser().parse_args()
    with said_aloud():
        run_plainly(lambda: push(arguments))


if __name__ == "__main__":
    main()
