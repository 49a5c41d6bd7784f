"""The compiled loops of the forward."""

from __future__ import annotations

import math

import numpy as np

from .numba_activations import activate
from .numba_cache import inlined, kernel, rare
from .numba_geometry import (
    AHEAD,
    NEAR,
    PARTIAL,
    PARTIAL_CHANNELS_LAST,
    TOGETHER,
    Coefficients,
    Geometry,
    Kind,
    Offsets,
    Planes,
    X,
    channel_coefficients,
    coefficients_of,
    flat_planes,
    locate,
    next_item,
    offsets_of,
    operands_of,
    plane_coefficients,
    planes_together,
    position_offsets,
    position_steps,
    prefetch_run,
    previous_item,
    run_offsets,
    scale_short_planes,
    short_plane_offsets,
    tile_bounds,
)
from .numba_intrinsics import add, narrow, own_address, scaled, stream, typed, widen, zero_of, zeros_of
from .numba_tasks import next_tasks, task_done

FORWARD_SHORT = 2048  # elements; up to so many, several planes are processed together
GUESS_PLACES, GUESS_LENGTH = 8, 8  # a tile's mean is guessed from so many places, of so many elements


@inlined
def _mean_run(x, o, lo, hi, share, zero):
    """Return the mean of a few elements; scaling each by share = 1 / count first avoids overflow."""
    total = zero
    for i in range(lo, hi):
        total = add(total, widen(x[o + i]) * share)
    return total


@inlined
def _centred_run(x, o, lo, hi, mean, mean_lo, zero):
    total = sum_sq = zero
    for i in range(lo, hi):
        c = (widen(x[o + i]) - mean) - mean_lo
        total = add(total, c)
        sum_sq = add(sum_sq, c * c)
    return total, sum_sq


@inlined
def _centred(x, o, run, geometry, tile, mean, mean_lo, zero):
    """Return the sums of a tile's centred values and of their squares."""
    r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
    total = sum_sq = 0.0
    for r in range(r0, r1):
        at = np.uint64(o + run[r])
        for lo in range(l0, l1, PARTIAL):
            hi = min(lo + PARTIAL, l1)
            prefetch_run(x, at + np.uint64(AHEAD), lo, hi)
            s, q = _centred_run(x, at, np.uint64(lo), np.uint64(hi), mean, mean_lo, zero)
            total += s
            sum_sq += q
    return total, sum_sq


@inlined
def _guess_place(i, tile, geometry):
    """Return the run and the first position of the i-th place from which a tile's mean is guessed."""
    r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
    return r0 + (r1 - r0) * i // GUESS_PLACES, l0 + max(l1 - l0 - GUESS_LENGTH, 0) * i // (GUESS_PLACES - 1)


@inlined
def _guess(x, o, run, geometry, tile):
    """Guess a tile's mean from a few elements; the guess is rarely far off."""
    _, _, l0, l1, _ = tile_bounds(tile, geometry)
    size = min(l1 - l0, GUESS_LENGTH)
    total = 0.0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, geometry)
        at = np.uint64(o + run[r])
        for j in range(np.uint64(lo), np.uint64(lo + size)):
            total = add(total, np.float64(widen(x[at + j])))
    return total / (size * GUESS_PLACES)


@inlined
def _guess_channels(x, o, k, run, geometry, tile, width, mean):
    """`_guess` for channels side by side, from one position in each place."""
    mean[:] = 0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, geometry)
        at = np.uint64(o + run[r]) + np.uint64(lo) * k
        for j in range(width):
            mean[j] += widen(x[at + j])
    for j in range(width):
        mean[j] /= GUESS_PLACES


