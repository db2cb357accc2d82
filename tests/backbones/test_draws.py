import pytest
import torch

from alter.backbones.draws import draw, generator
from alter.backbones.noising import Betas, Flow

BETAS = Betas(torch.linspace(0.99, 0.01, 1000))


def test_draws_repeat_and_differ_by_step_and_stream():
    def first(*key):
        return torch.rand(4, generator=generator(*key)).tolist()

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({tuple(first(*key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}) == 4


@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 3, 2, 2), (5, 16)], ids=["image", "video", "tokens"])
def test_a_samples_noise_does_not_depend_on_the_slice_that_it_is_drawn_in(shape):
    whole = draw(BETAS, 8, 0.5, seed=0, step=3)
    for part, again in ((whole, whole[2:6][1:3]), (whole[2:6], draw(BETAS, 8, 0.5, 0, 3)[2:6])):
        first = 3 if part is whole else 0
        for kind in ("noise", "posterior"):
            some, same = getattr(part, kind)(shape), getattr(again, kind)(shape)
            assert some.shape == (len(part.timesteps), *shape)
            assert torch.equal(some[first : first + len(same)], same)
    assert whole.timesteps.min() >= 0 and whole.timesteps.max() < 1000


def test_noise_is_unit_gaussian_and_differs_between_samples_steps_and_uses():
    drawn = [draw(BETAS, 4, 0.0, 0, step) for step in (0, 1)]
    several = torch.cat([getattr(one, kind)((3, 32, 32)) for one in drawn for kind in ("noise", "posterior")])
    alike = torch.corrcoef(several.flatten(1)) - torch.eye(16)
    assert alike.abs().max() < 0.1 and abs(several.std() - 1) < 0.01 and abs(several.mean()) < 0.01


def test_noise_offset_adds_one_number_to_every_channel():
    drawn = draw(BETAS, 64, 0.0, 0, 0)
    added = drawn.noise((3, 8, 8), 0.5) - drawn.noise((3, 8, 8))
    assert torch.allclose(added, added.mean((2, 3), keepdim=True).expand_as(added), atol=1e-5)
    assert 0.4 < float(added[:, :, 0, 0].std()) < 0.6


def test_rows_are_the_training_timesteps_nearest_to_those_drawn():
    whole = draw(Flow(1000, shift=3.0), 4096, 0.0, 0, 0)
    expected = [min(range(1000), key=lambda row: abs(row - t)) for t in whole.timesteps[:50].tolist()]
    assert whole.rows[:50].tolist() == expected and whole.rows.dtype == torch.int64
    assert 990 < whole.rows.max() <= 999 and whole[2:5].rows.tolist() == whole.rows[2:5].tolist()
    assert torch.equal(draw(BETAS, 8, 0.0, 0, 0).rows, draw(BETAS, 8, 0.0, 0, 0).timesteps)
