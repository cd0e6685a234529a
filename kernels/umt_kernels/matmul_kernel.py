"""The Triton kernel of `matmul`: a product on the tensor cores, tile by tile, with an epilogue."""

from __future__ import annotations

from umt_kernels.backend import triton

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import largest_magnitudes

    @triton.jit
    def kernel(
        a_ptr,  # [m, k]; this and the next four are tensor descriptors with DESCRIPTORS
        b_ptr,  # [n, k], or [k, n] if TRANSPOSED
        out_ptr,  # [m, n]
        residual_ptr,  # [m, n] or None
        before_ptr,  # [m, n] or None: read with DERIVATIVE, else written
        bias_ptr,  # [n] or None
        sums_ptr,  # [tiles of rows, n] or None
        a_scale_ptr,  # [m], [k / DEPTH, m] if GROUPED, or None
        b_scale_ptr,  # [n] or None
        out_scale_ptr,  # [n / columns of a part, m] or None
        m,
        n,
        k,
        a_row,
        b_row,
        residual_row,
        DESCRIPTORS: tl.constexpr,
        TRANSPOSED: tl.constexpr,
        ACTIVATION: tl.constexpr,
        DERIVATIVE: tl.constexpr,
        GROUPED: tl.constexpr,
        LARGEST: tl.constexpr,
        EVEN: tl.constexpr,
        FLATTEN: tl.constexpr,
        WIDEN: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        PARTS: tl.constexpr,
        SWATH: tl.constexpr,
    ):
        PART: tl.constexpr = COLUMNS // PARTS
        INTEGER: tl.constexpr = a_ptr.dtype.is_int() if DESCRIPTORS else a_ptr.dtype.element_ty.is_int()
        SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
        row_tiles = tl.cdiv(m, ROWS)
        column_tiles = tl.cdiv(n, COLUMNS)
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
            # Down SWATH tiles, then right, so that neighbouring programs read the same data from the L2 cache.
            swath = tile // (SWATH * column_tiles)
            height = tl.minimum(row_tiles - swath * SWATH, SWATH)
            inside = tile % (SWATH * column_tiles)
            row_tile = swath * SWATH + inside % height
            first_row = row_tile * ROWS
            first_column = inside // height * COLUMNS
            row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
            column = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            deep = tl.arange(0, DEPTH)
            a_place = tl.minimum(row, m - 1)[:, None] * a_row + deep[None, :]
            if TRANSPOSED:
                b_place = deep.to(tl.int64)[:, None] * b_row + column[None, :]
            else:
                b_place = tl.minimum(column, n - 1)[:, None] * b_row + deep[None, :]
            scale_place = row
            total = tl.zeros((ROWS, COLUMNS), tl.float32 if GROUPED else SUM)
            for start in range(0, k, DEPTH):
                if DESCRIPTORS:
                    a = a_ptr.load([first_row, start])
                    if TRANSPOSED:
                        b = b_ptr.load([start, first_column])
                    else:
                        b = b_ptr.load([first_column, start]).T
                else:
                    within = deep < k - start
                    if EVEN:
                        a = tl.load(a_ptr + a_place)
                    else:
                        a = tl.load(a_ptr + a_place, mask=within[None, :], other=0.0)
                    if TRANSPOSED:
                        b = tl.load(b_ptr + b_place, mask=within[:, None] & (column < n)[None, :], other=0.0)
                        b_place += DEPTH * b_row
                    else:
                        if EVEN:
                            b = tl.load(b_ptr + b_place)
                        else:
                            b = tl.load(b_ptr + b_place, mask=within[None, :], other=0.0)
                        b = b.T
                        b_place += DEPTH
                    a_place += DEPTH
                if WIDEN:  # the interpreter multiplies the bits of bf16 and float8
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                if GROUPED:
                    scale = tl.load(a_scale_ptr + scale_place, mask=row < m, other=0.0)
                    scale_place += m
                    total += tl.dot(a, b, out_dtype=SUM).to(tl.float32) * scale[:, None]
                else:
                    total = tl.dot(a, b, total, input_precision="ieee", out_dtype=SUM)
            total = total.to(tl.float32)
            tensors = (
                out_ptr, residual_ptr, before_ptr, bias_ptr, sums_ptr, a_scale_ptr, b_scale_ptr, out_scale_ptr
            )  # fmt: skip
            sizes = (m, n, residual_row)
            settings: tl.constexpr = (DESCRIPTORS, ACTIVATION, DERIVATIVE, GROUPED, LARGEST, ROWS, PART)
            if PARTS == 1:
                _finish(total, first_row, first_column, row_tile, tensors, sizes, settings)
            else:
                left, right = _halves(total)
                if PARTS == 2:
                    _finish(left, first_row, first_column, row_tile, tensors, sizes, settings)
                    _finish(right, first_row, first_column + PART, row_tile, tensors, sizes, settings)
                else:
                    first, second = _halves(left)
                    _finish(first, first_row, first_column, row_tile, tensors, sizes, settings)
                    _finish(second, first_row, first_column + PART, row_tile, tensors, sizes, settings)
                    third, fourth = _halves(right)
                    _finish(third, first_row, first_column + 2 * PART, row_tile, tensors, sizes, settings)
                    _finish(fourth, first_row, first_column + 3 * PART, row_tile, tensors, sizes, settings)

    @triton.jit
    def _halves(x):
        """The left and the right half of a tile's columns."""
        rows: tl.constexpr = x.shape[0]
        columns: tl.constexpr = x.shape[1]
        return tl.split(tl.permute(tl.reshape(x, (rows, 2, columns // 2)), (0, 2, 1)))

    @triton.jit
    def _finish(x, first_row, first_column, row_tile, tensors, sizes, SETTINGS: tl.constexpr):
        """The epilogue of one part of a tile: x [ROWS, PART], float32."""
        out_ptr, residual_ptr, before_ptr, bias_ptr, sums_ptr, a_scale_ptr, b_scale_ptr, out_scale_ptr = tensors
        m, n, residual_row = sizes
        DESCRIPTORS: tl.constexpr = SETTINGS[0]
        ACTIVATION: tl.constexpr = SETTINGS[1]
        DERIVATIVE: tl.constexpr = SETTINGS[2]
        GROUPED: tl.constexpr = SETTINGS[3]
        LARGEST: tl.constexpr = SETTINGS[4]
        ROWS: tl.constexpr = SETTINGS[5]
        PART: tl.constexpr = SETTINGS[6]
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        column = (first_column + tl.arange(0, PART)).to(tl.int64)
        here = row < m
        valid = column < n
        mask = here[:, None] & valid[None, :]
        place = row[:, None] * n + column[None, :]
        if a_scale_ptr is not None and not GROUPED:
            x *= tl.load(a_scale_ptr + row, mask=here, other=0.0)[:, None]
        if b_scale_ptr is not None:
            x *= tl.load(b_scale_ptr + column, mask=valid, other=0.0)[None, :]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        if DERIVATIVE:
            if DESCRIPTORS:
                at = before_ptr.load([first_row, first_column])
            else:
                at = tl.load(before_ptr + place, mask=mask, other=0.0)
            x *= _slope(at.to(tl.float32), ACTIVATION)
        else:
            if before_ptr is not None:
                if DESCRIPTORS:
                    before_ptr.store([first_row, first_column], x.to(before_ptr.dtype))
                else:
                    tl.store(before_ptr + place, x.to(before_ptr.dtype.element_ty), mask=mask)
            x = _activate(x, ACTIVATION)
        if residual_ptr is not None:
            if DESCRIPTORS:
                residual = residual_ptr.load([first_row, first_column])
            else:
                residual = tl.load(residual_ptr + (row[:, None] * residual_row + column[None, :]), mask=mask, other=0.0)
            x += residual.to(tl.float32)
        if sums_ptr is not None:
            total = tl.sum(tl.where(here[:, None], x, 0.0), axis=0)
            tl.store(sums_ptr + row_tile.to(tl.int64) * n + column, total, mask=valid)
        if out_scale_ptr is not None:
            largest = largest_magnitudes(tl.where(valid[None, :], x, 0.0))
            scale = tl.maximum(largest, 1e-12) / LARGEST
            group = (first_column // PART).to(tl.int64) * m
            # The last tile may have a part beyond the last column, which has no scale.
            tl.store(out_scale_ptr + group + row, scale, mask=here & (first_column + 0 * row < n))
            x = _rounded(x / scale[:, None], out_ptr.dtype if DESCRIPTORS else out_ptr.dtype.element_ty)
        if DESCRIPTORS:
            out_ptr.store([first_row, first_column], x.to(out_ptr.dtype))
        else:
            tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _activate(x, NAME: tl.constexpr):
        if NAME == "gelu":
            x = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
        elif NAME == "quick_gelu":
            x = x * tl.sigmoid(1.702 * x)
        return x

    @triton.jit
    def _slope(x, NAME: tl.constexpr):
        """Derivative of the activation."""
        if NAME == "gelu":
            x = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
        elif NAME == "quick_gelu":
            gate = tl.sigmoid(1.702 * x)
            x = gate * (1.0 + 1.702 * x * (1.0 - gate))
        return x

    @triton.jit
    def _rounded(x, DTYPE: tl.constexpr):
        """Round x, which is in range, for an 8-bit dtype. The conversion to float8 rounds already."""
        if DTYPE.is_int():
            x = tl.floor(x + 0.5)
        return x.to(DTYPE)
