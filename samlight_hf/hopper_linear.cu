// y = act(norm(x) W^T + b) + residual on the tensor cores of Hopper GPUs (sm_90a): the kernel of hopper_linear.py, which defines
// what is in capitals, and warpgroup_product. x is (rows, K), W (N, K), y (rows, N) and the residual (its rows, N), half precision and
// contiguous; sums are float32.
//
// Programs stay and take tile after tile of y. Of each one's warpgroups the first has the tensor memory accelerator copy blocks of x and
// W, STAGES of them ahead. Each of CONSUMERS others multiplies a tile of 128 rows and TILE_N columns by itself: with two of them, the
// tensor cores work on one's tile while the other finishes its own and writes it.

#include "hopper.cuh"

// What KIND of x there is: see `Input` of hopper_linear.py.
#define ROWS 0
#define NEIGHBOURS 1

constexpr int BLOCK_M = 128, BLOCK_K = 64, STEPS = K / BLOCK_K, COLUMN_TILES = N / TILE_N;
constexpr float HALF = GELU ? 0.5f : 1;  // of what it is that GELU is given
constexpr u32 BLOCK_BYTES = (BLOCK_M + TILE_N) * BLOCK_K * 2;

struct Shared {
    char x[STAGES][BLOCK_M * BLOCK_K * 2];
    char weight[STAGES][TILE_N * BLOCK_K * 2];
    float2 columns[CONSUMERS][TILE_N];  // bias, and sum of the weight's row
    float2 rows[CONSUMERS][BLOCK_M];  // what the norm multiplies a row's products by, and what it adds to them for each row sum
    u64 loaded[STAGES], used[STAGES], asked[CONSUMERS];
};

// ---- copies to shared memory ------------------------------------------------------------------------------------------------------

// 64 features of 128 rows. hopper_linear.py tells what dimensions the map has for each kind of x.
__device__ __forceinline__ void load_x(const TensorMap* map, void* to, u64* barrier, int step, int row) {
#if KIND == ROWS
    load(map, to, barrier, step * BLOCK_K, row, 0, 0, 0);
#elif KIND == NEIGHBOURS  // features are (dy, dx, channel); what lies beyond the image is zero
    constexpr int BLOCKS = STEPS / 9;
    int column = row % WIDTH, line = row / WIDTH % HEIGHT, image = row / (WIDTH * HEIGHT), dx = step / BLOCKS % 3, dy = step / BLOCKS / 3;
    load(map, to, barrier, step % BLOCKS * BLOCK_K, column + dx - 1, line + dy - 1, image, 0);
#endif
}

// Of each 32 rows of W, the one for column 8 q + 2 j + e of y comes to be the one for column 8 j + 2 q + e of the product: a thread has
// the latter of one q, and so eight columns of y that lie side by side.
__device__ __forceinline__ void load_weight(const TensorMap* map, void* to, u64* barrier, int feature, int column) {
    load(map, to, barrier, feature, 0, 0, 0, column / 32);
}

// What one thread does: all blocks of all tiles, each as soon as the one whose memory it takes was used.
__device__ __forceinline__ void load_blocks(Shared& shared, const TensorMap* x, const TensorMap* weight, int num_tiles) {
    constexpr int EARLY = STAGES < STEPS ? STAGES : STEPS;
    for (int step = 0; step < EARLY; step++) {  // of the weights, which the kernel before this one does not write
        arrive_and_expect(&shared.loaded[step], BLOCK_BYTES);
        load_weight(weight, shared.weight[step], &shared.loaded[step], step * BLOCK_K, blockIdx.x % COLUMN_TILES * TILE_N);
    }
    wait_for_the_last_kernel();
    let_the_next_kernel_begin();
    int block = 0;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        int row = tile / COLUMN_TILES * BLOCK_M, column = tile % COLUMN_TILES * TILE_N;
        for (int step = 0; step < STEPS; step++, block++) {
            int stage = block % STAGES;
            if (block >= EARLY) {
                if (block >= STAGES) wait(&shared.used[stage], block / STAGES - 1);
                arrive_and_expect(&shared.loaded[stage], BLOCK_BYTES);
                load_weight(weight, shared.weight[stage], &shared.loaded[stage], step * BLOCK_K, column);
            }
            load_x(x, shared.x[stage], &shared.loaded[stage], step, row);
        }
    }
}

// ---- numbers ----------------------------------------------------------------------------------------------------------------------