@rare
def _moments_float64(x, o, k, run, geometry, tile):
    """Return mean, mean_lo and m2 of a tile, in float64: the fallback for variances outside float32's range."""
    r0, r1, l0, l1, count = tile_bounds(tile, geometry)
    mean = total = sum_sq = 0.0
    for _ in range(2):
        mean += total / count
        total = sum_sq = 0.0
        for r in range(r0, r1):
            for i in range(np.uint64(l0), np.uint64(l1)):
                c = np.float64(widen(x[np.uint64(o + run[r]) + i * k])) - mean
                total += c
                sum_sq += c * c
    return mean, total / count, sum_sq - total * (total / count)


@inlined
def _moments(x, o, run, geometry, tile, mean, zero, count, least):
    """Return mean (in computing precision), mean_lo and m2 of a tile, from a guess of the mean.

    sum c**2 - count * mean(c)**2 loses at most one bit if mean(c) is within the deviation. If it is not, the guess was
    bad: sum again about the mean. If the rounding of the mean still dominates, as in a nearly constant tile, sum a
    third time about mean + mean_lo.
    """
    mean_lo = zero
    total = sum_sq = excess = 0.0
    for attempt in range(3):
        total, sum_sq = _centred(x, o, run, geometry, tile, mean, mean_lo, zero)
        excess = total / count
        if not total * excess > 0.5 * sum_sq:
            break
        if attempt == 0:
            mean = typed(mean + excess, zero)
        elif attempt == 1:
            mean_lo = typed(excess, zero)
    if not least * count <= sum_sq < math.inf:
        exact, exact_lo, sum_sq = _moments_float64(x, o, np.uint64(1), run, geometry, tile)
        mean = typed(exact, zero)
        return mean, (exact - mean) + exact_lo, sum_sq
    return mean, mean_lo + excess, sum_sq - total * excess


@inlined
def _reduce_forward_rows(operands, geometry, first, last, least, sums):
    """Set the mean, mean_lo and m2 of the items: sums are three arrays."""
    x, run, zero = operands.x, operands.runs[X], zero_of(operands.like)
    of_n, of_c, _ = operands.strides[X]
    means, means_lo, m2s = sums
    n, c, tile = locate(first, geometry)
    for item in range(last - first):
        o = n * of_n + c * of_c
        guess = typed(_guess(x, o, run, geometry, tile), zero)
        count = tile_bounds(tile, geometry)[4]
        means[item], means_lo[item], m2s[item] = _moments(x, o, run, geometry, tile, guess, zero, count, least)
        n, c, tile = next_item(n, c, tile, geometry)


@inlined
def _reduce_forward_channels(operands, geometry, first, last, least, sums):
    """`_guess` and `_moments` for channels side by side."""
    x, run, zero, group = operands.x, operands.runs[X], zeros_of(operands.like), geometry.group
    of_n, _, of_position = operands.strides[X]
    k = np.uint64(of_position)
    means, means_lo, m2s = sums
    mean, mean_lo, a, b = np.empty((4, group), zero.dtype)
    total, sum_sq = np.empty((2, group))
    n, c, tile = locate(first, geometry)
    for item in range(last - first):
        width = np.uint64(min(group, geometry.channels - c))
        o = n * of_n + c
        r0, r1, l0, l1, count = tile_bounds(tile, geometry)
        _guess_channels(x, o, k, run, geometry, tile, width, total)
        for j in range(width):
            mean[j], mean_lo[j] = total[j], zero[0]
        for attempt in range(3):
            total[:] = 0
            sum_sq[:] = 0
            for r in range(r0, r1):
                for lo in range(l0, l1, PARTIAL_CHANNELS_LAST):
                    a[:] = zero[0]
                    b[:] = zero[0]
                    for i in range(lo, min(lo + PARTIAL_CHANNELS_LAST, l1)):
                        at = np.uint64(o + run[r]) + np.uint64(i) * k
                        for j in range(width):
                            d = (widen(x[at + j]) - mean[j]) - mean_lo[j]
                            a[j] += d
                            b[j] += d * d
                    for j in range(width):
                        total[j] += a[j]
                        sum_sq[j] += b[j]
            again = False
            for j in range(width):
                excess = total[j] / count
                if total[j] * excess > 0.5 * sum_sq[j] and attempt < 2:
                    again = True
                    if attempt == 0:
                        mean[j] += excess
                    else:
                        mean_lo[j] = excess
            if not again:
                break
        for j in range(width):
            excess = total[j] / count
            means[item * group + j] = mean[j]
            means_lo[item * group + j] = mean_lo[j] + excess
            m2s[item * group + j] = sum_sq[j] - total[j] * excess
            if not least * count <= sum_sq[j] < math.inf:
                at = item * group + j
                means[at], means_lo[at], m2s[at] = _moments_float64(x, o + j, k, run, geometry, tile)
        n, c, tile = next_item(n, c, tile, geometry)


