"""The evaluations of a pass, and how far it is."""

from types import SimpleNamespace

import torch

from sdlora.families.samplers.evaluations import evaluations_of


def test_known_evaluations_are_dealt_out_to_the_steps_of_the_whole():
    """Five of nine evaluations, which five steps have, run: those of the first steps of a plan."""
    evaluations = evaluations_of(SimpleNamespace(), torch.tensor([50.0, 40.0, 30.0, 20.0, 10.0]), 5, 9)
    seen = [(at.timestep.item(), at.step, at.span, len(evaluations.following), evaluations.done) for at in evaluations]
    assert seen == [
        (50.0, 1, (0.0, 0.2), 4, (1, 5)),
        (40.0, 1, (0.2, 0.4), 3, (2, 5)),
        (30.0, 2, (0.4, 0.6), 2, (3, 5)),
        (20.0, 2, (0.6, 0.8), 1, (4, 5)),
        (10.0, 3, (0.8, 1.0), 0, (5, 5)),
    ]


def test_adaptive_evaluations_are_told_one_by_one():
    """Each belongs to the part of the way in which its step begins."""
    made = SimpleNamespace(next_timestep=torch.tensor(900.0), share_done=0.0)
    evaluations = evaluations_of(made, torch.tensor([900.0, 600.0, 300.0, 0.0]), 4, 4)
    seen = []
    for at in evaluations:
        seen.append((at.timestep.item(), at.step, at.span))
        share, timestep = {0.0: (0.3, 500.0), 0.3: (0.8, 100.0), 0.8: (1.0, None)}[made.share_done]
        made.share_done, made.next_timestep = share, None if timestep is None else torch.tensor(timestep)
        seen.append((evaluations.done, evaluations.following.tolist()))
    assert seen == [
        (900.0, 1, (0.0, 0.0)), ((1, 4), [500.0]),
        (500.0, 2, (0.3, 0.3)), ((3, 4), [100.0]),
        (100.0, 4, (0.8, 0.8)), ((4, 4), []),
    ]  # fmt: skip


def test_where_no_steps_run_nothing_is_evaluated():
    made = SimpleNamespace(next_timestep=torch.tensor(900.0), share_done=0.0)
    assert list(evaluations_of(made, torch.tensor([]), 4, 4)) == []
    assert list(evaluations_of(SimpleNamespace(), torch.tensor([]), 4, 4)) == []
