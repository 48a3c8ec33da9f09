"""Zenn's rules for an article: what is written is checked against them before it is kept."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

LONGEST_TITLE = 70
LONGEST_TEXT = 80_000
LARGEST_IMAGE = 3 * 1024 * 1024
MOST_TOPICS = 5
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")


def front_matter(title: str, emoji: str, topics: Sequence[str], *, published: bool = False) -> str:
    """The block at the head of an article; unpublished until a person has read it."""
    lines = [
        "---",
        f"title: {json.dumps(title, ensure_ascii=False)}",
        f"emoji: {json.dumps(emoji, ensure_ascii=False)}",
        'type: "tech"',
        f"topics: {json.dumps(list(topics), ensure_ascii=False)}",
        f"published: {'true' if published else 'false'}",
        "---",
    ]
    return "\n".join(lines) + "\n"


def problems(text: str, *, slug: str, root: Path | None = None) -> list[str]:
    """What in an article breaks Zenn's rules, a sentence each; ``root`` is where ``/images`` lies.

    The rules: a slug of 12-50 of ``[a-z0-9_-]``; front matter with title, one emoji, type, up to five topics, published;
    no HTML but ``<br>``; images below ``/images`` with an absolute path, of a known kind, of at most 3 MB; 80,000 characters.
    """
    found = []
    if not re.fullmatch(r"[a-z0-9_-]{12,50}", slug):
        found.append(f"the slug {slug!r} is not 12 to 50 of a-z, 0-9, - and _")
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    if match is None:
        return [*found, "there is no front matter"]
    found += _front_matter_problems(match.group(1))
    body = text[match.end() :]
    if len(body) > LONGEST_TEXT:
        found.append(f"the text has {len(body)} characters, allowed are {LONGEST_TEXT}")
    found += _body_problems(body, root)
    return found


def _front_matter_problems(block: str) -> list[str]:
    found, fields = [], {}
    for line in block.splitlines():
        name, colon, value = line.partition(": ")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            found.append(f"the front matter's line {line!r} cannot be read")
        if not colon:
            found.append(f"the front matter's line {line!r} has no value")
    for name in ("title", "emoji", "type", "topics", "published"):
        if name not in fields:
            found.append(f"the front matter has no {name}")
    if found:
        return found
    if not 1 <= len(fields["title"]) <= LONGEST_TITLE:
        found.append(f"the title has {len(fields['title'])} characters, allowed are 1 to {LONGEST_TITLE}")
    if not _one_emoji(fields["emoji"]):
        found.append(f"emoji is {fields['emoji']!r}, allowed is one emoji")
    if fields["type"] not in ("tech", "idea"):
        found.append(f"type is {fields['type']!r}, allowed are tech and idea")
    topics = fields["topics"]
    if len(topics) > MOST_TOPICS or not all(re.fullmatch(r"[a-z0-9]+", topic) for topic in topics):
        found.append(f"topics is {topics}, allowed are up to {MOST_TOPICS} of lower-case letters and digits")
    if not isinstance(fields["published"], bool):
        found.append("published is neither true nor false")
    return found


def _one_emoji(text: str) -> bool:
    # A variation selector or joiners may follow the picture itself.
    pictures = [c for c in text if c not in "\ufe0f\u200d"]
    return len(pictures) == 1 and ord(pictures[0]) >= 0x203C


def _body_problems(body: str, root: Path | None) -> list[str]:
    from markdown_it import MarkdownIt

    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        for piece in [token, *(token.children or [])]:
            if piece.type in ("html_block", "html_inline") and not re.fullmatch(r"\s*<br\s*/?>\s*", piece.content):
                found.append(f"HTML other than <br> stands in it: {piece.content.strip()[:40]!r}")
            if piece.type == "image":
                found += _image_problems(str(piece.attrs["src"]), root)
    return found


def _image_problems(source: str, root: Path | None) -> list[str]:
    if source.startswith("https://"):
        return []
    if not source.startswith("/images/"):
        return [f"the image {source} does not lie below /images"]
    if Path(source).suffix.lower() not in IMAGE_SUFFIXES:
        return [f"the image {source} is none of {', '.join(IMAGE_SUFFIXES)}"]
    if root is not None:
        file = root / source.lstrip("/")
        if not file.is_file():
            return [f"the image {source} is not there"]
        if file.stat().st_size > LARGEST_IMAGE:
            return [f"the image {source} is larger than 3 MB"]
    return []
