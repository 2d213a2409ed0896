// y = act(norm(x) W^T + b) + residual, or norm(x W^T + b), on the tensor cores of Hopper GPUs (sm_90a): the kernel of linear.py,
// which defines the names in capitals and warpgroup_product. x is (rows, K), W (N, K), y (rows, N) and the residual (its rows, N), in
// half precision and contiguous; sums are float32.
//
// Thread blocks are persistent and process tile after tile of y, of the same columns. The first warpgroup of each lets the tensor
// memory accelerator copy blocks of x and W, STAGES of them ahead; if W_STAYS, the rows of W for these columns are copied once. The two
// other warpgroups multiply. A tile has TILE_M rows and TILE_N columns. If TAKES_TURNS, they take turns with tiles of 128 rows: the
// tensor cores work on the tile of one while the other finishes and writes its own. Otherwise they divide every tile, so that a thread
// block's only tile is finished in half the time: one of 128 rows into 64 rows each, one of 64 rows into half of the columns each.
// If NORM_AFTER, the thread blocks of the same rows are a cluster, and exchange the statistics of their columns.

#include "common.cuh"

// Values of KIND, the layout of x: see `Input` of linear.py.
#define ROWS 0
#define NEIGHBOURS 1
#define PATCHES 2

constexpr int BLOCK_K = 64, STEPS = K / BLOCK_K, COLUMN_TILES = N / TILE_N;
constexpr int CONSUMERS = 2, CONSUMER_ROWS = TAKES_TURNS ? TILE_M : 64, HALVES = CONSUMER_ROWS / 64;
constexpr bool DIVIDES_COLUMNS = !TAKES_TURNS && TILE_M == 64;
constexpr int CONSUMER_N = DIVIDES_COLUMNS ? TILE_N / CONSUMERS : TILE_N;
constexpr float HALF = GELU ? 0.5f : 1;  // factor of GELU's input
// If a thread has enough registers, it reads a residual before the products, and adds it after them. Otherwise the sums start from it:
// the accelerator copies it while the tile before is multiplied, since reading it then would take longer than these products.
constexpr bool KEEPS_RESIDUAL = RESIDUAL && !TAKES_TURNS;
#define LOADS_RESIDUAL (RESIDUAL && TAKES_TURNS)
constexpr int UNROLLED = LOADS_RESIDUAL ? 1 : 6;  // steps; more would spill registers
constexpr int WEIGHT_BLOCKS = W_STAYS ? STEPS : STAGES;
constexpr u32 X_BYTES = TILE_M * BLOCK_K * 2, WEIGHT_BYTES = TILE_N * BLOCK_K * 2;
// Blocks of W that are loaded before the previous kernel has ended. They are few: the first block of x arrives after all of them.
constexpr int FEW = 24 * 1024 / WEIGHT_BYTES, MOST = STEPS < WEIGHT_BLOCKS ? STEPS : WEIGHT_BLOCKS, EARLY = FEW < MOST ? FEW : MOST;

struct Shared {
    char x[STAGES][X_BYTES];
    char weight[WEIGHT_BLOCKS][WEIGHT_BYTES];
#if LOADS_RESIDUAL
    char residual[(TILE_N + 63) / 64][X_BYTES];  // 64 columns each
#endif
    float columns[TILE_N];  // bias
    float rows[CONSUMERS][TILE_M];  // `factor_of` each
#if NORM_AFTER
    float gain[TILE_N], shift[TILE_N];  // of the LayerNorm
    // Of the rows of this tile and of the next one: mean and sum of squared deviations of each consumer's columns in the cluster.
    float2 parts[2][N / CONSUMER_N][TILE_M];
    u64 exchanged[2];
#endif
    u64 x_loaded[STAGES], weight_loaded[WEIGHT_BLOCKS], used[STAGES], asked[CONSUMERS];
#if LOADS_RESIDUAL
    u64 residual_loaded[CONSUMERS], residual_used;
#endif
};
static_assert(sizeof(Shared) == SHARED_BYTES);

// ---- copies to shared memory ------------------------------------------------------------------------------------------------------