@inlined
def _counts(geometry):
    """Return the number of elements of each tile."""
    counts = np.empty(geometry.tiles, np.int64)
    for tile in range(geometry.tiles):
        counts[tile] = tile_bounds(tile, geometry)[4]
    return counts


@inlined
def _join_forward(geometry, counts, first, last, sums, eps, planes, variance):
    """Merge tiles by Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to the first tile's."""
    group, tiles = geometry.group, geometry.tiles
    means, means_lo, m2s = sums
    mean, mean_lo, rstd = planes.mean, planes.mean_lo, planes.rstd
    inverse_count = 1 / geometry.plane
    n, c, _ = locate(first * tiles, geometry)
    for block in range(last - first):
        for j in range(min(group, geometry.channels - c)):
            at = block * tiles * group + j
            pooled, m2, count = means_lo[at], m2s[at], counts[0]
            for tile in range(1, tiles):
                more = counts[tile]
                share = more / (count + more)
                distance = (means[at + tile * group] - means[at]) + means_lo[at + tile * group] - pooled
                pooled += distance * share
                m2 += m2s[at + tile * group] + distance * distance * (count * share)
                count += more
            var = 0.0 if m2 <= 0 else m2 * inverse_count  # NaN stays
            mean[n, c + j] = means[at] + pooled
            mean_lo[n, c + j] = (means[at] - mean[n, c + j]) + pooled
            rstd[n, c + j] = 1 / math.sqrt(var + eps)
            if variance.size:
                variance[n, c + j] = var
        c += group
        if c >= geometry.channels:
            n, c = n + 1, 0


@inlined
def _result_run(operands, target, offsets, lo, hi, kind, values):
    """Compute y for a part of a run of one plane; values are its Coefficients, target is y or a buffer."""
    for i in range(lo, hi):
        z = scaled(widen(operands.x[offsets.x + i]), values.unit, values.mean) * values.scale + values.intercept
        if kind.residual is not None:
            z = z + widen(operands.residual[offsets.residual + i])
        target[offsets.result + i] = narrow(activate(z, kind.activation), operands.like)


@inlined
def _apply_forward_rows(operands, geometry, first, last, kind, planes, follows, buffer):
    """Write y. If another plane follows, prefetch its x: reads would otherwise idle during the writes."""
    away = np.uint64(operands.strides[X, 1])
    zero = np.uint64(0)
    n, c, tile = locate(last - 1, geometry)
    for _ in range(last - first):  # backwards, as the last tile read is still in the cache
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        values = plane_coefficients(n, c, planes)
        for r in range(r0, r1):
            at = run_offsets(operands, kind.inplace, n, c, r)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    prefetch_run(operands.x, at.x + away, lo, hi)
                if geometry.streams:
                    start, size = np.uint64(lo), np.uint64(hi - lo)
                    part = Offsets(at.x + start, zero, zero, at.residual + start, zero)
                    _result_run(operands, buffer, part, zero, size, kind, values)
                    stream(buffer, size, operands.result, at.result + start)
                else:
                    _result_run(operands, operands.result, at, np.uint64(lo), np.uint64(hi), kind, values)
        n, c, tile = previous_item(n, c, tile, geometry)


