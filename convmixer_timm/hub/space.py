"""A model's page as a static Space of the Hub, beside the model's repository."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCard, SpaceCardData, constants

from ..web.page import page
from .cards import BEGIN, END, around_marks, compose_card, listed, put_between, read_card

__all__ = ["build_space", "is_untouched", "merge_space_cards", "space_url"]

# What the Hub puts into a static Space that is new: these files, and this sentence into its page.
_TEMPLATE = {".gitattributes", "README.md", "index.html", "style.css"}
_WELCOME = "Welcome to your static Space!"
# What a page needs, whatever people made of its card.
_OURS = ("sdk", "app_file")


def space_url(repo_id: str) -> str:
    """The address of the Space of that name."""
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def build_space(model_folder: Path, folder: Path, repo_id: str) -> None:
    """Writes the page of a packed model, with the card by which the Hub serves it.

    Args:
        model_folder: The packed model.
        folder: Folder to make; its name is the page's title.
        repo_id: The model's repository, which is the Space's name too.

    Raises:
        ValueError, RuntimeError: As from `convmixer_timm.page`.
    """
    address = f"{constants.ENDPOINT}/{repo_id}"
    page(f"local-dir:{model_folder}", folder, title=folder.name, link=address)
    data = SpaceCardData(
        title=folder.name,
        emoji="🔎",
        colorFrom="red",
        colorTo="yellow",
        sdk="static",
        app_file="index.html",
        license=ModelCard.load(model_folder / "README.md").data.license,
        models=[repo_id],
        short_description="An image classifier in your browser",
    )
    text = (
        f"# {folder.name}\n\n[{repo_id}]({address}), in the visitor's browser. Made by `convmixer-timm publish --page`."
    )
    (folder / "README.md").write_text(compose_card(data, f"{BEGIN}\n\n{text}\n\n{END}"), encoding="utf-8")


def is_untouched(files: Iterable[str], index: str | None) -> bool:
    """Whether a Space with files of these names, and that ``index.html``, holds nothing that somebody made."""
    return set(files) <= _TEMPLATE and (index is None or _WELCOME in index)


def merge_space_cards(new: str, old: str) -> str:
    """A Space's new card with what people wrote into the old one: metadata, and text outside the marks.

    Raises:
        ValueError: As from `read_card`.
    """
    mine, theirs = SpaceCard(new), read_card(old, SpaceCard)
    around = around_marks(theirs.text)
    if around is None:  # a new Space's
        return new
    ours, kept = mine.data.to_dict(), theirs.data.to_dict()
    merged = {**ours, **kept, **{key: ours[key] for key in _OURS}}
    merged["models"] = list(dict.fromkeys([*ours["models"], *listed(kept.get("models"))]))
    return compose_card(SpaceCardData(**merged), put_between(mine.text, around))