// Copy 64 features of a tile's rows. linear.py defines the dimensions of the map for each kind of x.
__device__ __forceinline__ void load_x(const TensorMap* map, void* to, u64* barrier, int step, int row) {
#if KIND == ROWS
    load(map, to, barrier, step * BLOCK_K, row, 0, 0, 0);
#elif KIND == NEIGHBOURS  // features are (dy, dx, channel), and zero outside the image
    constexpr int BLOCKS = STEPS / 9;
    int column = row % WIDTH, line = row / WIDTH % HEIGHT, image = row / (WIDTH * HEIGHT);
    int dx = step / BLOCKS % 3, dy = step / BLOCKS / 3;
    load(map, to, barrier, step % BLOCKS * BLOCK_K, column + dx - 1, line + dy - 1, image, 0);
#elif KIND == PATCHES  // features are (channel, y, x); 64 of them are four lines of 16 pixels, one after another in shared memory
    int column = row % WIDTH, line = row / WIDTH % HEIGHT, image = row / (WIDTH * HEIGHT);
    load(map, to, barrier, 0, column, (image * (STEPS / 4) + step / 4) * HEIGHT + line, step % 4 * 4, 0);
#endif
}

// Permute each 32 rows of W: the row for column 8 q + 2 j + e of y becomes the one for column 8 j + 2 q + e of the product. A thread
// has the latter columns of one q, which are eight neighbouring columns of y.
__device__ __forceinline__ void load_weight(const TensorMap* map, void* to, u64* barrier, int feature, int column) {
    load(map, to, barrier, feature, 0, 0, 0, column / 32);
}

__device__ __forceinline__ void load_weight_block(Shared& shared, const TensorMap* weight, int block, int step, int column) {
    arrive_and_expect(&shared.weight_loaded[block], WEIGHT_BYTES);
    load_weight(weight, shared.weight[block], &shared.weight_loaded[block], step * BLOCK_K, column);
}

// Copy all blocks of all tiles, except the EARLY ones of W, in one thread: each as soon as the block that was in its place has been read.
__device__ __forceinline__ void load_blocks(
    Shared& shared, const TensorMap* x, const TensorMap* weight, const TensorMap* residual, int first_row, int next_row, int num_rows,
    int num_residual_rows, int column) {
    auto load_residual = [&](int number) {
#if LOADS_RESIDUAL
        int row = first_row + number * next_row;
        if (row >= num_rows) return;
        if (number) wait(&shared.residual_used, number - 1);
        u64* barrier = &shared.residual_loaded[number % CONSUMERS];
        arrive_and_expect(barrier, sizeof(shared.residual));
        for (int i = 0; i < (TILE_N + 63) / 64; i++)
            load(residual, shared.residual[i], barrier, column + i * 64, row % num_residual_rows, 0, 0, 0);
#endif
    };
    load_residual(0);
    int block = 0;
    for (int row = first_row, number = 0; row < num_rows; row += next_row, number++) {
#pragma unroll 1  // shorter code, and a little faster
        for (int step = 0; step < STEPS; step++, block++) {
            int stage = block % STAGES;
            if (block >= STAGES) wait(&shared.used[stage], block / STAGES - 1);
            if (block >= EARLY && (!W_STAYS || block < STEPS)) load_weight_block(shared, weight, W_STAYS ? step : stage, step, column);
            if (step == STEPS / 2) load_residual(number + 1);  // this tile's is probably read by now
            arrive_and_expect(&shared.x_loaded[stage], X_BYTES);
            load_x(x, shared.x[stage], &shared.x_loaded[stage], step, row);
        }
    }
}

// ---- a tile -----------------------------------------------------------------------------------------------------------------------

// A warpgroup's part of a tile, from HALVES products of 64 rows. A thread has eight of every 32 columns of two rows of each.
struct Tile {
    static constexpr int ROWS_OF_THREAD = 2 * HALVES, GROUPS = CONSUMER_N / 32;
    float sums[HALVES][CONSUMER_N / 2];
    uint4 residual[KEEPS_RESIDUAL ? GROUPS : 1][ROWS_OF_THREAD];

    static __device__ __forceinline__ int consumer() { return threadIdx.x / WARPGROUP - 1; }
    // The first of the warpgroup's rows in the tile, and of its columns.
    static __device__ __forceinline__ int first_row() { return TAKES_TURNS || DIVIDES_COLUMNS ? 0 : consumer() * CONSUMER_ROWS; }
    static __device__ __forceinline__ int first_column() { return DIVIDES_COLUMNS ? consumer() * CONSUMER_N : 0; }
    // The number of rows from the thread's first to its i-th.
    static __device__ __forceinline__ constexpr int below(int i) { return i % 2 * 8 + i / 2 * 64; }
    // The index in the tile of the thread's i-th row.
    static __device__ __forceinline__ int row(int i) {
        return first_row() + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + below(i);
    }
    // The first of the thread's eight columns in a group of 32.
    static __device__ __forceinline__ int column(int group) { return first_column() + group * 32 + threadIdx.x % 4 * 8; }
    // The element of the i-th row and the j-th of the group's eight columns.
    __device__ __forceinline__ float& at(int i, int group, int j) { return sums[i / 2][group * 16 + j / 2 * 4 + i % 2 * 2 + j % 2]; }

