"""Evidence: what is fresh, what may be published, what is carried over."""

import datetime

import pytest

from saigen.claims import evidence
from saigen.claims.evidence import EvidenceError, Measurement, Store


def measured(paper, seed, scale="laptop", values=None, code=None, **changes) -> Measurement:
    claim = paper.card.claim[0]
    fields = {
        "paper": paper.slug, "claim": claim.id, "scale": scale, "seed": seed, "seconds": 1.0,
        "code": code or evidence.code_digest(paper), "card": evidence.claim_digest(claim),
        "values": values or {"shrinks": 4.0 + seed / 100, "single": 1.0, "mean": 0.25}, "setting": {"draws": 400}, "data": {},
        "environment": {"processor": "a", "cores": 2, "device": "cpu", "torch": "2"},
        "created": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    }  # fmt: skip
    return Measurement(**(fields | changes))


def complete(paper, **changes):
    return [measured(paper, 0, "tiny", **changes), *(measured(paper, seed, **changes) for seed in range(5))]


def test_a_line_is_read_back(plugin, tmp_path):
    path = tmp_path / "evidence.jsonl"
    evidence.append(path, complete(plugin))
    assert evidence.read_evidence(path) == complete(plugin)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "evidence.jsonl"
    path.write_text('{"paper": 1}\n')
    with pytest.raises(EvidenceError, match="line 1 of"):
        evidence.read_evidence(path)


def test_changed_code_or_card_makes_stale(plugin):
    assert evidence.is_fresh(measured(plugin, 0), plugin)
    assert not evidence.is_fresh(measured(plugin, 0, code="0" * 64), plugin)
    assert not evidence.is_fresh(measured(plugin, 0, card="0" * 64), plugin)


def test_code_counts_what_the_room_imports_but_not_its_examples(plugin):
    names = {path.name for path in evidence.code_files(plugin)}
    assert {"layer.py", "claims.py", "trial.py"} <= names
    assert "examples.py" not in names and "cli.py" not in names


def test_publishing_refuses_missing_seeds_and_missing_tiny(plugin):
    with pytest.raises(EvidenceError, match="4 seeds of 5"):
        evidence.merge(plugin, complete(plugin)[:-1])
    with pytest.raises(EvidenceError, match="no tiny run"):
        evidence.merge(plugin, complete(plugin)[1:])
    with pytest.raises(EvidenceError, match="no fresh"):
        evidence.merge(plugin, complete(plugin, code="0" * 64))
    # A hole: seeds 0, 1, 3, 4 are two seeds from zero, not four.
    with pytest.raises(EvidenceError, match="2 seeds of 5"):
        evidence.merge(plugin, [m for m in complete(plugin) if m.scale == "tiny" or m.seed != 2])


def test_publishing_adds_only_what_is_new(plugin, monkeypatch, tmp_path):
    monkeypatch.setattr(type(plugin), "evidence_path", property(lambda self: tmp_path / "evidence.jsonl"))
    new = evidence.merge(plugin, complete(plugin))
    assert len(new) == 6
    evidence.append(plugin.evidence_path, new)
    assert evidence.merge(plugin, complete(plugin)) == []


def test_one_set_is_one_machine(plugin):
    here = [measured(plugin, seed) for seed in range(3)]
    there = [measured(plugin, seed, environment={"processor": "b"}) for seed in range(5)]
    claim = plugin.card.claim[0]
    assert evidence.chosen_set([*here, *there], claim, "laptop") == there


def test_carried_over_where_tiny_is_bit_equal(plugin):
    old = complete(plugin, code="0" * 64)
    now = measured(plugin, 0, "tiny")
    carried = evidence.carry_over(plugin, old, [now])
    assert [m.carried_from for m in carried if m.scale == "laptop"] == [("0" * 64,)] * 5
    assert all(evidence.is_fresh(m, plugin) for m in carried)
    assert evidence.carry_over(plugin, [*old, *carried], [now]) == [], "what was carried is not carried again"


@pytest.mark.parametrize(
    "changed",
    [
        {"values": {"shrinks": 4.0000001, "single": 1.0, "mean": 0.25}},
        {"environment": {"processor": "b"}},
        {"setting": {"draws": 11}},
    ],
)
def test_not_carried_over_where_tiny_differs(plugin, changed):
    assert evidence.carry_over(plugin, complete(plugin, code="0" * 64), [measured(plugin, 0, "tiny", **changed)]) == []


def test_a_tiny_run_of_the_published_code_lets_another_environment_carry_it_over(plugin):
    old, there = complete(plugin, code="0" * 64), {"processor": "b"}
    now = measured(plugin, 0, "tiny", environment=there)
    assert evidence.carry_over(plugin, old, [now]) == []
    witness = measured(plugin, 0, "tiny", environment=there, code="0" * 64)
    carried = evidence.carry_over(plugin, [*old, witness], [now])
    assert [m.carried_from for m in carried if m.scale == "laptop"] == [("0" * 64,)] * 5
    other = witness.model_copy(update={"values": witness.values | {"mean": 0.3}})
    assert evidence.carry_over(plugin, [*old, other], [now]) == []


def test_what_was_carried_over_before_is_carried_on_by_its_latest_code(plugin):
    first, there = complete(plugin, code="0" * 64), {"processor": "b"}
    second = [m.model_copy(update={"code": "1" * 64, "carried_from": ("0" * 64,)}) for m in first]
    witness = measured(plugin, 0, "tiny", environment=there, code="1" * 64)
    now = measured(plugin, 0, "tiny", environment=there)
    carried = evidence.carry_over(plugin, [*first, *second, witness], [now])
    assert [m.carried_from for m in carried if m.scale == "laptop"] == [("0" * 64, "1" * 64)] * 5


def test_witnesses_are_of_the_published_code_and_one_an_environment(plugin):
    there = {"processor": "b"}
    witness = measured(plugin, 0, "tiny", environment=there)
    assert evidence.witnesses(plugin, complete(plugin), [witness, witness]) == [witness]
    assert evidence.witnesses(plugin, [*complete(plugin), witness], [witness]) == []
    assert evidence.witnesses(plugin, complete(plugin), [measured(plugin, 0, "tiny")]) == [], "there is one of here"
    stale = measured(plugin, 0, "tiny", environment=there, code="0" * 64)
    assert evidence.witnesses(plugin, complete(plugin), [stale]) == []
    assert evidence.witnesses(plugin, complete(plugin, code="0" * 64), [witness]) == [], "the evidence is of other code"
    assert evidence.witnesses(plugin, [], [witness]) == []


def test_clock_values_are_never_carried(plugin, monkeypatch):
    monkeypatch.setattr(type(plugin.card.claim[0]), "clock", property(lambda self: True))
    assert evidence.carry_over(plugin, complete(plugin, code="0" * 64), [measured(plugin, 0, "tiny")]) == []


def test_the_store_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="SAIGEN_HOME"):
        Store(tmp_path / "file" / "below").check_writable()


def test_data_drawn_by_the_seed_differs_within_a_set_and_the_users_own_does_not(plugin):
    claim = plugin.card.claim[0]
    drawn = [measured(plugin, seed, data={"scenes": str(seed)}) for seed in range(5)]
    assert evidence.chosen_set(drawn, claim, "laptop") == drawn
    mixed = [measured(plugin, seed, data={"photos/train": str(seed)}) for seed in range(5)]
    assert len(evidence.chosen_set(mixed, claim, "laptop")) == 1
