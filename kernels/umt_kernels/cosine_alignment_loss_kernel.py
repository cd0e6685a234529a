"""The Triton kernels of `alignment_loss`: losses and gradients of rows, their sums, and scaled gradients."""

from __future__ import annotations

from umt_kernels.backend import triton

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import column_sums, eight_sums, four_sums

    @triton.jit
    def kernel(
        x_ptr,  # predictions [K, R, M, C]
        t_ptr,  # targets [K, B, N, C]
        ids_ptr,  # [R, M]
        w_ptr,  # [K, C]
        b_ptr,
        factor_ptr,  # [K or 1, R, M]
        loss_ptr,  # [K, R, M] with PER_ROW
        dx_ptr,  # [K, R, M, C], contiguous
        partial_ptr,  # without PER_ROW: sums of gradients [2, K, sums, C] with NORM, then of the loss [K, sums]; each
        # program leaves ROWS sums
        rows_per_set,
        rows,
        masks,  # R / B
        width,
        rows_per_program,
        x_k,
        x_r,
        x_m,
        t_k,
        t_b,
        t_n,
        factor_k,
        eps,
        beta,
        floor,
        scale,
        KIND: tl.constexpr,
        WITH_GRAD: tl.constexpr,
        NORM: tl.constexpr,
        GATHER: tl.constexpr,
        WEIGHTED: tl.constexpr,
        PADDED: tl.constexpr,
        PER_ROW: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        layer = tl.program_id(1).to(tl.int64)
        # Every tile is [ROWS, BLOCK], w and b too: to change another layout, warps would have to wait for each other.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
        inside = column < width
        if NORM:
            w = tl.load(w_ptr + layer * width + column, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + layer * width + column, mask=inside, other=0.0).to(tl.float32)
            dw = tl.zeros((ROWS, BLOCK), tl.float32)
            db = tl.zeros((ROWS, BLOCK), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside
            row_set = row // rows_per_set
            place = row - row_set * rows_per_set
            if GATHER:
                other = tl.load(ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                other = place.to(tl.int64)
            factor = tl.where(here, scale, 0.0)
            if WEIGHTED:
                factor = factor * tl.load(factor_ptr + layer * factor_k + row, mask=here, other=0.0).to(tl.float32)
            there = here
            if PADDED:  # what lies in a row of nothing may be NaN
                there = here & (other >= 0)
                factor = tl.where(there, factor, 0.0)
            read = there[:, None] & inside
            x_row = layer * x_k + row_set.to(tl.int64) * x_r + place.to(tl.int64) * x_m
            t_row = layer * t_k + (row_set // masks).to(tl.int64) * t_b + other * t_n
            x = tl.load(x_ptr + x_row[:, None] + column, mask=read, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + t_row[:, None] + column, mask=read, other=0.0).to(tl.float32)
            if NORM:
                mean = tl.sum(x, axis=1) / width
                centred = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
                rstd = tl.where(there, rstd, 0.0)  # infinite in a row of zeros if eps is 0
                x = centred * rstd[:, None]
                y = x * w + b
            else:
                y = x
            if KIND == 0:
                # One reduction for all sums: the sums over dy = a t + c y, of the norm's backward, follow from t and y.
                if NORM and WITH_GRAD:
                    tw, yw = t * w, y * w
                    yy, tt, yt, t_shift, y_shift, t_share, y_share, _ = eight_sums(
                        y * y, t * t, y * t, tw, yw, tw * x, yw * x, yw * x, 1
                    )
                else:
                    yy, tt, yt, _ = four_sums(y * y, t * t, y * t, y * t, 1)
                norm = tl.sqrt(yy)
                y_inv = tl.where(norm > floor, 1.0 / tl.maximum(norm, 1e-12), 0.0)
                t_inv = 1.0 / tl.maximum(tl.sqrt(tt), 1e-12)
                cosine = yt * y_inv * t_inv
                loss = 2.0 - 2.0 * cosine
                if WITH_GRAD:
                    # d(2 - 2 cos)/dy = -2 (t / |t| - cos y / |y|) / |y|
                    a = -2.0 * y_inv * t_inv * factor
                    c = 2.0 * cosine * y_inv * y_inv * factor
                    dy = a[:, None] * t + c[:, None] * y
                    if NORM:
                        dw += dy * x
                        db += dy
                        dy = dy * w
                        share = a * t_share + c * y_share
                        shift = a * t_shift + c * y_shift
            else:
                d = y - t
                if KIND == 1:
                    each = tl.abs(d)
                    dy = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
                elif KIND == 2:
                    near = tl.abs(d) < beta
                    each = tl.where(near, 0.5 * d * d / beta, tl.abs(d) - 0.5 * beta)
                    dy = tl.where(near, d / beta, tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)))  # NaN stays
                else:
                    each = d * d
                    dy = 2.0 * d
                dy = tl.where(mask, dy * (factor / width)[:, None], 0.0)
                if NORM and WITH_GRAD:
                    dw += dy * x
                    db += dy
                    dy = dy * w
                    loss, share, shift, _ = four_sums(each, dy * x, dy, dy, 1)
                else:
                    loss = tl.sum(each, axis=1)
                loss = loss / width
            if WITH_GRAD:
                if NORM:
                    slope = tl.where(width > 1, rstd, 0.0)  # a single column is always normalised to 0
                    dy = (dy - (shift / width)[:, None] - x * (share / width)[:, None]) * slope[:, None]
                dx_row = (layer * rows + row) * width
                tl.store(dx_ptr + dx_row[:, None] + column, dy.to(dx_ptr.dtype.element_ty), mask=mask)
            if PER_ROW:
                tl.store(loss_ptr + layer * rows + row, loss * factor, mask=here)
            else:
                total += loss * factor
        if not PER_ROW:
            slot = (layer * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
            losses_ptr = partial_ptr
            if NORM and WITH_GRAD:
                plane = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * ROWS * width
                place = slot[:, None] * width + column
                tl.store(partial_ptr + place, dw, mask=inside)
                tl.store(partial_ptr + plane + place, db, mask=inside)
                losses_ptr += 2 * plane
            tl.store(losses_ptr + slot, total)

    @triton.jit
    def finish_kernel(
        partial_ptr,  # as above
        loss_ptr,  # a scalar
        affine_ptr,  # [2, K, C] with AFFINE
        losses,  # K * sums
        sums,
        width,
        AFFINE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        losses_ptr = partial_ptr
        if AFFINE:
            plane = tl.program_id(1).to(tl.int64)
            column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            total = column_sums(partial_ptr + plane * sums * width, sums, width, column, ROWS, BLOCK)
            tl.store(affine_ptr + plane * width + column, total, mask=column < width)
            losses_ptr += tl.cast(losses, tl.int64) * 2 * width
        if tl.program_id(0) + tl.program_id(1) == 0:
            loss = tl.zeros((ROWS * BLOCK,), tl.float32)
            for start in range(0, losses, ROWS * BLOCK):
                place = start + tl.arange(0, ROWS * BLOCK)
                loss += tl.load(losses_ptr + place, mask=place < losses, other=0.0)
            tl.store(loss_ptr, tl.sum(loss, axis=0))

    @triton.jit
    def scale_kernel(grad_ptr, factor_ptr, scaled_ptr, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < count
        factor = tl.load(factor_ptr).to(tl.float32)
        if not IN_PLACE or factor != 1.0:
            scaled = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)