    __device__ __forceinline__ void fence() {
#pragma unroll
        for (int half = 0; half < HALVES; half++) compiler_fence(sums[half]);
    }

    __device__ __forceinline__ void add(uint4 eight, int group, int i) {
        u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 8; j++) at(i, group, j) += j % 2 ? unpack(pairs[j / 2]).y : unpack(pairs[j / 2]).x;
    }
};

#if LOADS_RESIDUAL
// The group's eight columns of the thread's i-th row. In a row of 128 bytes, the accelerator has permuted the pieces of 16 bytes.
__device__ __forceinline__ uint4 loaded_residual(Shared& shared, int group, int i) {
    u32 place = address(shared.residual) + Tile::row(0) * 128 + (threadIdx.x % 4 ^ threadIdx.x % 32 / 4) * 16;
    return read_shared((group % 2 ? place ^ 64 : place) + group / 2 * X_BYTES + Tile::below(i) * 128);
}
#endif

// Start the sums from the bias, and from the residual if it is not kept.
__device__ __forceinline__ void begin(
    Shared& shared, Tile& tile, const uint4* residual, int first_row, int num_residual_rows, int number) {
#if LOADS_RESIDUAL
    wait(&shared.residual_loaded[number % CONSUMERS], number / CONSUMERS);
#endif
#pragma unroll
    for (int group = 0; group < Tile::GROUPS; group++) {
        const float* bias = shared.columns + tile.column(group);
#pragma unroll
        for (int i = 0; i < Tile::ROWS_OF_THREAD; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) tile.at(i, group, j) = bias[j];
#if LOADS_RESIDUAL
            tile.add(loaded_residual(shared, group, i), group, i);
#elif RESIDUAL
            tile.residual[group][i] = residual[((u64)((first_row + tile.row(i)) % num_residual_rows) * N + tile.column(group)) / 8];
#endif
        }
    }
#if LOADS_RESIDUAL
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&shared.residual_used);
#endif
}

// Descriptor of 64 rows and 16 features of a block of x.
__device__ __forceinline__ u64 part_of_x(const char* block, int first_row, int k) {
#if KIND == PATCHES
    return matrix<32>(block + (k * TILE_M + first_row) * 32);
#else
    return matrix<128>(block + first_row * BLOCK_K * 2) + 2 * k;  // 16 features further on are 32 bytes
#endif
}

__device__ __forceinline__ void multiply_blocks(Shared& shared, Tile& tile, int number, int consumer) {
    int block = number * STEPS, lane = threadIdx.x % 32;
    // Consumers take turns. Blocks arrive in the order of the tiles, and a barrier's phase can only be waited for if the previous one
    // is complete: by then all threads of the other consumer have waited for all earlier ones.
    if (TAKES_TURNS && number) wait(&shared.asked[1 - consumer], (number - 1) / CONSUMERS);
    tile.fence();
#pragma unroll UNROLLED
    for (int step = 0; step < STEPS; step++, block++) {
        int stage = block % STAGES;
        int weight_block = W_STAYS ? step : stage;
        wait(&shared.weight_loaded[weight_block], W_STAYS ? 0 : block / STAGES);
        wait(&shared.x_loaded[stage], block / STAGES);
        u64 weight = matrix<128>(shared.weight[weight_block] + Tile::first_column() * BLOCK_K * 2);
        begin_products();
#pragma unroll
        for (int k = 0; k < BLOCK_K / 16; k++) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                u64 x = part_of_x(shared.x[stage], Tile::first_row() + half * 64, k);
                warpgroup_product(tile.sums[half], x, weight + 2 * k, !NORM || step || k);
            }
        }
        commit_products();
        if (step) {
            wait_for_products<1>();
            if (lane == 0) arrive(&shared.used[(block - 1) % STAGES]);
        }
    }
    if (TAKES_TURNS) arrive(&shared.asked[consumer]);
}

__device__ __forceinline__ void end_products(Shared& shared, Tile& tile, int number) {
    wait_for_products<0>();
    if (threadIdx.x % 32 == 0) arrive(&shared.used[((number + 1) * STEPS - 1) % STAGES]);
    tile.fence();
}

