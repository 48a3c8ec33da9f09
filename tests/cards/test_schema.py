"""What a card may hold, and how its prose reads."""

import copy
import tomllib

import pytest

from saigen.cards import catalogue
from saigen.cards.schema import CardError, Prose, read_card


def test_japanese_has_no_space_where_a_line_of_the_file_ends():
    text = "順に捨て、\n精度を保つ。\nBN の後に\n  置く。損失は KL\n発散。"
    assert Prose(purpose=text, method="x", result="x", limits="x").purpose == (
        "順に捨て、精度を保つ。BN の後に置く。損失は KL\n発散。"
    )
    english = "A line\nand another.\n\nA paragraph."
    assert Prose(purpose="x", method=english, result="x", limits="x").method == english


@pytest.fixture
def card():
    """A good card as plain data, to be broken."""
    return tomllib.loads((catalogue.paper("sam").folder / "card.toml").read_text(encoding="utf-8"))


def _write(card, path):
    """The little of TOML that is needed here: strings, numbers, lists, tables."""
    import datetime
    import json

    def value(v):
        if isinstance(v, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, list):
            return "[" + ", ".join(map(value, v)) + "]"
        return v.isoformat() if isinstance(v, datetime.date) else json.dumps(v, ensure_ascii=False)

    path.write_text("\n".join(f"{json.dumps(k)} = {value(v)}" for k, v in card.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("venue"), "broken at venue"),
        (lambda c: c.update(nonsense=1), "broken at nonsense"),
        (lambda c: c["ja"].pop("limits"), r"broken at ja\.limits"),
        (lambda c: c.update(claim=[]), r"at least one \[\[claim\]\]"),
        (lambda c: c["claim"].append(copy.deepcopy(c["claim"][0])), "claim ids repeat"),
        (lambda c: c["claim"][0].update(scales=["real"]), "every claim has a laptop experiment"),
        (lambda c: c["claim"][0].update(quantities={}), "has no quantities"),
        (lambda c: c.update(deviations="none"), "state the deviations"),
    ],
)
def test_a_broken_card_names_the_file_the_field_and_the_rule(card, change, said, tmp_path):
    assert read_card(_write(card, tmp_path / "card.toml")).title == card["title"]
    change(card)
    with pytest.raises(CardError, match=said) as raised:
        read_card(_write(card, tmp_path / "card.toml"))
    assert str(tmp_path / "card.toml") in str(raised.value)


@pytest.mark.parametrize(
    ("anchors", "said"),
    [
        ({"kind": "bound", "reported": 0.1}, "a bound needs nothing"),
        ({"kind": "gap", "reported": 0.0}, "no effect to measure"),
        ({"kind": "ratio", "reported": -1.0}, "must be positive"),
        ({"kind": "gap", "reported": [0.2, 0.1]}, "from low to high"),
        ({"kind": "gap", "reported": 0.2, "least": -0.1}, "same side of nothing"),
        ({"kind": "order", "reported": [0.2, 0.1]}, "an order needs of"),
        ({"kind": "order", "reported": [0.1, 0.2], "of": ["a", "b"]}, "must decrease"),
        ({"kind": "trend", "reported": 1.0, "binary": True}, "a binary quantity"),
    ],
)
def test_anchors_that_cannot_be_judged(card, anchors, said, tmp_path):
    card["claim"][0]["quantities"]["odd"] = {"en": "odd", "ja": "奇妙", "least": 0.01, **anchors}
    with pytest.raises(CardError, match=said):
        read_card(_write(card, tmp_path / "card.toml"))
