"""The paper's search: its update, per-sample draws, routers and starts, in real runs on tiny models."""

import shutil

import numpy as np
import pytest
import torch
from helpers import changed, make_trainer, prepared, snapshot

from alter.backbones.draws import generator
from alter.backbones.gates import SoftRows
from alter.common.errors import InputError
from alter.evaluation.report.records import read_sensitivity
from alter.method import losses
from alter.training.run import train


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def update_with_one_draw(trainer, batches):
    """As it was before draws went by sample: the reference for `search.draws=iteration`."""
    search, loss, update = trainer.search, trainer.config.loss, trainer.search.hyper_update
    logits = search.hypernetwork()
    mask_EL, router_TE = search.hypernetwork.sample(logits, generator(trainer.config.seed, trainer.step, 1))
    leaves = [mask_EL.detach().requires_grad_(), router_TE.detach().requires_grad_()]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        mask_BL = leaves[1][batch.rows] @ leaves[0]
        perf = losses.weighted_sum(trainer.terms(trainer.backbone, batch, SoftRows(mask_BL)), loss.weights)
        for total, gradient in zip(gradients, torch.autograd.grad(perf, leaves), strict=True):
            total += gradient / len(batches)
    ratio = losses.log_ratio(trainer.parts.budget.expected(logits), search.target())
    balance = losses.load_balance(logits.router_TE, trainer.balance_T)
    sampled = [(out, grad) for out, grad in zip((mask_EL, router_TE), gradients, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in sampled] + [loss.ratio * ratio + loss.balance * balance],
                            [grad for _, grad in sampled] + [None])
    update.clip()
    update.step()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("router", ["learned", "uniform"])
def test_one_draw_an_iteration_gives_the_bits_of_the_former_update(small_config, tmp_path, router, accumulation):
    config = small_config("dit", search={"draws": "iteration"}, experts={"router": router},
                          train={"gradient_accumulation": accumulation})
    ours, reference = (make_trainer(config, tmp_path) for _ in range(2))
    before = snapshot(ours.parts.hypernetwork)
    for _ in range(2):
        batches = prepared(ours)
        ours.search.update(batches)
        update_with_one_draw(reference, batches)
    assert changed(ours.parts.hypernetwork, before)
    assert not changed(ours.parts.hypernetwork, snapshot(reference.parts.hypernetwork))


def per_sample_gradient(trainer):
    """Of L_perf with respect to the logits, from forwards of one sample each, whose losses alone are averaged."""
    hyper, count = trainer.parts.hypernetwork, 0
    logits = hyper()
    leaves = type(logits)(*(values.detach().requires_grad_() for values in logits))
    total = [torch.zeros_like(leaf) for leaf in leaves]
    experts, sites = leaves.mask_EL.shape
    for batch in prepared(trainer):
        for b in range(len(batch.rows)):
            noise = batch.drawn[slice(b, b + 1)].uniform((experts, sites + 1), stream=1)
            mask_BL = hyper.sample_each(leaves, batch.rows[b : b + 1], noise)
            one = type(batch)(batch.noisy_latents[b : b + 1], batch.drawn[slice(b, b + 1)],
                              {name: value[b : b + 1] for name, value in batch.conditioning.items()},
                              batch.target[b : b + 1], batch.teacher_pred[b : b + 1],
                              [value[b : b + 1] for value in batch.teacher_features])
            perf = losses.weighted_sum(trainer.terms(trainer.backbone, one, SoftRows(mask_BL)),
                                       trainer.config.loss.weights)
            total = [a + g for a, g in zip(total, torch.autograd.grad(perf, leaves), strict=True)]
            count += 1
    return [values / count for values in total]


@pytest.mark.parametrize("router", ["learned", "smooth", "ordered", "uniform"])
def test_the_gradient_is_the_mean_of_the_samples_own(small_config, tmp_path, router):
    """Φ's parameters get what the samples give one by one, whatever the number of micro-batches."""
    found = []
    for accumulation in (1, 4):
        config = small_config("dit", experts={"router": router}, loss={"ratio": 0.0, "balance": 0.0},
                              train={"gradient_accumulation": accumulation, "max_grad_norm": 1e9})
        trainer = make_trainer(config, tmp_path)
        for module in (trainer.parts.backbone, trainer.parts.teacher, trainer.parts.hypernetwork):
            module.double()
        trainer.dtype = torch.float64
        hyper = trainer.parts.hypernetwork
        logits, grads = hyper(), per_sample_gradient(trainer)
        reached = [(values, grad) for values, grad in zip(logits, grads, strict=True) if values.requires_grad]
        expected = torch.autograd.grad([values for values, _ in reached], list(hyper.parameters()),
                                       [grad for _, grad in reached])
        trainer.search.hyper_update.step = lambda: None  # leaves the gradients to be looked at
        trainer.search.update(prepared(trainer))
        found.append([parameter.grad.clone() for parameter in hyper.parameters()])
        for grad, other in zip(found[-1], expected, strict=True):
            assert torch.allclose(grad, other, rtol=1e-8, atol=1e-12)
        assert all(grad.abs().max() > 0 for grad in expected)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(*found, strict=True))


