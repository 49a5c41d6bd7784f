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
    channel_coefficients,
    locate,
    next_unit,
    plane_coefficients,
    planes_together,
    prefetch_run,
    previous_unit,
    run_start,
    short_plane_offsets,
    tile_bounds,
)
from .numba_intrinsics import add, memory, narrow, own_address, scaled, stream, typed, unit_of, widen, zero_of, zeros_of
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
def _centred(x, o, run, shape, tile, mean, mean_lo, zero):
    """Return the sums of a tile's centred values and of their squares."""
    r0, r1, l0, l1, _ = tile_bounds(tile, shape)
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
def _guess_place(i, tile, shape):
    """Return the run and the first position of the i-th place from which a tile's mean is guessed."""
    r0, r1, l0, l1, _ = tile_bounds(tile, shape)
    return r0 + (r1 - r0) * i // GUESS_PLACES, l0 + max(l1 - l0 - GUESS_LENGTH, 0) * i // (GUESS_PLACES - 1)


@inlined
def _guess(x, o, run, shape, tile):
    """Guess a tile's mean from a few elements; the guess is rarely far off."""
    _, _, l0, l1, _ = tile_bounds(tile, shape)
    size = min(l1 - l0, GUESS_LENGTH)
    total = 0.0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, shape)
        at = np.uint64(o + run[r])
        for j in range(np.uint64(lo), np.uint64(lo + size)):
            total = add(total, np.float64(widen(x[at + j])))
    return total / (size * GUESS_PLACES)


@inlined
def _guess_channels(x, o, k, run, shape, tile, width, mean):
    """`_guess` for channels side by side, from one position in each place."""
    mean[:] = 0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, shape)
        at = np.uint64(o + run[r]) + np.uint64(lo) * k
        for j in range(width):
            mean[j] += widen(x[at + j])
    for j in range(width):
        mean[j] /= GUESS_PLACES


@rare
def _moments_float64(x, o, k, run, shape, tile):
    """Return mean, mean_lo and m2 of a tile, in float64: the fallback for variances outside float32's range."""
    r0, r1, l0, l1, count = tile_bounds(tile, shape)
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
def _moments(x, o, run, shape, tile, mean, zero, count, least):
    """Return mean (in computing precision), mean_lo and m2 of a tile, from a guess of the mean.

    sum c**2 - count * mean(c)**2 loses at most one bit if mean(c) is within the deviation. If it is not, the guess was
    bad: sum again about the mean. If the rounding of the mean still dominates, as in a nearly constant tile, sum a
    third time about mean + mean_lo.
    """
    mean_lo = zero
    total = sum_sq = excess = 0.0
    for attempt in range(3):
        total, sum_sq = _centred(x, o, run, shape, tile, mean, mean_lo, zero)
        excess = total / count
        if not total * excess > 0.5 * sum_sq:
            break
        if attempt == 0:
            mean = typed(mean + excess, zero)
        elif attempt == 1:
            mean_lo = typed(excess, zero)
    if not least * count <= sum_sq < math.inf:
        exact, exact_lo, sum_sq = _moments_float64(x, o, np.uint64(1), run, shape, tile)
        mean = typed(exact, zero)
        return mean, (exact - mean) + exact_lo, sum_sq
    return mean, mean_lo + excess, sum_sq - total * excess


@inlined
def _reduce_forward_rows(x, place, run, shape, first, last, zero, least, means, means_lo, m2s):
    n, c, tile = locate(first, shape)
    for item in range(last - first):
        o = n * place[0] + c * place[1]
        guess = typed(_guess(x, o, run, shape, tile), zero)
        count = tile_bounds(tile, shape)[4]
        means[item], means_lo[item], m2s[item] = _moments(x, o, run, shape, tile, guess, zero, count, least)
        n, c, tile = next_unit(n, c, tile, shape)


@inlined
def _reduce_forward_channels(x, place, run, shape, first, last, zero, least, means, means_lo, m2s):
    """`_guess` and `_moments` for channels side by side."""
    channels, group = shape[:2]
    k = np.uint64(place[2])
    mean, mean_lo, a, b = np.empty((4, group), zero.dtype)
    total, sum_sq = np.empty((2, group))
    n, c, tile = locate(first, shape)
    for item in range(last - first):
        width = np.uint64(min(group, channels - c))
        o = n * place[0] + c
        r0, r1, l0, l1, count = tile_bounds(tile, shape)
        _guess_channels(x, o, k, run, shape, tile, width, total)
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
                means[at], means_lo[at], m2s[at] = _moments_float64(x, o + j, k, run, shape, tile)
        n, c, tile = next_unit(n, c, tile, shape)


@inlined
def _counts(shape):
    """Return the number of elements of each tile."""
    counts = np.empty(shape[2], np.int64)
    for tile in range(shape[2]):
        counts[tile] = tile_bounds(tile, shape)[4]
    return counts


@inlined
def _join_forward(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance):
    """Merge tiles by Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to the first tile's."""
    channels, group, tiles = shape[:3]
    inverse_count = 1 / shape[8]
    n, c, _ = locate(first * tiles, shape)
    for block in range(last - first):
        for j in range(min(group, channels - c)):
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
        if c >= channels:
            n, c = n + 1, 0