// GELU of two numbers, given half of each, as `_gelu` of fused_linear.py. What tanh is of is computed for both at once, in float16, which
// is as exact as the instruction for tanh.
__device__ __forceinline__ void gelu(float& low, float& high) {
    u32 tanh;
    asm("{.reg .b32 x, square, inner;\n"
        "cvt.rn.f16x2.f32 x, %2, %1;\n"
        "mul.f16x2 square, x, x;\n"
        "min.f16x2 square, square, %3;\n"
        "fma.rn.f16x2 inner, square, %4, %5;\n"
        "fma.rn.f16x2 inner, inner, square, %6;\n"
        "mul.f16x2 inner, inner, x;\n"
        "tanh.approx.f16x2 %0, inner;}"
        : "=r"(tanh)
        : "f"(low), "f"(high), "r"(0x46404640), "r"(0xA1C6A1C6),  // 6.25, 32 * -3.522957060e-04,
          "r"(0x34BD34BD), "r"(0x3E613E61));  // 8 * 3.701044177e-02, 2 * 7.975026134e-01
    float2 both = unpack_float16(tanh);
    low = fmaf(low, both.x, low), high = fmaf(high, both.y, high);
}

__device__ __forceinline__ void synchronize_warpgroup(int consumer) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(WARPGROUP) : "memory");
}

// ---- a tile -----------------------------------------------------------------------------------------------------------------------

// A warpgroup's tile of 128 rows, by two products of 64. Of four of the rows a thread has eight of every 32 columns.
struct Tile {
    float sums[2][TILE_N / 2];

    static __device__ __forceinline__ int row(int i) {  // in the tile, of the thread's four
        return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8 + i / 2 * 64;
    }
    static __device__ __forceinline__ int column(int group) { return group * 32 + threadIdx.x % 4 * 8; }  // the first of eight
    // Of the i-th row, and of the group's eight columns the j-th.
    __device__ __forceinline__ float& at(int i, int group, int j) { return sums[i / 2][group * 16 + j / 2 * 4 + i % 2 * 2 + j % 2]; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < TILE_N / 2; i++) sums[half][i] = 0;
    }
};

// Products are added to the bias, and to the residual.
__device__ __forceinline__ void begin(Tile& tile, const uint4* residual, const float4* bias, int first_row, int num_residual_rows) {
#pragma unroll
    for (int group = 0; group < TILE_N / 32; group++) {
        float4 low = bias[tile.column(group) / 4], high = bias[tile.column(group) / 4 + 1];
        float shift[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 added = {};
            if (RESIDUAL) added = residual[((u64)((first_row + tile.row(i)) % num_residual_rows) * N + tile.column(group)) / 8];
            u32 pairs[4] = {added.x, added.y, added.z, added.w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 pair = unpack(pairs[j / 2]);
                tile.at(i, group, j) = shift[j] + (RESIDUAL ? j % 2 ? pair.y : pair.x : 0);
            }
        }
    }
}

__device__ __forceinline__ void multiply_blocks(Shared& shared, Tile& tile, int number, int consumer) {
    int block = number * STEPS, lane = threadIdx.x % 32;
    // In turn. The blocks come in the order of the tiles, and a barrier's phase can be waited for only if the one before it is complete:
    // the other consumer has waited for all earlier ones by then, each of its threads.
    if (CONSUMERS > 1 && number) wait(&shared.asked[1 - consumer], (number - 1) / CONSUMERS);
    keep(tile.sums[0]), keep(tile.sums[1]);
    for (int step = 0; step < STEPS; step++, block++) {
        int stage = block % STAGES;
        wait(&shared.loaded[stage], block / STAGES);
        u64 x = matrix(shared.x[stage]), weight = matrix(shared.weight[stage]);
        begin_products();
#pragma unroll
        for (int k = 0; k < BLOCK_K / 16; k++) {  // 16 features further on are 32 bytes
            warpgroup_product(tile.sums[0], x + 2 * k, weight + 2 * k);
            warpgroup_product(tile.sums[1], x + 64 * 128 / 16 + 2 * k, weight + 2 * k);
        }
        commit_products();
        if (step) {
            wait_for_products<1>();
            if (lane == 0) arrive(&shared.used[(block - 1) % STAGES]);
        }
    }
    if (CONSUMERS > 1) arrive(&shared.asked[consumer]);
}

__device__ __forceinline__ void end_products(Shared& shared, Tile& tile, int number) {
    wait_for_products<0>();
    if (threadIdx.x % 32 == 0) arrive(&shared.used[((number + 1) * STEPS - 1) % STAGES]);
    keep(tile.sums[0]), keep(tile.sums[1]);
}

