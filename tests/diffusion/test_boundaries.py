import dataclasses

import pytest
import torch

from icd_lightning.diffusion import VP, Boundaries

PAPER = Boundaries((0, 259, 519, 779, 999))


def test_jumps_of_the_paper():
    assert PAPER.num_segments == 4
    assert PAPER.jumps["reverse"] == ((999, 779), (779, 519), (519, 259), (259, 0))
    assert PAPER.jumps["forward"] == ((19, 259), (259, 519), (519, 779), (779, 999))
    assert PAPER.solver_timesteps[:3] == (19, 39, 59)
    assert PAPER.solver_timesteps[-1] == 999
    assert len(PAPER.solver_timesteps) == 50


@pytest.mark.parametrize(
    ("num_segments", "ends"),
    [(1, (0, 999)), (2, (0, 499, 999)), (3, (0, 339, 679, 999)), (4, (0, 259, 519, 779, 999))],
)
def test_uniform_segments(num_segments: int, ends: tuple[int, ...]):
    assert Boundaries.uniform(num_segments).boundary_timesteps == ends


@pytest.mark.parametrize("num_segments", range(1, 9))
def test_pairs_of_both_directions(num_segments: int):
    """Every pair is one solver step inside one segment, and every boundary is met as some pair's t_next."""
    ends = Boundaries.uniform(num_segments)
    reverse, forward = ends.pairs["reverse"], ends.pairs["forward"]
    assert (len(reverse), len(forward)) == (50, 49)
    assert torch.all(reverse.t_next == (reverse.t - 20).clamp(min=0))
    assert torch.all(forward.t_next == forward.t + 20)
    assert torch.all((reverse.boundary <= reverse.t_next) & (reverse.t_next < reverse.t))
    assert torch.all((forward.boundary >= forward.t_next) & (forward.t_next > forward.t))
    assert set(reverse.boundary.tolist()) == set(ends.boundary_timesteps[:-1])
    assert set(forward.boundary.tolist()) == set(ends.boundary_timesteps[1:])
    for pairs in (reverse, forward):
        met = pairs.boundary[pairs.boundary == pairs.t_next]
        assert len(set(met.tolist())) == num_segments


def test_pairs_are_drawn_by_index():
    drawn = PAPER.pairs["reverse"][torch.tensor([0, 13, 13, 49])]
    assert drawn.t.tolist() == [19, 279, 279, 999]
    assert drawn.t_next.tolist() == [0, 259, 259, 979]
    assert drawn.boundary.tolist() == [0, 259, 259, 779]
    assert len(drawn) == 4


def test_preservation_trips_turn_at_the_start_instead_of_zero():
    down_and_up, up_and_down = PAPER.trips["forward"], PAPER.trips["reverse"]
    assert list(zip(down_and_up.t.tolist(), down_and_up.s.tolist(), strict=True)) == [
        (259, 19),
        (519, 259),
        (779, 519),
        (999, 779),
    ]
    assert torch.equal(up_and_down.t, down_and_up.s)
    assert torch.equal(up_and_down.s, down_and_up.t)


@pytest.mark.parametrize("text", ["259,519,779,999", "259_519_779_999", " 259, 519, 779, 999", "0,259,519,779,999"])
def test_parse_reads_released_names(text: str):
    assert Boundaries.parse(text) == PAPER


def test_released_boundaries_off_the_grid_serve_for_sampling_by_name():
    with pytest.raises(
        ValueError, match=r"boundary 249 .*50-step solver grid \(nearest: 239, 259\).*allow_off_grid=true"
    ):
        Boundaries.parse("249,499,699,999")
    released = Boundaries.parse("249,499,699,999", allow_off_grid=True)
    assert released.jumps["reverse"] == ((999, 699), (699, 499), (499, 249), (249, 0))
    assert not torch.any(released.pairs["reverse"].t_next == 249), "no pair meets a boundary off the grid"


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 259, 259, 999], "boundary 259 appears twice"),
        ([0, 519, 259, 999], "boundary 259 comes after 519; give the ends in ascending order"),
        ([0, 259, 1200], "boundary 1200 is out of range; give timesteps between 0 and 999"),
        ([-1, 259, 999], "boundary -1 is out of range"),
        ([0, 259], "must begin with 0 and end with 999"),
        ([], "must begin with 0 and end with 999"),
        ([0, 259.0, 999], "boundary 259.0 is not a whole number"),
        (["0", "999"], "boundary '0' is not a whole number"),
        ("259,519,779,999", "is text; give whole numbers .* or use Boundaries.parse"),
        ([0, 19, 999], "start_timestep 19 is not inside the first segment, 0 to 19"),
        ([0, 5, 999], "start_timestep 19 is not inside the first segment, 0 to 5"),
        ([0, 990, 999], r"boundary 990 is not on the 50-step solver grid \(nearest: 979, 999\)"),
    ],
)
def test_wrong_ends_are_refused_with_value_and_remedy(ends, message: str):
    with pytest.raises(ValueError, match=message):
        Boundaries(ends)


@pytest.mark.parametrize("text", ["", "abc", "259,,999", "259;999", "25.9,999"])
def test_text_that_is_no_list_of_numbers_is_refused(text: str):
    with pytest.raises(ValueError, match="are not whole numbers; write them like 259,519,779,999"):
        Boundaries.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_timestep": 0}, "start_timestep 0 is not inside the first segment"),
        ({"start_timestep": 29}, r"start_timestep 29 is not on .* \(nearest: 19, 39\)"),
        ({"start_timestep": 5}, r"start_timestep 5 is not on .* \(nearest: 19\)"),
        ({"num_solver_steps": 30}, "num_solver_steps 30 does not divide num_train_timesteps 1000"),
        ({"num_solver_steps": 0}, "num_solver_steps 0"),
        ({"num_train_timesteps": 500}, "boundary 519 is out of range; give timesteps between 0 and 499"),
        ({"num_solver_steps": 10}, r"boundary 259 is not on the 10-step solver grid \(nearest: 199, 299\)"),
    ],
)
def test_ends_must_fit_the_grid(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PAPER, **options)


@pytest.mark.parametrize(
    ("num_segments", "message"),
    [
        (0, "between 1 and 50"),
        (51, "between 1 and 50"),
        (11, "11 of 5 grid points leave nothing for the last; choose 10"),
    ],
)
def test_a_cut_that_leaves_an_empty_segment_is_refused(num_segments: int, message: str):
    with pytest.raises(ValueError, match=message):
        Boundaries.uniform(num_segments)


def test_segments_count_from_the_data_in_every_table():
    ends = torch.tensor(PAPER.boundary_timesteps)
    for rows in (*PAPER.pairs.values(), *PAPER.trips.values()):
        far = rows.boundary if hasattr(rows, "boundary") else rows.s
        lower, upper = ends[rows.segment], ends[rows.segment + 1]
        for t in (far, torch.maximum(rows.t, far)):
            assert torch.all((lower <= t) & (t <= upper))


def test_another_time_axis_than_the_process_has_is_refused():
    PAPER.check_process(VP())
    with pytest.raises(ValueError, match="boundaries on 1000 timesteps do not fit a process of 2000"):
        PAPER.check_process(VP(num_train_timesteps=2000))


def test_equal_and_hashable_whatever_the_sequence():
    assert Boundaries([259, 519, 779, 999]) == PAPER, "0 goes without saying"
    assert Boundaries([0, 259, 519, 779, 999]) == PAPER
    assert hash(Boundaries([0, 259, 519, 779, 999])) == hash(PAPER)