@inlined
def _apply_forward_channels(operands, geometry, first, last, kind, planes):
    x, y, residual = operands.x, operands.result, operands.residual
    unit, m, scale, intercept = np.empty((4, geometry.group), planes.mean.dtype)
    table, steps = Coefficients(unit, m, scale, intercept), position_steps(operands.strides)
    n, c, tile = locate(last - 1, geometry)
    for _ in range(last - first):
        width = min(geometry.group, geometry.channels - c)
        channel_coefficients(n, c, width, planes, table)
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        for r in range(r0, r1):
            base = run_offsets(operands, kind.inplace, n, c, r)
            for i in range(np.uint64(l0), np.uint64(l1)):
                at = position_offsets(base, steps, kind.inplace, i)
                for j in range(np.uint64(width)):
                    z = scaled(widen(x[at.x + j]), unit[j], m[j]) * scale[j] + intercept[j]
                    if kind.residual is not None:
                        z = z + widen(residual[at.residual + j])
                    y[at.result + j] = narrow(activate(z, kind.activation), operands.like)
        n, c, tile = previous_item(n, c, tile, geometry)


@inlined
def _middle(size):
    """Return the middle range of a short plane, at most 64 elements, for guessing its mean: borders are often 0."""
    count = min(size, np.uint64(64))
    lo = (size - count) // np.uint64(2)
    return lo, lo + count


@inlined
def _forward_short_rows(operands, geometry, first, last, kind, planes, eps, least, variance):
    """The whole forward for planes so short that per-plane work matters; it is done for many planes at a time."""
    x, run, zero = operands.x, operands.runs[X], zero_of(operands.like)
    size, count = np.uint64(geometry.length), typed(geometry.length, zero)
    # Planes of 4 x 4 are frequent, and a quarter faster with loops of constant length.
    origin, sixteen = np.uint64(0), np.uint64(16)
    m, d, q, r, unit, scale, intercept = np.zeros((7, TOGETHER), planes.mean.dtype)
    table = Coefficients(unit, m, scale, intercept)
    offsets = np.empty((len(operands.strides), TOGETHER), np.uint64)
    exact = np.empty(TOGETHER)
    lowest, highest = typed(least * geometry.length, zero), typed(math.inf, zero)
    lo, hi = _middle(size)
    inverse_middle = typed(1 / (hi - lo), zero)
    most = planes_together(size)
    for start in range(first, last, most):
        together = min(most, last - start)
        short_plane_offsets(start, together, geometry, operands.strides, offsets, planes, table)
        for j in range(together):
            if size == sixteen:
                m[j] = _mean_run(x, offsets[X, j], origin, sixteen, inverse_middle, zero)
            else:
                m[j] = _mean_run(x, offsets[X, j], lo, hi, inverse_middle, zero)
        for j in range(together):
            if size == sixteen:
                prefetch_run(x, offsets[X, j] + np.uint64(AHEAD), origin, sixteen)
                d[j], q[j] = _centred_run(x, offsets[X, j], origin, sixteen, m[j], zero, zero)
            else:
                prefetch_run(x, offsets[X, j] + np.uint64(AHEAD), origin, size)
                d[j], q[j] = _centred_run(x, offsets[X, j], origin, size, m[j], zero, zero)
        for j in range(TOGETHER):
            share = d[j] / count
            r[j] = typed(0.5, zero) * q[j] - d[j] * share
            q[j] -= d[j] * share
            r[j] = r[j] if lowest <= q[j] < highest else typed(-1, zero)
            d[j] = share
        again = False
        for j in range(together):
            if r[j] < zero:
                if not again:
                    again = True
                    for i in range(TOGETHER):  # array slices take a second to compile
                        exact[i] = -1
                o = np.int64(offsets[X, j])
                m[j], d[j], exact[j] = _moments(x, o, run, geometry, 0, m[j], zero, geometry.length, least)
                q[j] = exact[j]
        for j in range(TOGETHER):  # round m + d to the nearest number, by Knuth's exact sum
            total = m[j] + d[j]
            part = total - m[j]
            d[j] = (m[j] - (total - part)) + (d[j] - part)
            m[j] = total
            q[j] = (zero if q[j] <= zero else q[j]) / count
            r[j] = typed(1, zero) / typed(math.sqrt(q[j] + typed(eps, zero)), zero)
        if again:
            for j in range(together):
                if exact[j] >= 0:  # exact may exceed the range of q
                    r[j] = 1 / math.sqrt(exact[j] / geometry.length + eps)
        for j in range(together):
            planes.mean[start + j], planes.mean_lo[start + j], planes.rstd[start + j] = m[j], d[j], r[j]
        if variance.size:
            for j in range(together):
                variance[start + j] = q[j]
        scale_short_planes(table, d, r)
        for j in range(together):
            at, values = offsets_of(offsets, j, kind.inplace), coefficients_of(table, j)
            if size == sixteen:
                _result_run(operands, operands.result, at, origin, sixteen, kind, values)
            else:
                _result_run(operands, operands.result, at, origin, size, kind, values)


