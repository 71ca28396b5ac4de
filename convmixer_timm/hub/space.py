"""A model's page as a static Space of the Hub, beside the model's repository."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCard, SpaceCardData, constants

from ..errors import HubError
from ..web.page import page
from .cards import BEGIN, END, around_marks, compose_card, put_between

__all__ = ["build_space", "link_space", "merge_space_cards", "space_url"]

_TEMPLATE = "Check out the configuration reference"  # begins the card of a Space that is new
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


def link_space(card: str, repo_id: str) -> str:
    """A model's card with a line for its page, below the title."""
    line = f"**[Try it in your browser]({space_url(repo_id)})**\n\n"
    return re.sub(re.escape(BEGIN) + r"\n\n(# .*\n\n)?", lambda found: found[0] + line, card, count=1)


def merge_space_cards(new: str, old: str) -> str:
    """A Space's new card with what people wrote into the old one: metadata, and text outside the marks.

    Raises:
        HubError: If the Space is something else than such a page.
    """
    mine, theirs = SpaceCard(new), SpaceCard(old)
    around = around_marks(theirs.text)
    if around is None:
        if theirs.text.strip() and not theirs.text.strip().startswith(_TEMPLATE):
            raise HubError("there is a Space of that name already, and it is no such page: rename it first")
        return new
    ours, kept = mine.data.to_dict(), theirs.data.to_dict()
    merged = {**ours, **kept, **{key: ours[key] for key in _OURS}}
    merged["models"] = list(dict.fromkeys([*ours["models"], *kept.get("models", ())]))
    return compose_card(SpaceCardData(**merged), put_between(mine.text, around))
