"""A run is cut at its checkpoints into pieces that are nearly as even as they can be."""

import itertools
import random

from geomprobe.passes.checkpoint.resume_point import segments


def shortest_longest(cuts, count):
    """The longest piece of the best of all ways to cut."""
    inner, lengths = cuts[1:-1], []
    for chosen in itertools.combinations(inner, min(count - 1, len(inner))):
        lengths.append(max(b - a for a, b in itertools.pairwise([cuts[0], *chosen, cuts[-1]])))
    return min(lengths)


def test_pieces_tile_the_run_and_the_longest_is_within_one_interval_of_the_best_way_of_cutting():
    luck = random.Random(0)
    for _ in range(500):
        total, count = luck.randint(1, 60), luck.randint(1, 6)
        steps = luck.sample(range(total + 1), luck.randint(0, min(8, total)))
        pieces = segments(steps, total, count)
        cuts = sorted({0, total, *steps})
        assert len(pieces) == min(count, len(cuts) - 1)
        assert [*itertools.chain(*pieces)][1:-1] == [x for _, x in pieces[:-1] for _ in range(2)]
        assert (pieces[0][0], pieces[-1][1]) == (0, total)
        assert {x for piece in pieces for x in piece} <= set(cuts)
        interval = max(b - a for a, b in itertools.pairwise(cuts))
        assert max(b - a for a, b in pieces) <= shortest_longest(cuts, count) + interval
