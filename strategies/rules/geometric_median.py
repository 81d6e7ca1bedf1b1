"""The geometric median (RFA): the point with the least sum of distances to the updates.

Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022,
algorithm 2, the smoothed Weiszfeld algorithm: its objective, with the smoothing nu and equal client shares.
Deviation: the paper starts at the mean and stops after a few steps, which wear an outlier's weight down by a factor
each; a long enough outlier makes up for that. Here the search starts at the update of least objective, each step is
the better of Weiszfeld's and Newton's, and it runs until the median is found. A search cut short is robust as well:
no point on its way has a larger objective than an honest update z, and with f of n updates arbitrary that alone
gives, up to nu, ||point - z|| <= 2 (n - f) / (n - 2f) max ||x_i - z|| over honest x_i.

`nu` has a unit, and far below the updates' own rounding it would be none: it is at least 1e-12 of a typical distance.

All steps run on coefficients of the updates, in n x n space, on a Gram matrix: the updates are read for that matrix
and for the result alone. A point is the sum of coefficients[i] x_i; an outlier's are as small as it is far.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, weight_rule
from tasks.errors import AggregationError, ConfigError

FARTHEST_SQUARE = 1e300  # of float64 rows: sums of such squares do not overflow
LENGTHS = 2.0 ** torch.arange(-8, 25)  # of steps, from cautious ones to ones that leave a tip of the objective
BLURRED = 1e-2  # share of ||x||^2 + ||y||^2; the rounding of float32 products is 1e-5 of smaller squared distances
MOST_ORIGINS = 4
SHARPEST = 1e-12  # share of a typical distance: the least nu, above the rounding of coefficients
TIE = 1e-9  # share of a typical distance by which the objectives of tied updates differ


@weight_rule
def geometric_median(updates: Stack, *, nu: float = 1e-6, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weigh each update by its inverse distance to the median, where all unit vectors to updates sum to 0.

    Stops when that sum is no longer than `tolerance`: as much as this share of one more client could pull.
    `nu`, in the unit of the updates, is the distance below which an update weighs no more than at it.
    """
    if nu <= 0 or max_iterations < 1 or tolerance < 0:
        given = f"nu = {nu}, max_iterations = {max_iterations}, tolerance = {tolerance}"
        raise ConfigError(f"geometric_median wants nu > 0, max_iterations >= 1 and tolerance >= 0, got {given}")
    return median_weights(sharp_products(updates), nu, max_iterations, tolerance)


def sharp_products(updates: Stack) -> Tensor:
    """Return inner products that resolve the updates around the best of them, such as many equal ones.

    Others close to an update, far from the origin, would differ from it by rounding alone; then it is the new origin.
    """
    products = updates.majority_products
    everyone = torch.arange(len(updates), device=updates.device)
    for _ in range(MOST_ORIGINS):
        centre = int(least_update(*without_unreachable(products)).argmax())
        squares = products.diagonal()
        sums = squares + squares[centre]
        blurred = (sums - 2 * products[centre] < BLURRED * sums) & (everyone != centre)
        if not blurred.any():
            break
        products = updates.products(centre)
    return products


def median_weights(products: Tensor, nu: float, max_iterations: int, tolerance: float) -> Tensor:
    """Return the weights (``[clients]``, sum 1) of the geometric median of points with these inner products."""
    products, reachable = without_unreachable(products)
    point = least_update(products, reachable)
    nu = max(nu, SHARPEST * float(distances_to(products, point)[reachable].median()))
    identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
    for _ in range(max_iterations):
        distances = distances_to(products, point)
        pulls = reachable / distances.clamp(min=nu)
        weiszfeld = pulls / pulls.sum() - point
        if float(pulls.sum() * (weiszfeld @ products @ weiszfeld).clamp(min=0).sqrt()) <= tolerance:
            break
        newton = newton_step(products, point, distances, weiszfeld, nu)
        nearest = identity[distances.where(reachable, torch.inf).argmin()] - point
        steps = torch.stack([weiszfeld, newton, nearest])
        step, lower = best_step(products, point, distances, steps, reachable, nu)
        if not lower:
            break  # what is left is rounding
        point = point + step
    pulls = reachable / distances_to(products, point).clamp(min=nu)
    return pulls / pulls.sum()