// Norm, GELU, rounding; to memory.
__device__ __forceinline__ void finish(Shared& shared, Tile& tile, int consumer, uint4* y, float* found, int first_row, int num_rows) {
    float2 norm[4];
    float totals[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) norm[i] = NORM ? shared.rows[consumer][tile.row(i)] : float2{};
#pragma unroll
    for (int group = 0; group < TILE_N / 32; group++) {
        float4 columns[4];  // bias and sum of two
        if (NORM)
#pragma unroll
            for (int j = 0; j < 4; j++) columns[j] = ((float4*)shared.columns[consumer])[tile.column(group) / 2 + j];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float low = tile.at(i, group, 2 * j), high = tile.at(i, group, 2 * j + 1);
                if (NORM) {
                    low = fmaf(low, norm[i].x, fmaf(norm[i].y, columns[j].y, columns[j].x));
                    high = fmaf(high, norm[i].x, fmaf(norm[i].y, columns[j].w, columns[j].z));
                }
                if (GELU) gelu(low, high);
                pairs[j] = pack(low, high);
                if (STATISTICS) {
                    float2 stored = unpack(pairs[j]);
                    tile.at(i, group, 2 * j) = stored.x, tile.at(i, group, 2 * j + 1) = stored.y;
                    totals[i] += stored.x + stored.y;
                }
            }
            y[((u64)(first_row + tile.row(i)) * N + tile.column(group)) / 8] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    if (STATISTICS) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float mean = sum_of_four_threads(totals[i]) / TILE_N, squares = 0;
#pragma unroll
            for (int j = 0; j < TILE_N / 4; j++) {
                float apart = tile.at(i, j / 8, j % 8) - mean;
                squares = fmaf(apart, apart, squares);
            }
            squares = sum_of_four_threads(squares);
            int row = first_row + tile.row(i);
            if (threadIdx.x % 4 == 0) found[row] = mean, found[num_rows + row] = squares;
        }
    }
}

// What a thread knows of its row's and its columns' part in the norm, from before the products, for all to know after them.
struct Norm {
    static constexpr int COLUMNS = (TILE_N + WARPGROUP - 1) / WARPGROUP;
    float factor, mean, bias[COLUMNS], sums[COLUMNS];

    __device__ __forceinline__ void load(
        const float* given, const float* all_bias, const float* all_sums, int row, int column, int num_rows, float eps) {
        int thread = threadIdx.x % WARPGROUP;
        float means[PARTS], squares = 0;
        mean = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            means[part] = given[2 * part * num_rows + row + thread];
            squares += given[(2 * part + 1) * num_rows + row + thread];
            mean += means[part] / PARTS;
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) squares += (means[part] - mean) * (means[part] - mean) * (K / PARTS);
        factor = rsqrtf(squares / K + eps);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            int own = column + min(thread + WARPGROUP * i, TILE_N - 1);
            bias[i] = all_bias[own], sums[i] = all_sums[own];
        }
    }

    __device__ __forceinline__ void store(Shared& shared, int consumer) {
        int thread = threadIdx.x % WARPGROUP;
        shared.rows[consumer][thread] = make_float2(HALF * factor, -mean * HALF * factor);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++)
            if (thread + WARPGROUP * i < TILE_N)
                shared.columns[consumer][thread + WARPGROUP * i] = make_float2(HALF * bias[i], sums[i]);
    }
};

// ---- the kernel -------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WARPGROUP * (1 + CONSUMERS), 3 - CONSUMERS) linear(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float* bias, const float* row_sums,
    const float* given, const uint4* residual, uint4* y, float* found, int num_rows, int num_residual_rows, float eps) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *(Shared*)memory;
    int num_tiles = num_rows / BLOCK_M * COLUMN_TILES;
    if (threadIdx.x == 0) {
        prefetch(&x), prefetch(&weight);
        for (int stage = 0; stage < STAGES; stage++) {
            make_barrier(&shared.loaded[stage], 1);
            make_barrier(&shared.used[stage], WARPGROUP / 32);
        }
        for (int consumer = 0; consumer < CONSUMERS; consumer++) make_barrier(&shared.asked[consumer], WARPGROUP);
        show_barriers();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONSUMERS > 1 ? 24 : 40));
        if (threadIdx.x == 0) load_blocks(shared, &x, &weight, num_tiles);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS > 1 ? 240 : 216));
        int consumer = threadIdx.x / WARPGROUP - 1;
        if (NORM || RESIDUAL) wait_for_the_last_kernel();
        for (int number = consumer, index; (index = blockIdx.x + number * gridDim.x) < num_tiles; number += CONSUMERS) {
            int row = index / COLUMN_TILES * BLOCK_M, column = index % COLUMN_TILES * TILE_N;
            Tile tile;
            Norm norm;
            if (NORM) tile.clear(), norm.load(given, bias, row_sums, row, column, num_rows, eps);
            else begin(tile, residual + column / 8, (const float4*)(bias + column), row, num_residual_rows);
            multiply_blocks(shared, tile, number, consumer);
            if (NORM) {
                norm.store(shared, consumer);
                synchronize_warpgroup(consumer);
            }
            end_products(shared, tile, number);
            finish(shared, tile, consumer, y + column / 8, found + 2 * (column / TILE_N) * num_rows, row, num_rows);
            if (NORM) synchronize_warpgroup(consumer);  // before the shared memory is written again
        }
    }
}
