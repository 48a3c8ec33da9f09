"""Every room, in one sweep: the contract, the card bound to the code, the numbers without training, tiny runs."""

from pathlib import Path

import pytest
import torch

import saigen
from saigen import runner
from saigen.cards import catalogue
from saigen.runner import Options, plan
from saigen.testing import number_problems, parametrize_with_checks, parity_problems, room_problems

ROOT = Path(__file__).resolve().parent.parent
SLUGS = [paper.slug for paper in catalogue.list_papers()]
CLAIMS = [(paper.slug, claim.id) for paper in catalogue.list_papers() for claim in paper.card.claim]


def test_no_card_is_broken():
    assert catalogue.problems() == ()


@parametrize_with_checks()
def test_contract(check):
    check()


@pytest.mark.parametrize("slug", SLUGS)
def test_the_card_is_bound_to_the_room(slug):
    assert room_problems(slug) == []


@pytest.mark.parametrize("slug", SLUGS)
def test_the_numbers_of_the_card_come_out(slug):
    assert number_problems(slug) == []


@pytest.mark.parametrize("slug", SLUGS)
def test_the_parity_tests_are_there(slug):
    assert parity_problems(slug, ROOT) == []
    assert catalogue.paper(slug).card.parity, "no [[parity]]: rung 2 is not reached"


@pytest.mark.parametrize(("slug", "claim"), CLAIMS, ids=lambda value: value)
def test_every_claim_runs_at_tiny_scale(slug, claim, store):
    task = plan([catalogue.paper(slug)], Options(scale="tiny", jobs=1), [claim], seeds=[1000])[0]
    outcome = runner.execute(task)
    assert outcome.measurement is not None, outcome.log


def test_a_model_takes_what_its_function_hands_on_to_its_class():
    with torch.device("meta"):
        model = saigen.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1)
        with pytest.raises(ValueError, match=r"no argument 'depht', did you mean 'depth'\?"):
            saigen.create_model("vit_tiny_patch16_224", depht=3)
    assert model.pos_embed.shape[1] == 1 + 4


@pytest.mark.parametrize("slug", SLUGS)
def test_a_digest_names_the_paper(slug):
    from saigen.report.digest import lists

    named = {entry.paper for found in lists().values() for section in found.section for entry in section.entry}
    assert slug in named
    for found in catalogue.paper(slug).card.digests:
        assert found in lists(), f"{found} is no list"


@pytest.mark.parametrize("slug", SLUGS)
def test_published_evidence_can_be_judged(slug):
    for result in runner.published(catalogue.paper(slug)):
        assert result.verdict


@pytest.mark.parametrize("slug", [p.slug for p in catalogue.list_papers() if p.card.models and p.domain != "rl"])
def test_every_classifier_gives_up_its_head_and_takes_another(slug):
    name = catalogue.paper(slug).card.models[0]
    with torch.device("meta"):
        model = saigen.create_model(name).eval().double()
        headless = saigen.create_model(name, num_classes=0).eval().double()
        x = torch.zeros(2, *model.default_cfg["input_size"], dtype=torch.double)
        # a new head has to come to where the model is, and in its type: here nothing asks for a device or a type
    logits = model(x)
    assert logits.shape[:2] == (2, model.num_classes)
    model.reset_classifier(0)
    features = model(x)
    assert features.shape[:2] == (2, model.num_features)
    if logits.ndim == 2:
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == features.shape
    model.reset_classifier(5)
    assert model(x).shape[:2] == (2, 5)
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)
    assert headless(x).shape == features.shape
