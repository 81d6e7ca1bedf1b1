"""Whether a network hides a backdoor is as hard as 3-SAT: Theorem 2 of "Attack of the Tails", made runnable.

Wang et al., NeurIPS 2020, section 3.

The question is: is there an input x in [0, 1]^n with f(x) != g(x)? Here g = 0 and f is a ReLU network made from a
formula of m clauses, so that f is 0 on all of [0, 1]^n exactly if the formula cannot be satisfied:

    t_i = relu(2 x_i - 1), s_i = relu(1 - 2 x_i)      of the two at most one is above 0
    c = L - relu(L - 1) = min(L, 1), L the sum of the clause's three literals, t_i for x_i, s_i for not x_i
    f(x) = relu(sum of all c - (m - 1))

At a satisfying point of {0, 1}^n every c is 1 and f is 1. If f(x) > 0 anywhere, every c is above 0, so each clause
has a literal above 0, and "x_i > 1/2" satisfies the formula. The construction is ours; with the literals x_i and 1 -
x_i, as one would first write them, x = 1/2 makes every clause 1 and f > 0 for formulas that nothing satisfies.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from certify.bounds import Floats
from tasks.errors import CertificationError

Clause = tuple[int, int, int]  # literals: i for the i-th variable, -i for its negation, i from 1
Layers = list[tuple[Floats, Floats]]  # (weights [outputs, inputs], biases [outputs])
MOST_VARIABLES = 20  # that 2^n assignments are tried for


def formula_network(clauses: Sequence[Clause], num_variables: int) -> Layers:
    """Return f as affine layers with ReLU after each; raises `CertificationError` for a literal of no variable."""
    if not clauses or any(not 1 <= abs(literal) <= num_variables for clause in clauses for literal in clause):
        raise CertificationError(f"literals go from 1 to {num_variables} or are their negatives, got {list(clauses)}")
    eye, one = np.eye(num_variables), np.ones(num_variables)
    literals = (np.concatenate([2 * eye, -2 * eye]), np.concatenate([-one, one]))
    sums = np.zeros((len(clauses), 2 * num_variables))
    for row, clause in enumerate(clauses):
        for literal in clause:
            sums[row, abs(literal) - 1 + (num_variables if literal < 0 else 0)] += 1.0
    doubled = np.concatenate([sums, sums]), np.concatenate([np.zeros(len(clauses)), -np.ones(len(clauses))])
    count = len(clauses)
    return [literals, doubled, (np.concatenate([np.ones(count), -np.ones(count)])[None], np.array([1.0 - count]))]


def naive_network(clauses: Sequence[Clause], num_variables: int) -> Layers:
    """Return the network with the literals x_i and 1 - x_i, which fires at x = 1/2 whatever the formula."""
    layers = formula_network(clauses, num_variables)
    eye = np.eye(num_variables)
    literals = (np.concatenate([eye, -eye]), np.concatenate([np.zeros(num_variables), np.ones(num_variables)]))
    return [literals, *layers[1:]]


def value(layers: Layers, points: Floats) -> Floats:
    """Return f at points ``[points, variables]`` of the cube; exact where coordinates are short binary fractions."""
    values = np.asarray(points, np.float64)
    for weight, bias in layers:
        values = np.maximum(values @ weight.T + bias, 0.0)
    return values[:, 0]


def corners(num_variables: int) -> Floats:
    """Return all of {0, 1}^n, ``[2^n, n]``; at most `MOST_VARIABLES` variables."""
    if not 1 <= num_variables <= MOST_VARIABLES:
        raise CertificationError(f"2^n points are tried for n from 1 to {MOST_VARIABLES}, got n = {num_variables}")
    return np.array(list(itertools.product((0.0, 1.0), repeat=num_variables)))


def satisfying(clauses: Sequence[Clause], num_variables: int) -> tuple[bool, ...] | None:
    """Return an assignment that satisfies the formula, None if there is none: every one is tried."""
    for point in corners(num_variables):
        if all(any((point[abs(literal) - 1] > 0.5) == (literal > 0) for literal in clause) for clause in clauses):
            return tuple(bool(v) for v in point)
    return None


def differs_somewhere(layers: Layers, num_variables: int) -> bool:
    """Decide whether f != 0 somewhere on the cube, for networks of `formula_network`: on its corners is enough."""
    return bool((value(layers, corners(num_variables)) > 0).any())