@inlined
def _result_run(like, x, y, res, offsets, lo, hi, residual, act, unit, m, scale, intercept):
    """Compute y for a part of a run of one plane."""
    o0, o1, o2 = offsets
    for i in range(lo, hi):
        z = scaled(widen(x[o0 + i]), unit, m) * scale + intercept
        if residual is not None:
            z = z + widen(res[o2 + i])
        y[o1 + i] = narrow(activate(z, act), like)


@inlined
def _apply_forward_rows(
    like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, follows, buffer,
):  # fmt: skip
    """Write y. If another plane follows, prefetch its x: reads would otherwise idle during the writes."""
    away = np.uint64(places[0, 1])
    streams = shape[7]
    zero = np.uint64(0)
    n, c, tile = locate(last - 1, shape)
    for _ in range(last - first):  # backwards, as the last tile read is still in the cache
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        unit, m, scale, intercept = plane_coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        for r in range(r0, r1):
            o0 = run_start(0, n, c, r, places, runs)
            o1 = run_start(1, n, c, r, places, runs)
            o2 = run_start(-1, n, c, r, places, runs)
            if inplace is not None:
                o1 = o0
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    prefetch_run(x, o0 + away, lo, hi)
                if streams:
                    at, size = np.uint64(lo), np.uint64(hi - lo)
                    _result_run(
                        like, x, buffer, res, (o0 + at, zero, o2 + at), zero, size, residual, act,
                        unit, m, scale, intercept,
                    )  # fmt: skip
                    stream(buffer, size, y, o1 + at)
                else:
                    _result_run(
                        like, x, y, res, (o0, o1, o2), np.uint64(lo), np.uint64(hi), residual, act,
                        unit, m, scale, intercept,
                    )  # fmt: skip
        n, c, tile = previous_unit(n, c, tile, shape)