#if NORM_AFTER
// Apply the LayerNorm that follows: each thread block of the cluster sends the statistics of its columns to all of them.
__device__ __forceinline__ void normalize(Shared& shared, Tile& tile, int number, float eps) {
    int place = number % 2, lane = threadIdx.x % 4;
    if (threadIdx.x == WARPGROUP) arrive_and_expect(&shared.exchanged[place], sizeof(shared.parts[place]));
    float2 own[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float total = 0, squares = 0;
#pragma unroll
        for (int j = 0; j < CONSUMER_N / 4; j++) total += tile.at(i, j / 8, j % 8);
        float mean = sum_of_four_threads(total) / CONSUMER_N;
#pragma unroll
        for (int j = 0; j < CONSUMER_N / 4; j++) {
            float apart = tile.at(i, j / 8, j % 8) - mean;
            squares = fmaf(apart, apart, squares);
        }
        own[i] = make_float2(mean, sum_of_four_threads(squares));
    }
    if (number == 0) wait_for_cluster();
    // Four threads have the statistics of the same two rows: each sends those of one row to every second thread block.
    float2* to = &shared.parts[place][blockIdx.x % COLUMN_TILES * CONSUMERS + Tile::consumer()][tile.row(lane % 2)];
    for (int block = lane / 2; block < COLUMN_TILES; block += 2)
        send(to, &shared.exchanged[place], block, lane % 2 ? own[1] : own[0]);
    wait(&shared.exchanged[place], number / 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float2 parts[N / CONSUMER_N];
        float mean = 0, squares = 0;
#pragma unroll
        for (int part = 0; part < N / CONSUMER_N; part++) {
            parts[part] = shared.parts[place][part][tile.row(i)];
            mean += parts[part].x / (N / CONSUMER_N), squares += parts[part].y;
        }
#pragma unroll
        for (int part = 0; part < N / CONSUMER_N; part++) squares += (parts[part].x - mean) * (parts[part].x - mean) * CONSUMER_N;
        float factor = rsqrtf(squares / N + eps);
#pragma unroll
        for (int j = 0; j < CONSUMER_N / 4; j++) {
            int column = tile.column(j / 8) + j % 8;
            tile.at(i, j / 8, j % 8) = fmaf((tile.at(i, j / 8, j % 8) - mean) * factor, shared.gain[column], shared.shift[column]);
        }
    }
}
#endif

// Apply residual, norm, GELU and rounding, and write the tile to memory.
__device__ __forceinline__ void finish(Shared& shared, Tile& tile, int consumer, uint4* y, float* found, int first_row, int num_rows) {
    float factors[Tile::ROWS_OF_THREAD], totals[Tile::ROWS_OF_THREAD] = {};
    // To the thread's first row and column: the distances from there are known when this is compiled.
    y += ((u64)(first_row + tile.row(0)) * N + tile.column(0)) / 8, found += first_row + tile.row(0);
#pragma unroll
    for (int i = 0; i < Tile::ROWS_OF_THREAD; i++) factors[i] = NORM ? shared.rows[consumer][tile.row(i)] : 0;
#pragma unroll
    for (int group = 0; group < Tile::GROUPS; group++) {
        float2 bias[4];
        if (NORM)
#pragma unroll
            for (int j = 0; j < 4; j++) bias[j] = ((float2*)shared.columns)[tile.column(group) / 2 + j];
#pragma unroll
        for (int i = 0; i < Tile::ROWS_OF_THREAD; i++) {
            if (KEEPS_RESIDUAL) tile.add(tile.residual[group][i], group, i);
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float low = tile.at(i, group, 2 * j), high = tile.at(i, group, 2 * j + 1);
                if (NORM) low = fmaf(low, factors[i], bias[j].x), high = fmaf(high, factors[i], bias[j].y);
                if (GELU) fitted_gelu(low, high);
                pairs[j] = pack(low, high);
                if (STATISTICS) {
                    float2 stored = unpack(pairs[j]);
                    tile.at(i, group, 2 * j) = stored.x, tile.at(i, group, 2 * j + 1) = stored.y;
                    totals[i] += stored.x + stored.y;
                }
            }
            y[tile.below(i) * (N / 8) + group * 4] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    if (STATISTICS) {
#pragma unroll
        for (int i = 0; i < Tile::ROWS_OF_THREAD; i++) {
            float mean = sum_of_four_threads(totals[i]) / CONSUMER_N, squares = 0;
#pragma unroll
            for (int j = 0; j < CONSUMER_N / 4; j++) {
                float apart = tile.at(i, j / 8, j % 8) - mean;
                squares = fmaf(apart, apart, squares);
            }
            squares = sum_of_four_threads(squares);
            if (threadIdx.x % 4 == 0) found[tile.below(i)] = mean, found[num_rows + tile.below(i)] = squares;
        }
    }
}

// The norm's factor of a row's products, from the statistics of the row's parts. Their means are multiplied by the sums of the weight's
// rows, which are zero: see `FusedLinear`.
__device__ __forceinline__ float factor_of(const float* given, int row, int num_rows, float eps) {
    float means[PARTS], mean = 0, squares = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        means[part] = given[2 * part * num_rows + row];
        squares += given[(2 * part + 1) * num_rows + row];
        mean += means[part] / PARTS;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) squares += (means[part] - mean) * (means[part] - mean) * (K / PARTS);
    return HALF * rsqrtf(squares / K + eps);
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WARPGROUP * (1 + CONSUMERS), 1)
#if NORM_AFTER
    __cluster_dims__(COLUMN_TILES, 1, 1)