def without_unreachable(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products with 0 for rows too far off to weigh anything, and which rows are nearer than that.

    `AggregationError` if no row is, as may be where a mixing has spread such rows.
    """
    reachable = products.diagonal() <= FARTHEST_SQUARE
    if not reachable.any():
        raise AggregationError(
            "wanted updates whose distances from each other stay below 1e150, got none; bound them before, "
            "with max-update-norm, or send float32"
        )
    return products.where(reachable[:, None] & reachable, 0.0), reachable


def least_update(products: Tensor, reachable: Tensor) -> Tensor:
    """Return the coefficients of the update with the least sum of distances to all, or of the mean of tied ones.

    Sums are compared through differences to the origin's, in which distances to outliers do not drown the others.
    """
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0).sqrt()
    both = distances + squares.sqrt()  # from update k, and from the origin, to update i
    sums = (reachable * (squares[:, None] - 2 * products) / both.where(both > 0, 1.0)).sum(1)
    sums = sums.where(reachable, torch.inf)
    least = sums.argmin()
    tied = sums <= sums[least] + TIE * distances[least].median()
    return tied.double() / tied.sum()


def newton_step(products: Tensor, point: Tensor, distances: Tensor, weiszfeld: Tensor, nu: float) -> Tensor:
    """Return the step, in coefficients, to where the second-order model of the objective is least; NaN if it is flat.

    With u_i the unit vector to x_i, the Hessian divided by the sum of pulls is I - U diag(b) U^T, and b is 0 below nu;
    so the step s solves s = p + U diag(b) U^T s, for which U^T s is enough. p is Weiszfeld's step.
    """
    identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
    rays = identity - point
    around = rays @ products @ rays.t()  # <x_i - point, x_j - point>
    curved = torch.where(distances > nu, weiszfeld + point, 0.0).sqrt() / distances.clamp(min=nu)
    factor, failed = torch.linalg.cholesky_ex(identity - curved[:, None] * around * curved)
    along = curved * (rays @ (products @ weiszfeld))
    bent = curved * torch.cholesky_solve(along[:, None], factor)[:, 0]
    return torch.where(failed == 0, weiszfeld + bent - bent.sum() * point, torch.nan)


def best_step(
    products: Tensor, point: Tensor, distances: Tensor, steps: Tensor, reachable: Tensor, nu: float
) -> tuple[Tensor, bool]:
    """Return the multiple of one of `steps` (``[steps, clients]``) with the least objective, and if it is lower at all.

    Compares sums of differences of distances, each of them to full accuracy however long the distances are.
    """
    lengths = LENGTHS.to(products)[:, None, None]
    moves = steps @ products
    along = moves - (moves @ point)[:, None]
    growth = lengths.square() * (steps * moves).sum(1)[:, None] - 2 * lengths * along
    after = (distances.square() + growth).clamp(min=0).sqrt()
    far = (distances > nu) & (after > nu)
    changes = torch.where(
        far, growth / (distances + after).clamp(min=nu), smoothed(after, nu) - smoothed(distances, nu)
    )
    changes = (reachable * changes).sum(2).nan_to_num(nan=torch.inf)
    length, best = divmod(int(changes.argmin()), len(steps))
    return LENGTHS[length].item() * steps[best], bool(changes.min() < 0)


def smoothed(distances: Tensor, nu: float) -> Tensor:
    """Return the distances, with a parabola in place of the tip of the cone below `nu`."""
    return torch.where(distances > nu, distances, distances.square() / (2 * nu) + nu / 2)


def distances_to(products: Tensor, point: Tensor) -> Tensor:
    """Return ||x_i - sum_j point[j] x_j|| (``[clients]``) from the inner products of the x.

    As a quadratic form of the difference of coefficients, which does not cancel when the sum is close to x_i.
    """
    rays = point - torch.eye(len(point), dtype=point.dtype, device=point.device)
    return ((rays @ products) * rays).sum(1).clamp(min=0).sqrt()
