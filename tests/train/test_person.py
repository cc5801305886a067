"""A personal network starts as the meta-learned one, learns, and survives its file."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.bases import MODEL, face_spec, make_base
from train.checkpoint import Base, load_base, pin, save_file
from train.person import (
    Person,
    PersonalDiscriminator,
    PersonalGenerator,
    load_generator,
    load_person,
    packed_generator,
    save_person,
)

PX = MODEL.image_px


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_base(tmp_path_factory.mktemp("run"), face_spec()))


@pytest.fixture
def e() -> torch.Tensor:
    return torch.randn(MODEL.embedding_dim, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 3, PX, PX, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.fixture
def y() -> torch.Tensor:
    return torch.rand(3, 3, PX, PX, generator=torch.Generator().manual_seed(5)) * 2 - 1


def feed_forward(base: Base, e: torch.Tensor) -> Person:
    return Person(
        name="ada",
        kind="feed-forward",
        base=str(base.path),
        base_sha256=base.sha256,
        model=base.model,
        face=base.face,
        e=e,
        psi=base.generator.psi(e[None])[0].detach(),
        landmarks=np.arange(5 * 68 * 2, dtype=np.float32).reshape(5, 68, 2),
        thumbnail=np.full((6, 7, 3), 9, np.uint8),
        generator=None,
        step=0,
        metrics={"content": 0.5},
    )


def test_a_personal_generator_starts_as_the_meta_learned_one(base, e, y) -> None:
    psi = base.generator.psi(e[None])
    personal = PersonalGenerator(base.generator, psi[0]).eval()
    assert torch.equal(personal(y), base.generator(y, psi.expand(3, -1)))


def test_a_personal_score_starts_as_v_dot_w0_plus_e_plus_b(base, e, x, y) -> None:
    personal = PersonalDiscriminator(base.discriminator, e).eval()
    r, features = personal(x, y)
    expected, expected_features = base.discriminator(x, y, e.expand(3, -1))
    assert torch.equal(r, expected)
    assert all(torch.equal(a, b) for a, b in zip(features, expected_features, strict=True))


def test_one_step_moves_psi_and_w_and_leaves_the_base_alone(base, e, x, y) -> None:
    before = {name: value.clone() for name, value in base.generator.state_dict().items()}
    w0 = base.discriminator.w0.clone()
    generator = PersonalGenerator(base.generator, base.generator.psi(e[None])[0])
    discriminator = PersonalDiscriminator(base.discriminator, e)
    psi, w = generator.psi.clone(), discriminator.discriminator.w0.clone()
    parameters = [*generator.parameters(), *discriminator.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    r, _ = discriminator(generator(y), y)
    ((generator(y) - x).abs().mean() - r.mean()).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    optimiser.step()
    assert (generator.psi != psi).any()
    assert (discriminator.discriminator.w0 != w).any()
    assert torch.equal(base.discriminator.w0, w0)
    after = base.generator.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_feed_forward_person_survives_its_file(base, e, y, tmp_path: Path) -> None:
    person = feed_forward(base, e)
    save_person(tmp_path / "ada.pt", person)
    back = load_person(tmp_path / "ada.pt")
    assert torch.equal(back.psi, person.psi)
    assert (back.landmarks == person.landmarks).all()
    assert (back.thumbnail == person.thumbnail).all()
    assert (back.face, back.model, back.kind) == (person.face, person.model, "feed-forward")
    drawn = load_generator(back)(y)
    assert torch.equal(drawn, base.generator(y, person.psi.expand(3, -1)))


def test_a_full_person_needs_no_base(base, e, y, tmp_path: Path) -> None:
    personal = PersonalGenerator(base.generator, base.generator.psi(e[None])[0])
    with torch.no_grad():
        for parameter in personal.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    personal.eval()
    person = replace(
        feed_forward(base, e),
        kind="full",
        base="/nowhere",
        psi=personal.psi.detach(),
        generator=packed_generator(personal),
    )
    save_person(tmp_path / "ada.pt", person)
    drawn = load_generator(load_person(tmp_path / "ada.pt"))(y)
    assert (drawn - personal(y)).abs().max() < 0.02
    assert not any("P." in name for name in person.generator or {})
    load_generator(person, base.path)
    with pytest.raises(ValueError, match=r"a full person, is not at .*gone.*leave --base out"):
        load_generator(person, tmp_path / "gone")
    other = make_base(tmp_path / "other", base.face, seed=1)
    with pytest.raises(ValueError, match=r"made with another base .*leave --base out"):
        load_generator(person, other)


def test_a_shared_generator_is_found_and_must_be_the_same(base, e, tmp_path: Path) -> None:
    moved = replace(feed_forward(base, e), base=str(tmp_path / "gone.pt"))
    with pytest.raises(ValueError, match=r"base of ada.* is not at .*gone\.pt.*--base"):
        load_generator(moved)
    load_generator(moved, base.path)
    other = make_base(tmp_path / "other", base.face, seed=1)
    with pytest.raises(ValueError, match=f"expected sha256 {base.sha256[:12]}, found"):
        load_generator(moved, other)


def test_a_file_that_is_not_a_person_is_refused(base, e, tmp_path: Path) -> None:
    path = tmp_path / "ada.pt"
    with pytest.raises(ValueError, match=r"finetune\.py --person"):
        load_person(path)
    path.write_bytes(b"not a person")
    with pytest.raises(ValueError, match="not a readable"):
        load_person(path)
    with pytest.raises(ValueError, match=r"model\.pt is a meta-learned model, expected a person"):
        load_person(base.path)
    save_file(path, {"schema": 99})
    with pytest.raises(ValueError, match="schema 99, this version reads 1"):
        load_person(path)
    save_person(path, feed_forward(base, e))
    state = torch.load(path, weights_only=True)
    save_file(path, {**state, "model": {**state["model"], "depth": 5}})
    with pytest.raises(ValueError, match=r"made by another version, make it anew: .*depth"):
        load_person(path)
    save_file(path, {k: v for k, v in state.items() if k != "psi"})
    with pytest.raises(ValueError, match=r"differs .*\['psi'\]"):
        load_person(path)


def test_kind_and_generator_agree(base, e) -> None:
    with pytest.raises(ValueError, match="full person, but its generator is missing"):
        replace(feed_forward(base, e), kind="full")


def test_a_pinned_base_outlives_its_step_and_is_found_by_its_run(e, tmp_path: Path) -> None:
    run = make_base(tmp_path / "run", face_spec())
    base = load_base(run)
    person = replace(feed_forward(base, e), base=str(pin(base)))
    shutil.rmtree(base.path.parent)
    load_generator(person)
    load_generator(replace(person, base="gone.pt"), run)
    assert pin(base) == pin(base) == Path(person.base)


def test_a_base_outside_a_run_stays_where_it_is(tmp_path: Path) -> None:
    model = load_base(make_base(tmp_path / "run", face_spec())).path
    lone = Path(shutil.copy(model, tmp_path / "lone.pt"))
    assert pin(load_base(lone)) == lone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone.pt", "run"]