#endif
    NAME(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap residual_map,
    const float* bias, const float* given, const uint4* residual, const float* gain, const float* shift, uint4* y, float* found,
    int num_rows, int num_residual_rows, float eps) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *(Shared*)memory;
    // Thread blocks of the same rows are neighbours: they read these rows from the cache at about the same time.
    int column = blockIdx.x % COLUMN_TILES * TILE_N, first_row = blockIdx.x / COLUMN_TILES * TILE_M;
    int next_row = gridDim.x / COLUMN_TILES * TILE_M;
    if (threadIdx.x == 0) {
        prefetch(&x), prefetch(&weight);
        if (LOADS_RESIDUAL) prefetch(&residual_map);
        for (int stage = 0; stage < STAGES; stage++) {
            make_barrier(&shared.x_loaded[stage], 1);
            make_barrier(&shared.used[stage], (TAKES_TURNS ? 1 : CONSUMERS) * WARPGROUP / 32);
        }
        for (int block = 0; block < WEIGHT_BLOCKS; block++) make_barrier(&shared.weight_loaded[block], 1);
        for (int consumer = 0; consumer < CONSUMERS; consumer++) make_barrier(&shared.asked[consumer], WARPGROUP);
#if LOADS_RESIDUAL
        for (int consumer = 0; consumer < CONSUMERS; consumer++) make_barrier(&shared.residual_loaded[consumer], 1);
        make_barrier(&shared.residual_used, WARPGROUP / 32);
#endif
#if NORM_AFTER
        for (int place = 0; place < 2; place++) make_barrier(&shared.exchanged[place], 1);
#endif
        show_barriers();
        // The previous kernel, which may still run, does not write weights and biases: see `FusedLinear`.
        for (int block = 0; block < EARLY; block++) load_weight_block(shared, &weight, block, block, column);
    }
    for (int i = threadIdx.x; i < TILE_N; i += blockDim.x) {
        shared.columns[i] = HALF * bias[column + i];
#if NORM_AFTER
        shared.gain[i] = gain[column + i], shared.shift[i] = shift[column + i];
#endif
    }
    __syncthreads();
    if (NORM_AFTER) arrive_in_cluster();
    if (threadIdx.x < WARPGROUP) {
        if (TAKES_TURNS) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            wait_for_the_last_kernel();
            let_the_next_kernel_begin();
            load_blocks(shared, &x, &weight, &residual_map, first_row, next_row, num_rows, num_residual_rows, column);
        }
        if (NORM_AFTER) wait_for_cluster();
    } else {
        if (TAKES_TURNS) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        int consumer = Tile::consumer(), row_of_norm = Tile::first_row() + threadIdx.x % CONSUMER_ROWS;
        if (NORM || KEEPS_RESIDUAL) wait_for_the_last_kernel();
        constexpr int TURNS = TAKES_TURNS ? CONSUMERS : 1;
        for (int number = TAKES_TURNS ? consumer : 0, row; (row = first_row + number * next_row) < num_rows; number += TURNS) {
            Tile tile;
            float factor;  // of the thread's row, computed before the products and shared after them
            if (NORM) factor = factor_of(given, row + row_of_norm, num_rows, eps);
            else begin(shared, tile, residual + column / 8, row, num_residual_rows, number);
            multiply_blocks(shared, tile, number, consumer);
            if (NORM) {
                shared.rows[consumer][row_of_norm] = factor;
                synchronize_warpgroup(consumer);
            }
            end_products(shared, tile, number);
#if NORM_AFTER
            normalize(shared, tile, number, eps);
#endif
            int part = (column + Tile::first_column()) / CONSUMER_N;
            finish(shared, tile, consumer, y + column / 8, found + 2 * part * num_rows, row, num_rows);
            if (NORM) synchronize_warpgroup(consumer);  // before the shared memory is written again
        }
    }
}