@kernel
def forward_tiles(queue, where, channels_last, least, sums):
    """Set the partial sums (mean, mean_lo and m2) of tiles. where: see numba_geometry.operands_of."""
    operands, geometry = operands_of(where, None), Geometry(*where[4])
    first, last = next_tasks(queue)
    while first < last:
        start = geometry.sums + first * geometry.group
        parts = sums[0][start:], sums[1][start:], sums[2][start:]
        if channels_last is None:
            _reduce_forward_rows(operands, geometry, first, last, least, parts)
        else:
            _reduce_forward_channels(operands, geometry, first, last, least, parts)
        first, last = task_done(queue)
    return own_address()


@kernel
def forward_join(geometry, counts, first, last, sums, eps, planes, variance):
    """Merge the partial sums of the tiles of blocks: mean, mean_lo and rstd of planes, and variance unless empty."""
    _join_forward(Geometry(*geometry), counts, first, last, sums, eps, Planes(*planes), variance)


@kernel
def forward_results(queue, where, channels_last, kind, planes):
    """Write y of tiles, given the statistics."""
    kind, planes, geometry = Kind(*kind), Planes(*planes), Geometry(*where[4])
    operands = operands_of(where, kind.inplace)
    buffer = np.empty(PARTIAL, operands.result.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_forward_rows(operands, geometry, first, last, kind, planes, False, buffer)
        else:
            _apply_forward_channels(operands, geometry, first, last, kind, planes)
        first, last = task_done(queue)
    return own_address()


@kernel
def forward_planes(queue, where, channels_last, kind, planes, eps, least, variance):
    """Do the whole forward of blocks."""
    kind, planes, geometry = Kind(*kind), Planes(*planes), Geometry(*where[4])
    operands = operands_of(where, kind.inplace)
    tiles, counts = geometry.tiles, _counts(geometry)
    means, means_lo, m2s = np.empty((3, tiles * geometry.group))
    sums = means, means_lo, m2s
    buffer = np.empty(PARTIAL, operands.result.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and geometry.runs == 1 and geometry.length <= FORWARD_SHORT:
            flat = flat_planes(planes)
            _forward_short_rows(operands, geometry, first, last, kind, flat, eps, least, variance.ravel())
            last = first
        for block in range(first, last):
            begin, end = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and geometry.runs * geometry.length <= NEAR
            if channels_last is None:
                _reduce_forward_rows(operands, geometry, begin, end, least, sums)
            else:
                _reduce_forward_channels(operands, geometry, begin, end, least, sums)
            _join_forward(geometry, counts, block, block + 1, sums, eps, planes, variance)
            if channels_last is None:
                _apply_forward_rows(operands, geometry, begin, end, kind, planes, follows, buffer)
            else:
                _apply_forward_channels(operands, geometry, begin, end, kind, planes)
        first, last = task_done(queue)
    return own_address()