def test_an_ordered_router_has_no_balance_loss(small_config, tmp_path):
    states = []
    for balance in (0.0, 5.0):
        trainer = make_trainer(small_config("dit", experts={"router": "ordered"}, loss={"balance": balance}), tmp_path)
        before = snapshot(trainer.parts.hypernetwork)
        trainer.search.update(prepared(trainer))
        assert "temporal_router.moved_K" in changed(trainer.parts.hypernetwork, before)
        states.append(snapshot(trainer.parts.hypernetwork))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_supernet_trains_on_draws_from_the_hypernetworks_distribution(small_config, tmp_path):
    config = small_config("dit", search={"supernet": True}, experts={"offset": 0.0, "router": "ordered"},
                          train={"gradient_accumulation": 2})
    trainer = make_trainer(config, tmp_path)
    logits, kept, steps = trainer.parts.hypernetwork(), [], 150
    expected = []
    for trainer.step in range(steps):
        trainer.masks()
        batches = prepared(trainer)
        drawn = trainer.search.drawn(batches)
        assert [mask_BL.dtype for mask_BL in drawn] == [torch.bool] * 2
        kept.append(torch.cat(drawn).double().mean(0))
        rows = torch.cat([batch.rows for batch in batches])
        expected.append((logits.router_TE.softmax(1)[rows] @ logits.mask_EL.sigmoid()).detach().double().mean(0))
    error = torch.stack(kept).mean(0) - torch.stack(expected).mean(0)
    assert (error.abs() < 4.5 * 0.5 / (8 * steps) ** 0.5).all()
    again = make_trainer(config, tmp_path)
    again.step = trainer.step
    again.masks()
    assert all(torch.equal(a, b) for a, b in zip(again.search.drawn(prepared(again)), drawn, strict=True))
    seen = []
    update = trainer.update_backbone
    trainer.update_backbone = lambda *given: (seen.append(given[3]), update(*given))[1]
    trainer.step = 0
    trainer.run()
    assert [each is not None for each in seen] == [True, True, False, False, False, False]  # frozen at T_end, 3


def test_a_measured_start_gives_experts_their_own_masks(small_config, tmp_path):
    config = small_config("dit", budget={"keep_ratio": 0.5, "over": "prunable"}, optim={"hypernetwork_lr": 1e-9},
                          experts={"router": "ordered", "start": "measured", "offset": 20.0, "count": 3})
    run = train(config)
    experts = run.experts
    table = read_sensitivity(run.run_dir / "sensitivity.json")
    assert len(table.edges) == 11 and (np.diff(experts.expert_T) >= 0).all()
    assert set(experts.expert_T) == {0, 1, 2} and len(np.unique(experts.mask_EL, axis=0)) > 1
    borders = np.flatnonzero(np.diff(experts.expert_T)) + 1
    assert np.abs(borders[:, None] - np.array(table.edges)).min(1).max() <= 40  # of the table's bins, nearly


CHANGES = [
    {"experts": {"router": "ordered", "start": "measured"}, "search": {"supernet": True}},
    {"experts": {"router": "smooth"}, "train": {"gradient_accumulation": 2}},
    {"experts": {"router": "learned"}, "search": {"draws": "iteration"}},
    {"experts": {"router": "uniform", "start": "measured"}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: changes["experts"]["router"])
def test_a_search_is_resumed_exactly(small_config, changes):
    whole = train(small_config("dit", output_dir="whole", checkpoint={"every": 2}, **changes)).run_dir
    shutil.copytree(whole, "part")
    shutil.rmtree("part/final")
    resumed = train(small_config("dit", output_dir=None, resume="part/checkpoints/step-000002",
                                 checkpoint={"every": 2}, **changes)).run_dir
    for name in ("final/transformer/diffusion_pytorch_model.safetensors", "final/experts.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.mark.parametrize("changes, field", [
    ({"search": {"supernet": True}, "train": {"schedule": "two_stage"}}, "search.supernet=true has no effect"),
    ({"search": {"supernet": True, "method": "elastic"}}, "search.supernet=True has no effect with"),
    ({"experts": {"start": "measured", "offset": 0.0}}, "experts.start=measured with experts.offset=0.0"),
    ({"experts": {"router": "sorted"}}, "experts.router"), ({"search": {"draws": "batch"}}, "search.draws")])
def test_settings_that_would_do_nothing_are_refused(small_config, changes, field):
    with pytest.raises(InputError, match=field):
        small_config("dit", **changes)