@inlined
def _apply_forward_channels(
    like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd,
):  # fmt: skip
    k0, k1, k2 = np.uint64(places[0, 2]), np.uint64(places[1, 2]), np.uint64(places[-1, 2])
    table = np.empty((4, shape[1]), mean.dtype)
    unit, m, scale, intercept = table
    n, c, tile = locate(last - 1, shape)
    for _ in range(last - first):
        width = min(shape[1], shape[0] - c)
        channel_coefficients(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        for r in range(r0, r1):
            b0 = run_start(0, n, c, r, places, runs)
            b1 = run_start(1, n, c, r, places, runs)
            b2 = run_start(-1, n, c, r, places, runs)
            for i in range(np.uint64(l0), np.uint64(l1)):
                o0, o1, o2 = b0 + i * k0, b1 + i * k1, b2 + i * k2
                if inplace is not None:
                    o1 = o0
                for j in range(np.uint64(width)):
                    z = scaled(widen(x[o0 + j]), unit[j], m[j]) * scale[j] + intercept[j]
                    if residual is not None:
                        z = z + widen(res[o2 + j])
                    y[o1 + j] = narrow(activate(z, act), like)
        n, c, tile = previous_unit(n, c, tile, shape)


@inlined
def _middle(size):
    """Return the middle range of a short plane, at most 64 elements, for guessing its mean: borders are often 0."""
    count = min(size, np.uint64(64))
    lo = (size - count) // np.uint64(2)
    return lo, lo + count


@inlined
def _forward_short_rows(
    like, x, y, res, places, run, shape, inplace, residual, act, first, last,
    eps, least, weight, bias, param_strides, mean, mean_lo, rstd, variance,
):  # fmt: skip
    """The whole forward for planes so short that per-plane work matters; it is done for many planes at a time."""
    size, count, zero = np.uint64(shape[4]), typed(shape[4], zero_of(like)), zero_of(like)
    # Planes of 4 x 4 are frequent, and a quarter faster with loops of constant length.
    origin, sixteen = np.uint64(0), np.uint64(16)
    m, d, q, r, unit, scale, intercept = np.zeros((7, TOGETHER), mean.dtype)
    offsets = np.empty((len(places), TOGETHER), np.uint64)
    exact = np.empty(TOGETHER)
    lowest, highest = typed(least * shape[4], zero), typed(math.inf, zero)
    lo, hi = _middle(size)
    inverse_middle = typed(1 / (hi - lo), zero)
    most = planes_together(size)
    for start in range(first, last, most):
        planes = min(most, last - start)
        short_plane_offsets(start, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept)
        for j in range(planes):
            if size == sixteen:
                m[j] = _mean_run(x, offsets[0, j], origin, sixteen, inverse_middle, zero)
            else:
                m[j] = _mean_run(x, offsets[0, j], lo, hi, inverse_middle, zero)
        for j in range(planes):
            if size == sixteen:
                prefetch_run(x, offsets[0, j] + np.uint64(AHEAD), origin, sixteen)
                d[j], q[j] = _centred_run(x, offsets[0, j], origin, sixteen, m[j], zero, zero)
            else:
                prefetch_run(x, offsets[0, j] + np.uint64(AHEAD), origin, size)
                d[j], q[j] = _centred_run(x, offsets[0, j], origin, size, m[j], zero, zero)
        for j in range(TOGETHER):
            share = d[j] / count
            r[j] = typed(0.5, zero) * q[j] - d[j] * share
            q[j] -= d[j] * share
            r[j] = r[j] if lowest <= q[j] < highest else typed(-1, zero)
            d[j] = share
        again = False
        for j in range(planes):
            if r[j] < zero:
                if not again:
                    again = True
                    for i in range(TOGETHER):  # array slices take a second to compile
                        exact[i] = -1
                m[j], d[j], exact[j] = _moments(x, np.int64(offsets[0, j]), run, shape, 0, m[j], zero, shape[4], least)
                q[j] = exact[j]
        for j in range(TOGETHER):  # round m + d to the nearest number, by Knuth's exact sum
            total = m[j] + d[j]
            part = total - m[j]
            d[j] = (m[j] - (total - part)) + (d[j] - part)
            m[j] = total
            q[j] = (zero if q[j] <= zero else q[j]) / count
            r[j] = typed(1, zero) / typed(math.sqrt(q[j] + typed(eps, zero)), zero)
        if again:
            for j in range(planes):
                if exact[j] >= 0:  # exact may exceed the range of q
                    r[j] = 1 / math.sqrt(exact[j] / shape[4] + eps)
        for j in range(planes):
            mean[start + j], mean_lo[start + j], rstd[start + j] = m[j], d[j], r[j]
        if variance.size:
            for j in range(planes):
                variance[start + j] = q[j]
        for j in range(TOGETHER):  # plane_coefficients
            unit[j], r[j] = unit_of(m[j], r[j])
            m[j] *= unit[j]
            scale[j] *= r[j]
            intercept[j] -= d[j] * unit[j] * scale[j]
        for j in range(planes):
            o0, o1, o2 = offsets[0, j], offsets[1, j], offsets[-1, j]
            if inplace is not None:
                o1 = o0
            at, values = (o0, o1, o2), (unit[j], m[j], scale[j], intercept[j])
            if size == sixteen:
                _result_run(like, x, y, res, at, origin, sixteen, residual, act, *values)
            else:
                _result_run(like, x, y, res, at, origin, size, residual, act, *values)


@kernel
def forward_tiles(queue, like, at, places, runs, shape, channels_last, least, means, means_lo, m2s):
    x, group = memory(at[0], like), shape[1]
    first, last = next_tasks(queue)
    while first < last:
        start = shape[9] + first * group
        sums = means[start:], means_lo[start:], m2s[start:]
        if channels_last is None:
            _reduce_forward_rows(x, places[0], runs[0], shape, first, last, zero_of(like), least, *sums)
        else:
            _reduce_forward_channels(x, places[0], runs[0], shape, first, last, zeros_of(like), least, *sums)
        first, last = task_done(queue)
    return own_address()


@kernel
def forward_join(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance):
    _join_forward(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance)


@kernel
def forward_results(
    queue, like, at, places, runs, shape, channels_last, inplace, residual, act,
    weight, bias, param_strides, mean, mean_lo, rstd,
):  # fmt: skip
    x = memory(at[0], like)
    y = x if inplace is not None else memory(at[1], like)
    res = memory(at[-1], like)
    buffer = np.empty(PARTIAL, y.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_forward_rows(
                like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, False, buffer,
            )  # fmt: skip
        else:
            _apply_forward_channels(
                like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@kernel
def forward_planes(
    queue, like, at, places, runs, shape, channels_last, inplace, residual, act,
    eps, least, weight, bias, param_strides, mean, mean_lo, rstd, variance,
):  # fmt: skip
    x = memory(at[0], like)
    y = x if inplace is not None else memory(at[1], like)
    res = memory(at[-1], like)
    tiles, counts = shape[2], _counts(shape)
    means, means_lo, m2s = np.empty((3, tiles * shape[1]))
    buffer = np.empty(PARTIAL, y.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and shape[3] == 1 and shape[4] <= FORWARD_SHORT:
            _forward_short_rows(
                like, x, y, res, places, runs[0], shape, inplace, residual, act, first, last,
                eps, least, weight, bias, param_strides, mean.ravel(), mean_lo.ravel(), rstd.ravel(), variance.ravel(),
            )  # fmt: skip
            last = first
        for block in range(first, last):
            u0, u1 = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and shape[3] * shape[4] <= NEAR
            if channels_last is None:
                _reduce_forward_rows(x, places[0], runs[0], shape, u0, u1, zero_of(like), least, means, means_lo, m2s)
            else:
                _reduce_forward_channels(
                    x, places[0], runs[0], shape, u0, u1, zeros_of(like), least, means, means_lo, m2s
                )
            _join_forward(shape, counts, block, block + 1, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance)
            if channels_last is None:
                _apply_forward_rows(
                    like, x, y, res, places, runs, shape, inplace, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, follows, buffer,
                )  # fmt: skip
            else:
                _apply_forward_channels(
                    like, x, y, res, places, runs, shape, inplace, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd,
                )  # fmt: skip
        first, last = task_done(queue)
    return own_address()
